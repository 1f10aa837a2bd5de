"""The job of a cell in a matrix of groups: the arguments of its training and its evaluations."""

from pathlib import Path

from experiments.groups import GROUPS
from experiments.jobs import DATA, ROOT, Data, Job, cell_folder
from experiments.matrix import BASE, Matrix, PlannedCell
from experiments.record import make_record


def job_of(plan: PlannedCell, matrix: Matrix, out: Path) -> Job:
    """All that is run for a cell; the record comes last."""
    return Job(
        name=plan.cell.name,
        max_steps=plan.max_steps,
        script="pretrain/main.py" if plan.method is None else "distill/main.py",
        training=tuple(training(plan)),
        data=Data(plan.data_name, plan.task.recipe, plan.data),
        evaluations=evaluations(plan, evaluate=not matrix.is_sweep),
        record=lambda folder: make_record(plan, matrix, folder, command(plan, matrix, out)),
    )


def folder_of(plan: PlannedCell, out: Path) -> Path:
    return cell_folder(plan.cell.name, out)


def training(plan: PlannedCell) -> list[str]:
    """Arguments of the training script, except data.path and output_dir."""
    base = str(BASE.relative_to(ROOT))
    return ["--ds_config", "ds_configs/zero1.json", "--config", base, *plan.overrides]


def evaluations(plan: PlannedCell, evaluate: bool) -> dict[str, list[str]]:
    """By name: script and flags of each evaluation, except checkpoint and output."""
    if not evaluate:
        return {}
    spec, task = plan.task.evaluation, plan.task
    looped = plan.model.recurrence.placement != "none"
    trained = plan.model.recurrence.num_steps
    steps = ",".join(map(str, sorted({*spec.steps, trained})))
    batch = ["--batch_size", str(spec.batch_size)]
    if task.kind == "text":
        depths = ["--depth", steps] if looped else []
        limit = ["--limit", str(spec.limit), *batch]
        tests = {"main": ["eval/perplexity.py", "--data", DATA, *depths, *limit]}
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
    tests = {"main": [*own, *(["--steps", steps] if looped else [])]}
    for name, options in task.gaps.items():
        at = ["--steps", str(trained)] if looped else []
        tests[f"gap {name}"] = ["--task_options", options, *at]
    return {name: ["eval/reasoning.py", *questions, *flags] for name, flags in tests.items()}


def command(plan: PlannedCell, matrix: Matrix, out: Path) -> str:
    """The command that runs this cell alone, from the root of the repository."""
    path = matrix.path.resolve()
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else matrix.path
    return f"python experiments/run.py --matrix {shown} --out {out} --cells '{plan.cell.name}'"
