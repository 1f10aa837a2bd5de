"""What an evaluation task is: the record that its script exports, and what the command line tells it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.sources.documents import Problem
from eval.scoring.core import Scorer
from eval.scoring.results import TaskResult

if TYPE_CHECKING:  # most tasks draw nothing
    from matplotlib.figure import Figure

Evaluation = Callable[[Scorer], list[TaskResult]]


@dataclass(frozen=True)
class Options:
    """The shared flags, as a task sees them; None: the task's default. `limit` counts problems per file."""

    data: Path = Path("data")
    limit: int | None = None
    num_fewshot: int | None = None
    seed: int = 1234
    max_new_tokens: int | None = None
    samples: int = 0  # that vote on each generated answer, in addition to the greedy one
    num_steps: Sequence[int | str] | None = None  # only for a task that `sweeps_num_steps`

    def shots(self, default: int = 0) -> int:
        """How many exemplars; `default` is the task's number in lm-eval."""
        return default if self.num_fewshot is None else self.num_fewshot


@dataclass(frozen=True)
class EvaluationTask:
    """One task. Its script exports it as TASK, where eval/run.py finds it.

    `load(options, **own)` gets the shared flags and the script's own. It reads all data at once, so that a
    user's mistake shows before any model has run, and raises ValueError or OSError for one.
    """

    name: str
    load: Callable[..., Evaluation]
    generates: bool = False  # answers are generated: it takes --max_new_tokens and --samples
    sets: Sequence[str] = ()  # parts that eval/run.py also knows by name: load(options, names=[...])
    flags: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # own: "--name" -> add_argument's
    without: Collection[str] = ()  # shared flags that it has no use for
    sweeps_num_steps: bool = False  # one result holds all --num_steps; otherwise each gives a result
    show: Callable[[Sequence[TaskResult]], str] | None = None  # what is printed; None: the common table
    draw: "Callable[[Sequence[TaskResult]], Figure] | None" = None  # the picture; None: there is none


def first(documents: Sequence[Problem], limit: int | None, path: Path) -> list[Problem]:
    """The first `limit` documents (None: all). Raises ValueError if the file at `path` held none."""
    if not documents:
        raise ValueError(f"{path} holds no problems: get the published file again")
    return list(documents[:limit])


def find_data(data: Path, name: str) -> Path:
    """`data` itself if it is a file, else the file `name` in that folder. Raises ValueError if missing."""
    if data.is_file():
        return data
    path = data / name
    if not path.is_file():
        raise ValueError(f"no data file {path}: --data or DATA_ROOT takes the folder of {name}, or that file")
    return path
