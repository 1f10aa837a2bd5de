"""The YAML of a matrix of groups: how it is found, its keys, and the cells it names.

    learning_rates: experiments/learning_rates.yaml   # or a list of rates, which makes it a sweep
    parts:                                            # the matrix is the union of their cells
      - tasks: [p_hop]
        groups: [loop, dense_params]
        seeds: [0, 1, 2]
        budgets: [{steps: 1500}]                      # or {steps: 1500, training_flops_of: loop}
        vary: {steps: [1, 2, 4, 8]}                   # one cell per value; also of `examples`
        #     or of a training key, such as model.recurrence.halting.ponder_weight
        learning_rates: [0.001, 0.002]                # of a sweep: this part's own

`training`, `evaluation` and `examples` at the top override those of all tasks. A budget of steps gives all
groups the same tokens; a budget of training FLOPs gives each group as many steps as cost what the named group
costs in its steps. experiments/latent_cot.py describes the other kind of matrix.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from common.nearest import nearest
from common.schema import as_type
from data_pipeline.errors import DataError
from experiments.groups import GROUPS
from experiments.tasks import HERE, Task, at_least, read_yaml

MATRICES = HERE / "matrices"
RATES = HERE / "learning_rates.yaml"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long a cell is trained."""

    steps: int  # optimizer steps: the cell's own, or those of the group below
    training_flops_of: str | None = None  # a group, whose training FLOPs in `steps` steps are the budget

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps)

    @property
    def name(self) -> str:
        whose = "" if self.training_flops_of is None else f"-flops-of-{self.training_flops_of}"
        return f"{self.steps}{whose}"


@dataclass(frozen=True, kw_only=True)
class Part:
    tasks: list[str]
    groups: list[str]
    seeds: list[int]
    budgets: list[Budget]
    sizes: list[str] = field(default_factory=lambda: ["small"])
    vary: dict[str, list[Any]] = field(default_factory=dict)
    learning_rates: list[float] = field(default_factory=list)  # of a sweep: in place of the file's

    def __post_init__(self) -> None:
        at_least(0, seeds=self.seeds)


@dataclass(frozen=True, kw_only=True)
class MatrixFile:
    parts: list[Part]
    learning_rates: str | list[float] = str(RATES)  # a file of rates, or those of a sweep
    training: list[str] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    examples: int | None = None

    def __post_init__(self) -> None:
        at_least(0, examples=self.examples)


@dataclass(frozen=True)
class Cell:
    """One run, not yet planned."""

    task: str
    size: str
    budget: Budget
    group: str
    seed: int
    learning_rate: float
    vary: tuple[str, Any] | None = None  # a key and its value, over those of the task and the group
    rate_in_name: bool = False  # of a sweep, whose cells differ by it

    @property
    def name(self) -> str:
        """Also the cell's folder below `cells/`."""
        varied = "" if self.vary is None else f"@{self.vary[0]}={self.vary[1]}"
        rate = f"@lr={self.learning_rate:g}" if self.rate_in_name else ""
        return f"{self.task}/{self.size}/{self.budget.name}/{self.group}{varied}{rate}/{self.seed}"


def find_matrix(given: str) -> Path:
    """The file for `--matrix`: an existing path, or the bare name of a file in experiments/matrices.

    Raises:
        FileNotFoundError: it is neither; the line names the nearest matrix.
    """
    path, named = Path(given), MATRICES / f"{given}.yaml"
    if path.is_file():
        return path
    if path.name == given and named.is_file():
        return named
    known = [file.stem for file in MATRICES.glob("*.yaml")]
    raise FileNotFoundError(
        f"--matrix {given} is neither a file nor a name in experiments/matrices; {nearest(path.stem, known)}"
    )


def cells_of(
    path: Path, file: MatrixFile, tasks: Mapping[str, Task], sizes: Mapping[str, list[str]]
) -> list[Cell]:
    """All cells, part by part, without repeats.

    Raises:
        ValueError, FileNotFoundError: an unknown name, or a group without a learning rate.
    """
    given = file.learning_rates
    rates = _read_rates(path, Path(given)) if isinstance(given, str) else given
    return list(
        dict.fromkeys(cell for part in file.parts for cell in _cells(path, part, tasks, sizes, rates))
    )


def _read_rates(path: Path, rates: Path) -> dict[str, dict[str, float]]:
    try:
        found = read_yaml(rates if rates.is_file() else HERE.parent / rates)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"matrix {path}: {rates} does not exist; run --matrix sweep, which writes it"
        ) from None
    return as_type(dict[str, dict[str, float]], found, f"{rates}: ")


def rate_key(task: str, size: str) -> str:
    """The section of learning_rates.yaml that holds every group's rate."""
    return f"{task}/{size}"


def _cells(
    path: Path,
    part: Part,
    tasks: Mapping[str, Task],
    sizes: Mapping[str, list[str]],
    rates: Sequence[float] | Mapping[str, Mapping[str, float]],
) -> Iterator[Cell]:
    for kind, names, known in (
        ("task", part.tasks, tasks),
        ("size", part.sizes, sizes),
        ("group", part.groups, GROUPS),
    ):
        for name in names:
            if name not in known:
                raise DataError(f"matrix {path}: unknown {kind} {name!r}; {nearest(name, list(known))}")
    if part.learning_rates and isinstance(rates, Mapping):
        raise DataError(
            f"matrix {path}: learning_rates {part.learning_rates} of a part are for a sweep; remove them, or "
            "make the file's own learning_rates a list"
        )
    varied: list[tuple[str, Any] | None]
    varied = [(key, value) for key, values in part.vary.items() for value in values] or [None]
    axes = product(part.tasks, part.sizes, part.budgets, part.seeds, part.groups, varied)
    for task, size, budget, seed, group, change in axes:
        if isinstance(rates, Mapping):
            key = rate_key(tasks[task].learning_rates_of or task, size)
            own = rates.get(key, {})
            if group not in own:
                raise ValueError(
                    f"matrix {path}: group {group} has no learning rate for {key}; add it to "
                    "experiments/matrices/sweep.yaml and run --matrix sweep, which writes learning_rates.yaml"
                )
            yield Cell(task, size, budget, group, seed, float(own[group]), change)
        else:
            for rate in part.learning_rates or rates:
                yield Cell(task, size, budget, group, seed, float(rate), change, rate_in_name=True)
