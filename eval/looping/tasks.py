"""The synthetic tasks with labels: their test samples, and what shortcuts answer to them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from common.nearest import nearest
from data_pipeline.sources.documents import LabelledDocument
from data_pipeline.tasks import addition, causal_loop_v2, p_hop
from data_pipeline.tasks.programs.causal_loop_v2_audit import one_step_answer


class Item(NamedTuple):
    """One sample. The answer is the last label."""

    id: str
    document: LabelledDocument
    problem_depth: (
        int | None
    )  # steps that the answer needs one after the other; None: the same for all, or not known


class TaskData(NamedTuple):
    """What a task hands over."""

    items: list[Item]
    guesses: dict[str, Sequence[str]]  # way to guess -> its answer to each item


@dataclass(frozen=True)
class ReasoningTask:
    options: dict[str, int]  # with their defaults
    generate: Callable[..., TaskData]  # (num_samples, seed, **options), test split


def _p_hop(num_samples: int, seed: int, **options: int) -> TaskData:
    samples = list(p_hop.generate(num_samples, **options, seed=seed, split="test"))
    items = [Item(s.id, LabelledDocument(s.text, s.labels), None) for s in samples]
    return TaskData(items, p_hop.shortcuts(samples, options["hops"]))


def _addition(num_samples: int, seed: int, **options: int) -> TaskData:
    samples = list(addition.generate(num_samples, **options, seed=seed, split="test"))
    items = [Item(s.id, LabelledDocument(s.text, s.labels), None) for s in samples]
    return TaskData(items, addition.shortcuts(samples))


def _causal_loop_v2(num_samples: int, seed: int, min_depth: int, max_depth: int, **options: int) -> TaskData:
    # Those that all depths from 2 on have: an accuracy by depth must not be one by family.
    depths, families = range(min_depth, max_depth + 1), ("chain", "convergence")
    samples = list(causal_loop_v2.generate(num_samples, depths, families, **options, seed=seed, split="test"))
    items = [Item(s.id, LabelledDocument(*s.labelled()), s.depth) for s in samples]
    return TaskData(items, {"one step": [str(one_step_answer(s)) for s in samples]})


TASKS = {
    "p_hop": ReasoningTask({"hops": 3, "length": 24, "alphabet": 4}, _p_hop),
    "addition": ReasoningTask({"operands": 8, "modulus": 10}, _addition),
    "causal_loop_v2": ReasoningTask(
        {
            **{"min_depth": 1, "max_depth": 8, "modulus": 7, "variables": 5, "statements": 12, "names": 26},
            "constants": 0,  # below which initial ones are; 0: the modulus
        },
        _causal_loop_v2,
    ),
}


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
