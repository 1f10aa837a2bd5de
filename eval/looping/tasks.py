"""The synthetic tasks with labels: their test samples, and what shortcuts answer to them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

from common.nearest import nearest
from data_pipeline.sources.documents import LabelledDocument
from data_pipeline.tasks.registry import TASKS as SYNTHETIC_TASKS
from data_pipeline.tasks.task import SyntheticTask


class Item(NamedTuple):
    """One sample. The answer is the last label."""

    id: str
    document: LabelledDocument
    problem_depth: int | None  # serial steps to the answer; None: the same for all, or not known


class TaskData(NamedTuple):
    """What a task hands over."""

    items: list[Item]
    guesses: Mapping[str, Sequence[str]]  # way to guess -> its answer to each item


@dataclass(frozen=True)
class ReasoningTask:
    options: dict[str, int]  # with their defaults
    generate: Callable[..., TaskData]  # (num_samples, seed, problem_depths=None, **options), test split


def test_samples(
    task: SyntheticTask[Any], num_samples: int, seed: int, options: Any, problem_depths: Sequence[int] | None
) -> list[Any]:
    """Of `num_samples` samples of the test split those of these depths (None: all).

    Raises ValueError where there is none of a depth.
    """
    samples = task.test_samples(num_samples, seed, options)
    if problem_depths is None:
        return samples
    assert task.evaluation is not None
    depths = [task.evaluation.depth(sample) for sample in samples]
    if lacking := sorted(set(problem_depths) - set(depths)):
        there = ", ".join(str(depth) for depth in sorted({d for d in depths if d is not None})) or "none"
        raise ValueError(
            f"--problem_depth {lacking[0]}: no sample of {task.name} has it; of these {num_samples} the "
            f"depths are: {there}; choose from them or change --task_options"
        )
    return [sample for sample, depth in zip(samples, depths, strict=True) if depth in problem_depths]


def _generate(
    task: SyntheticTask[Any],
    num_samples: int,
    seed: int,
    problem_depths: Sequence[int] | None = None,
    **sizes: int,
) -> TaskData:
    assert task.labelled is not None
    assert task.evaluation is not None
    options = task.test_options(**sizes)
    samples = test_samples(task, num_samples, seed, options, problem_depths)
    items = [Item(s.id, task.labelled(s), task.evaluation.depth(s)) for s in samples]
    return TaskData(items, task.shortcuts(samples, options))


TASKS = {
    name: ReasoningTask(asdict(task.test_options()), partial(_generate, task))
    for name, task in SYNTHETIC_TASKS.items()
    if task.labelled and task.evaluation
}


def chance(task: str, options: Mapping[str, int]) -> float:
    """The accuracy of a uniform guess at these sizes."""
    record = SYNTHETIC_TASKS[task]
    assert record.evaluation is not None
    return record.evaluation.chance(record.test_options(**options))


def task_options(task: str, text: str) -> dict[str, int]:
    """The options of `task`: its defaults, changed by `text`, "NAME=INTEGER,...".

    Raises ValueError for another form or an unknown name, with the nearest one.
    """
    known = TASKS[task].options
    options = dict(known)
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in known:
            raise ValueError(f"--task_options: {task} has no option {name!r}: {nearest(name, known)}")
        if not value.removeprefix("-").isdecimal():
            raise ValueError(f"--task_options: {name} is {value!r}, an integer is needed: {name}=INTEGER")
        options[name] = int(value)
    return options
