"""Tasks and sizes of the experiments.

A synthetic task has its entry in its record (data_pipeline/tasks/); experiments/tasks.yaml adds variants of
these, tasks on text, and the sizes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from common.schema import from_plain
from data_pipeline.tasks.registry import TASKS as SYNTHETIC_TASKS

HERE = Path(__file__).parent
KINDS = ("reasoning", "traced", "text")  # evaluated by eval/reasoning.py, thoughts.py, perplexity.py


@dataclass(frozen=True, kw_only=True)
class EvaluationSpec:
    """What a cell of the task is tested on."""

    task: str | None = None  # of eval/reasoning.py or eval/thoughts.py
    num_samples: int | None = None  # generated questions
    limit: int | None = None  # documents of a text, and questions asked with exemplars
    task_options: str = ""
    steps: list[int] = field(default_factory=list)  # test-time steps of loops; their trained number is added
    few_shot: str | None = None  # of a text: the task of eval/run.py that is asked with exemplars
    shots: list[int] = field(default_factory=list)  # exemplars before each of its questions
    votes: int = 0  # sampled chains of thought that vote, at most; 0: no vote
    batch_size: int = 64

    def __post_init__(self) -> None:
        at_least(1, num_samples=self.num_samples, limit=self.limit, batch_size=self.batch_size)
        at_least(1, steps=self.steps)
        at_least(0, shots=self.shots, votes=self.votes)


@dataclass(frozen=True, kw_only=True)
class Task:
    kind: str  # of KINDS
    recipe: str  # data_pipeline/recipes/NAME.yaml
    data: list[str] = field(default_factory=list)  # overrides of the recipe
    examples: int  # generated training examples; 0: all that the recipe reads
    vocab_size: int  # pieces of the recipe's tokenizer
    sequence_length: int  # tokens per row
    training: list[str] = field(default_factory=list)  # overrides of experiments/base.yaml
    layers: int  # k: distinct layers of a loop
    steps: int  # R: loop steps
    trained_depth: int | None = None  # largest serial depth of a training example; None: no such axis
    learning_rates_of: str | None = None  # the task whose rates it takes, None: its own
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    gaps: dict[str, str] = field(default_factory=dict)  # name -> task_options of a test unlike the training


def at_least(least: int, where: str = "", **given: int | Sequence[int] | None) -> None:
    """Raises ValueError for the first number below `least`, by its name; None is not a number."""
    for name, value in given.items():
        for number in value if isinstance(value, Sequence) else (value,):
            if number is not None and number < least:
                raise ValueError(f"{where}{name}={number} must be at least {least}")


def read_yaml(path: Path) -> dict[str, Any]:
    """Raises ValueError or FileNotFoundError, one line, for a file that is missing or holds no keys."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: correct the path")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} holds no KEY: VALUE lines: see experiments/matrices/quick.yaml")
    return {str(key): value for key, value in values.items()}


def recorded_tasks() -> dict[str, dict[str, Any]]:
    """The entries of the synthetic tasks, as tasks.yaml would have them."""
    return {
        name: {
            **{"kind": "reasoning", "recipe": name, **record.experiment},
            "evaluation": {"task": name, **record.experiment["evaluation"]},
        }
        for name, record in SYNTHETIC_TASKS.items()
        if record.experiment is not None
    }


def read_tasks(path: Path = HERE / "tasks.yaml") -> tuple[dict[str, Task], dict[str, list[str]]]:
    """All tasks, and the overrides of all sizes.

    Raises ValueError, one line, for a wrong key or value and for a task of the file that has a record.
    """
    values, recorded = read_yaml(path), recorded_tasks()
    for name in recorded:
        if name in values["tasks"]:
            raise ValueError(
                f"{path.name}, task {name}: its entry is in data_pipeline/tasks/{name}.py: change it there, "
                "or choose another name for a variant"
            )
    tasks = {
        name: from_plain(Task, given, f"{path.name}, task {name}: ")
        for name, given in (recorded | values["tasks"]).items()
    }
    for name, task in tasks.items():
        if task.kind not in KINDS:
            raise ValueError(f"{path.name}, task {name}: kind {task.kind!r}; choose from {', '.join(KINDS)}")
        if task.learning_rates_of not in (None, *tasks):
            raise ValueError(
                f"{path.name}, task {name}: learning_rates_of {task.learning_rates_of!r} is not a task; "
                f"choose from {', '.join(tasks)}"
            )
    return tasks, values["sizes"]
