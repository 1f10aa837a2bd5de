"""The settings of a cell, as tasks and options: the part of its record that no renamed script or flag breaks.

training      base: a file of experiments/, ds_config: one of ds_configs/, overrides: {key: value} over base
data          recipe: a file of data_pipeline/recipes/, overrides: {key: value} over it
evaluations   {name: {kind, ...}}, each of one kind:
    reasoning    task, num_samples, batch_size, task_options; of a loop num_steps
    thoughts     mode (cot | none), task, num_samples, batch_size, task_options; samples: that vote, if any do
    perplexity   limit, batch_size; of a loop num_steps. The text is the held-out part of `data`
    few_shot     task, num_fewshot, limit, batch_size

Where two overrides name the same key, the later one counts.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments.groups import GROUPS
from experiments.matrix import BASE, PlannedCell

DS_CONFIG = "ds_configs/zero1.json"
Settings = dict[str, Any]


def cell_settings(plan: PlannedCell, evaluate: bool) -> Settings:
    """All settings of a cell; a sweep's cells are not evaluated."""
    return {
        "training": {
            "base": BASE.stem,
            "ds_config": Path(DS_CONFIG).stem,
            "overrides": mapping(plan.overrides),
        },
        "data": {"recipe": plan.task.recipe, "overrides": mapping(plan.data)},
        "evaluations": _evaluation_settings(plan) if evaluate else {},
    }


def mapping(overrides: Iterable[str]) -> dict[str, Any]:
    """KEY=VALUE of a command line, each value as the run reads it."""
    pairs = (override.split("=", 1) for override in overrides)
    return {key: _value(text) for key, text in pairs}


def _value(text: str) -> Any:
    values: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    return values["value"]


def task_options(text: str) -> dict[str, int]:
    """ "NAME=INTEGER,..." of --task_options."""
    pairs = (part.split("=") for part in text.split(",") if part)
    return {name: int(value) for name, value in pairs}


def _evaluation_settings(plan: PlannedCell) -> dict[str, Settings]:
    """By name; the record's accuracy or perplexity comes from `main`."""
    spec, task = plan.task.evaluation, plan.task
    looped = plan.model.recurrence.placement != "none"
    trained = plan.model.recurrence.num_steps
    at_all_steps = {"num_steps": sorted({*spec.steps, trained})} if looped else {}
    if task.kind == "text":
        limit = {"limit": spec.limit, "batch_size": spec.batch_size}
        tests = {"main": {"kind": "perplexity", **limit, **at_all_steps}}
        if spec.few_shot is not None:
            tests["few-shot"] = {
                "kind": "few_shot",
                "task": spec.few_shot,
                "num_fewshot": list(spec.shots),
                **limit,
            }
        return tests

    def questions(options: str) -> Settings:
        asked = {"task": spec.task, "num_samples": spec.num_samples, "batch_size": spec.batch_size}
        return {**asked, "task_options": task_options(options)}

    if task.kind == "traced":
        mode = "cot" if GROUPS[plan.cell.group].method == "cot" else "none"
        votes = {"samples": spec.votes} if mode == "cot" and spec.votes else {}
        return {"main": {"kind": "thoughts", "mode": mode, **questions(spec.task_options), **votes}}
    tests = {"main": {"kind": "reasoning", **questions(spec.task_options), **at_all_steps}}
    for name, options in task.gaps.items():
        at_trained = {"num_steps": [trained]} if looped else {}
        tests[f"gap {name}"] = {"kind": "reasoning", **questions(options), **at_trained}
    return tests
