"""The job of a cell in a matrix of groups: the arguments of its training and its evaluations."""

from itertools import chain
from pathlib import Path
from typing import Any

from experiments.jobs import DATA, ROOT, Data, Job, cell_folder
from experiments.matrix import BASE, Matrix, PlannedCell
from experiments.record import make_record
from experiments.settings import DS_CONFIG, Settings, cell_settings


def job_of(plan: PlannedCell, matrix: Matrix) -> Job:
    """All that is run for a cell; the record comes last."""
    settings = cell_settings(plan, evaluate=not matrix.is_sweep)
    return Job(
        name=plan.cell.name,
        max_steps=plan.max_steps,
        script="pretrain/main.py" if plan.method is None else "distill/main.py",
        training=tuple(training(plan)),
        data=Data(plan.data_name, plan.task.recipe, plan.data),
        evaluations=evaluations(settings),
        record=lambda folder: make_record(plan, matrix, folder),
        settings=settings,
    )


def folder_of(plan: PlannedCell, out: Path) -> Path:
    return cell_folder(plan.cell.name, out)


def training(plan: PlannedCell) -> list[str]:
    """Arguments of the training script, except data.path and output_dir."""
    base = str(BASE.relative_to(ROOT))
    return ["--ds_config", DS_CONFIG, "--config", base, *plan.overrides]


def evaluations(settings: Settings) -> dict[str, list[str]]:
    """By name: script and flags of each evaluation, except checkpoint and output; of a cell's settings."""
    return {name: evaluation_command(entry) for name, entry in settings["evaluations"].items()}


def evaluation_command(settings: Settings) -> list[str]:
    """The script and flags of one evaluation, as experiments/settings.py describes it."""
    script = {
        "reasoning": ["eval/reasoning.py", "--log_samples"],
        "thoughts": ["eval/thoughts.py", "--log_samples"],
        "perplexity": ["eval/perplexity.py", "--data", DATA],
        "few_shot": ["eval/run.py"],
    }[settings["kind"]]
    names = {"task": "tasks"} if settings["kind"] == "few_shot" else {}
    flags = [(f"--{names.get(key, key)}", _flag(value)) for key, value in settings.items() if key != "kind"]
    return [*script, *chain.from_iterable(flags)]


def _flag(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{key}={option}" for key, option in value.items())
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
