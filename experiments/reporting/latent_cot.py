"""The results of a matrix of latent chain of thought: results.json, table.md and pictures."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.files import replacing, write_file, write_json
from eval.reports.runs import read_runs
from eval.reports.thoughts import Arm, figures, read_arms, tables
from eval.scoring.results import format_table
from experiments.jobs import cell_folder
from experiments.latent_cot import LatentCotMatrix


def write_results(matrix: LatentCotMatrix, out: Path, jobs: int, failed: Mapping[str, str]) -> None:
    """Covers every evaluated cell, including those that failed later.

    Args:
        jobs: how many cells ran at once.
        failed: cell -> why.

    Raises:
        ValueError: no cell was evaluated.
    """
    folders = [cell_folder(cell.name, out) for cell in matrix.cells]
    folders = [folder for folder in folders if any(folder.glob("eval/results_*.json"))]
    if not folders:
        raise ValueError(f"no cell was evaluated: {'; '.join(f'{n}: {p}' for n, p in failed.items())}")
    file = matrix.file
    settings = {
        "task": file.latent_cot,
        "num_documents": file.examples,
        "teacher_steps": file.teacher_steps,
        "student_steps": file.student_steps,
        "overrides": file.training,
        "jobs": jobs,
    }
    arms = read_arms(read_runs(folders)[0]).get(file.latent_cot, [])
    report = {"settings": settings, "failed": failed, "arms": {arm.name: arm_record(arm) for arm in arms}}
    write_json(out / "results.json", report)
    text = (
        f"{matrix.task.about}; "
        f"teachers {file.teacher_steps:,} steps, then every method {file.student_steps:,}. "
        "± one standard error: for one seed over its questions, for several over the seeds. Milliseconds: "
        f"one thread, with up to {jobs - 1} other cells running.\n"
    )
    for table in tables(file.latent_cot, arms):
        text += f"\n## {table.title}\n\n{format_table(table.header, table.rows)}\n"
    text += "".join(f"\nFailed: {name}: {problem}\n" for name, problem in failed.items())
    write_file(out / "table.md", text.encode())
    for name, figure in figures(file.latent_cot, arms).items():
        with replacing(out / f"{name}.png") as path:
            figure.savefig(path, format="png", dpi=110)
    print(text)
    print(f"written: {out / 'results.json'}, table.md and pictures")


def arm_record(arm: Arm) -> dict[str, Any]:
    """One method as JSON: for each way of answering, its seeds."""
    ways = [{**way._asdict(), "runs": [asdict(one) for one in found]} for way, found in arm.ways.items()]
    return {"trained": arm.trained, "own": arm.own._asdict(), "ways": ways}
