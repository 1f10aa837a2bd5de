"""Runs a matrix of experiments: every cell is an ordinary training run and its evaluations.

    python experiments/run.py --matrix quick [--out DIR] [--jobs N] [--cells PATTERN]
    python experiments/run.py --matrix quick --list
    python experiments/run.py --matrix standard --out DIR --index I

--matrix is a file, or the name of one in experiments/matrices. Cells lie in DIR/cells/NAME, data in DIR/data.
Started again, the same command resumes; a folder made with other settings is refused. A cell that fails is
reported with its log and costs only the cells that start from its export. slurm/experiments.sbatch gives
--index to the jobs of an array. There are three kinds of matrix:

- groups (experiments/matrix_file.py): a finished cell TASK/SIZE/BUDGET/GROUP/SEED has a cell.json
  (experiments/record.py lists its keys); experiments/publish.py adds those of DIR to the committed records.
  A sweep (learning_rates is a list) ends by writing experiments/learning_rates.yaml: for each group the rate
  of the lowest validation loss.
- methods of latent chain of thought (experiments/latent_cot.py): cells METHOD-SEED, which start from the cell
  teacher-SEED; --cells and --index run the teachers they need as well. It ends by writing DIR/results.json,
  table.md and pictures; `python eval/report.py DIR/cells/*-[0-9]` makes a page.
- conversions of a pretrained model (experiments/retrofit.py): one cell per group of conversions. It ends by
  writing DIR/results.json and table.md.
"""

import argparse
import fnmatch
import math
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

import yaml

from common.errors import user_errors
from common.files import write_file, write_json
from experiments.cells import folder_of, job_of
from experiments.jobs import Job, cell_folder, locked, run_all, run_job, stop_commands
from experiments.latent_cot import LatentCotMatrix, is_latent_cot, read_latent_cot
from experiments.matrix import Matrix, PlannedCell, read_matrix
from experiments.matrix_file import RATES, find_matrix, rate_key
from experiments.record import FAILED, MATRIX_CELLS, RECORD, MatrixCells
from experiments.reporting.latent_cot import write_results as write_latent_cot
from experiments.reporting.records import read_cell, read_failed
from experiments.retrofit import RetrofitMatrix, is_retrofit, read_retrofit
from experiments.retrofit import write_results as write_retrofit
from experiments.tasks import read_yaml

HEAD = (
    "# Peak learning rate of every group on every task and size: the one with the lowest validation loss in\n"
    "# experiments/matrices/sweep.yaml. Written by experiments/run.py --matrix sweep.\n"
)


def choose_rates(plans: Sequence[PlannedCell], out: Path) -> dict[str, dict[str, float]]:
    """The rate of the lowest validation loss (mean over seeds), for every group whose cells are all done."""
    losses: dict[tuple[str, str], dict[float, list[float | None]]] = {}
    for plan in plans:
        cell, path = plan.cell, folder_of(plan, out) / RECORD
        loss = read_cell(path)["validation_loss"] if path.is_file() else None
        by_rate = losses.setdefault((rate_key(cell.task, cell.size), cell.group), {})
        by_rate.setdefault(cell.learning_rate, []).append(loss)
    chosen: dict[str, dict[str, float]] = {}
    for (task, group), by_rate in losses.items():
        sums = {rate: sum(loss for loss in found if loss is not None) for rate, found in by_rate.items()}
        finite = {rate: loss for rate, loss in sums.items() if math.isfinite(loss)}  # not what diverged
        if finite and not any(None in found for found in by_rate.values()):
            chosen.setdefault(task, {})[group] = min(finite, key=lambda rate: finite[rate])
    return chosen


def write_rates(chosen: dict[str, dict[str, float]], path: Path) -> None:
    """Merges the chosen rates into the file; two sweeps at once lose none."""
    with locked(path.with_name(f".{path.name}.lock")):
        there = read_yaml(path) if path.is_file() and path.stat().st_size else {}
        for task, rates in chosen.items():
            there[task] = {**there.get(task, {}), **rates}
        write_file(path, (HEAD + yaml.safe_dump(there)).encode())


AnyMatrix = Matrix | LatentCotMatrix | RetrofitMatrix


def read(path: Path) -> AnyMatrix:
    """Raises ValueError or FileNotFoundError, one line, for a mistake in the file."""
    values = read_yaml(path)
    if is_retrofit(values):
        return read_retrofit(path)
    return read_latent_cot(path) if is_latent_cot(values) else read_matrix(path)


def jobs_of(matrix: AnyMatrix) -> list[Job]:
    """One per cell, in starting order."""
    if isinstance(matrix, RetrofitMatrix):
        return matrix.jobs()
    if isinstance(matrix, LatentCotMatrix):
        return [matrix.job(cell) for cell in matrix.cells]
    return [job_of(plan, matrix) for plan in matrix.plans]


def select(jobs: Sequence[Job], pattern: str | None = None, index: int | None = None) -> list[Job]:
    """The jobs whose names match a glob pattern, or the one numbered `index` among them.

    Raises:
        ValueError: no name matches, or there is no such number.
    """
    found = [job for job in jobs if pattern is None or fnmatch.fnmatchcase(job.name, pattern)]
    if not found:
        raise ValueError(f"--cells {pattern}: none of {len(jobs)} cells matches; --list names them")
    if index is None:
        return found
    if not 0 <= index < len(found):
        raise ValueError(f"--index {index} must be from 0 to {len(found) - 1}, of {len(found)} cells")
    return [found[index]]


def with_teachers(chosen: Sequence[Job], jobs: Sequence[Job]) -> list[Job]:
    """The chosen jobs and the jobs they start from, in starting order."""
    wanted = {job.name for job in chosen} | {job.teacher for job in chosen}
    return [job for job in jobs if job.name in wanted]


def run_jobs(jobs: Sequence[Job], out: Path, at_once: int) -> dict[str, str]:
    """Runs jobs, `at_once` in parallel; returns the failed ones and why."""
    after = {job.name: job.teacher for job in jobs if job.teacher is not None}
    failed = run_all({job.name: partial(run_job, job, out) for job in jobs}, at_once, after)
    print(f"{len(jobs) - len(failed)} of {len(jobs)} cells done, in {out}")
    for name, problem in failed.items():
        print(f"failed: {name}: {problem}")
    return failed


def conclude(matrix: AnyMatrix, out: Path, at_once: int, failed: Mapping[str, str], rates: Path) -> None:
    """Writes what summarises all cells of the matrix.

    Raises:
        ValueError: no cell of a matrix of latent chain of thought was evaluated.
    """
    if isinstance(matrix, RetrofitMatrix):
        write_retrofit(matrix, out, failed)
    elif isinstance(matrix, LatentCotMatrix):
        paths = [cell_folder(cell.name, out) / FAILED for cell in matrix.cells]
        before = [read_failed(path) for path in paths if path.is_file()]
        stored = {entry.cell: entry.problem for entry in before}  # by other jobs of a SLURM array
        write_latent_cot(matrix, out, at_once, {**stored, **failed})
    elif matrix.is_sweep:
        chosen = choose_rates(matrix.plans, out)
        write_rates(chosen, rates)
        print(f"written: {rates}, {sum(map(len, chosen.values()))} rates")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run a matrix of experiments.")
    add = parser.add_argument
    add("--matrix", required=True, help="a YAML file, or the name of one in experiments/matrices, e.g. quick")
    add("--out", type=Path, help="folder of data and cells (default: runs/experiments/NAME)")
    add("--jobs", type=int, default=1, help="cells at once, one thread each (default: 1)")
    add("--cells", metavar="PATTERN", help="only cells whose names match, e.g. 'p_hop/*/loop/*'")
    add("--list", action="store_true", help="list the cells with their numbers, and stop")
    add("--index", type=int, metavar="I", help="only cell number I, from 0, of those that --list names")
    add(
        "--rates",
        type=Path,
        default=RATES,
        help="file that a sweep writes (default: experiments/learning_rates.yaml)",
    )
    return parser.parse_args()


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Ends the commands that run; Ctrl-C and SIGTERM call it."""
    print("stopping: cells that train save a checkpoint; the same command resumes", file=sys.stderr)
    stop_commands()
    sys.exit(128 + number)


def main() -> None:
    arguments = parse()
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    with user_errors(ValueError, OSError):
        if arguments.jobs < 1:
            raise ValueError(f"--jobs {arguments.jobs} must be at least 1")
        matrix = read(find_matrix(arguments.matrix))
        out = arguments.out or Path("runs/experiments") / matrix.name
        jobs = jobs_of(matrix)
        chosen = select(jobs, arguments.cells, arguments.index)
        if arguments.list:
            for number, job in enumerate(chosen):
                print(f"{number}\t{job.name}\t{job.max_steps} steps")
            return
        names = MatrixCells(matrix.name, [job.name for job in jobs])
        with locked(out / "lock"):
            write_json(out / f"{matrix.name}{MATRIX_CELLS}", asdict(names))
        failed = run_jobs(with_teachers(chosen, jobs), out, arguments.jobs)
        with locked(out / "lock"):
            conclude(matrix, out, arguments.jobs, failed, arguments.rates)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
