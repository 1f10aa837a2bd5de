"""One cell: its data, its training, its evaluations, then its record."""

import fcntl
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.files import write_json
from experiments.groups import GROUPS
from experiments.jobs import ROOT, SETTINGS, call, changed_setting, train
from experiments.matrix import BASE, Matrix, Plan
from experiments.record import FAILED, RECORD, make_record


def folder_of(plan: Plan, out: Path) -> Path:
    return out / "cells" / plan.cell.name


def build_data(plan: Plan, out: Path) -> Path:
    """The folder of a plan's data, built unless it is there; who comes meanwhile, on any machine, waits.

    Raises:
        ValueError: the build failed; the line names its log.
    """
    folder = (out / "data" / plan.data_name).absolute()
    with _locked(folder.with_suffix(".lock")):
        keep_settings(folder.with_suffix(".json"), {"recipe": plan.task.recipe, "overrides": list(plan.data)})
        if not (folder / "manifest.json").is_file():
            recipe = f"data_pipeline/recipes/{plan.task.recipe}.yaml"
            command = (sys.executable, "data_pipeline/build.py", "--recipe", recipe, "--out", folder)
            call(folder.with_suffix(".log"), *command, *plan.data)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def training(plan: Plan) -> list[str]:
    """What the script that trains is told but for data.path and output_dir."""
    base = str(BASE.relative_to(ROOT))
    return ["--ds_config", "ds_configs/zero1.json", "--config", base, *plan.overrides]


def evaluations(plan: Plan, evaluate: bool, data: str = "DATA") -> dict[str, list[str]]:
    """By name, the script and flags of each evaluation but for checkpoint and output."""
    if not evaluate:
        return {}
    spec, task = plan.task.evaluation, plan.task
    looped = plan.model.recurrence.placement != "none"
    trained = plan.model.recurrence.num_steps
    steps = ",".join(map(str, sorted({*spec.steps, trained})))
    batch = ["--batch_size", str(spec.batch_size)]
    if task.kind == "text":
        depths = ["--num_steps", steps] if looped else []
        limit = ["--limit", str(spec.limit), *batch]
        tests = {"main": ["eval/perplexity.py", "--data", data, *depths, *limit]}
        if spec.few_shot is not None:
            shots = ",".join(map(str, spec.shots))
            tests["few-shot"] = ["eval/run.py", "--tasks", spec.few_shot, "--num_fewshot", shots, *limit]
        return tests
    questions = ["--task", str(spec.task), "--num_samples", str(spec.num_samples), "--log_samples", *batch]
    own = ["--task_options", spec.task_options]
    if task.kind == "traced":
        mode = "cot" if GROUPS[plan.cell.group].method == "cot" else "none"
        votes = ["--samples", str(spec.votes)] if mode == "cot" and spec.votes else []
        return {"main": ["eval/thoughts.py", "--mode", mode, *questions, *own, *votes]}
    tests = {"main": [*own, *(["--num_steps", steps] if looped else [])]}
    for name, options in task.gaps.items():
        at = ["--num_steps", str(trained)] if looped else []
        tests[f"gap {name}"] = ["--task_options", options, *at]
    return {name: ["eval/reasoning.py", *questions, *flags] for name, flags in tests.items()}


def keep_settings(path: Path, settings: dict[str, Any]) -> None:
    """Notes what a cell or its data are told. Raises ValueError where other settings are noted already."""
    changed = changed_setting(path, settings)
    if changed is not None:
        key, *values = changed
        before, now = _difference(*values)
        raise ValueError(
            f"{path.parent} holds what was made with {key} {before}, but {now} is asked for; give "
            "another --out or move it away"
        )
    if not path.is_file():
        write_json(path, settings)


def _difference(before: Any, now: Any) -> tuple[Any, Any]:
    """The first items in which two lists differ, else the two."""
    if isinstance(before, list) and isinstance(now, list):
        for a, b in zip(before, now, strict=False):
            if a != b:
                return a, b
    return before, now


def run_cell(plan: Plan, matrix: Matrix, out: Path) -> None:
    """All of a cell that is not there yet; its record is the last thing written.

    Raises:
        ValueError: something failed, and `failed.json` says what; the line names its log.
    """
    folder = folder_of(plan, out)
    tests = evaluations(plan, evaluate=not matrix.is_sweep)
    settings = {"training": training(plan), "data": list(plan.data), "evaluations": tests}
    keep_settings(folder / SETTINGS, settings)
    if (folder / RECORD).is_file():
        return
    try:
        data = build_data(plan, out)
        script = "pretrain/main.py" if plan.method is None else "distill/main.py"
        train(folder, script, *training(plan), f"data.path={data}")
        for name, (test, *flags) in evaluations(plan, not matrix.is_sweep, str(data)).items():
            _evaluate(folder, name, test, flags)
        write_json(folder / RECORD, make_record(plan, matrix, folder, command(plan, matrix, out)))
    except (ValueError, OSError) as error:
        write_json(folder / FAILED, {"cell": plan.cell.name, "problem": str(error)})
        raise
    (folder / FAILED).unlink(missing_ok=True)


def _evaluate(folder: Path, name: str, script: str, flags: Sequence[str]) -> None:
    where = folder / "eval" / name
    if list(where.glob("results_*.json")):
        return
    paths = ("--checkpoint", folder.absolute() / "export", "--output_path", where.absolute())
    call(folder / f"eval {name}.log", sys.executable, script, *paths, *flags)


def command(plan: Plan, matrix: Matrix, out: Path) -> str:
    """Runs this cell alone, from the root of the repository."""
    path = matrix.path.resolve()
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else matrix.path
    return f"python experiments/run.py --matrix {shown} --out {out} --cells '{plan.cell.name}'"
