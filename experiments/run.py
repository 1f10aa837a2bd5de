"""Runs a matrix of experiments: every cell is an ordinary training run and its evaluation.

    python experiments/run.py --matrix experiments/quick.yaml [--out DIR] [--jobs N] [--cells PATTERN]
    python experiments/run.py --matrix experiments/quick.yaml --list
    python experiments/run.py --matrix experiments/standard.yaml --out DIR --index I

Cells lie in DIR/cells/TASK/SIZE/BUDGET/GROUP/SEED with a cell.json when they are done (experiments/record.py
says what is in it), data in DIR/data. Started again, it goes on where it was. A cell that fails is reported
with its log and costs no other. slurm/experiments.sbatch gives --index to the jobs of an array. A sweep
(learning_rates is a list) ends by writing experiments/learning_rates.yaml: for each group the rate of the
lowest validation loss.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import yaml

from common.errors import user_errors
from common.files import write_json
from experiments.cells import folder_of, run_cell
from experiments.jobs import run_all
from experiments.matrix import RATES, Matrix, Plan, rate_key, read_matrix
from experiments.record import RECORD

HEAD = (
    "# Peak learning rate of every group on every task and size: of those of experiments/sweep.yaml the one\n"
    "# with the lowest validation loss. Written by experiments/run.py --matrix experiments/sweep.yaml.\n"
)


def choose_rates(plans: Sequence[Plan], out: Path) -> dict[str, dict[str, float]]:
    """The rate of the lowest validation loss, mean over the seeds, of every group with all its cells done."""
    losses: dict[tuple[str, str], dict[float, list[float | None]]] = {}
    for plan in plans:
        cell, path = plan.cell, folder_of(plan, out) / RECORD
        loss = json.loads(path.read_text())["validation_loss"] if path.is_file() else None
        place = losses.setdefault((rate_key(cell.task, cell.size), cell.group), {})
        place.setdefault(cell.learning_rate, []).append(loss)
    chosen: dict[str, dict[str, float]] = {}
    for (task, group), by_rate in losses.items():
        sums = {rate: sum(loss for loss in found if loss is not None) for rate, found in by_rate.items()}
        finite = {rate: loss for rate, loss in sums.items() if math.isfinite(loss)}  # not what diverged
        if finite and not any(None in found for found in by_rate.values()):
            chosen.setdefault(task, {})[group] = min(finite, key=lambda rate: finite[rate])
    return chosen


def write_rates(chosen: dict[str, dict[str, float]], path: Path) -> None:
    """Adds to what is there."""
    there = (yaml.safe_load(path.read_text()) or {}) if path.is_file() else {}
    for task, rates in chosen.items():
        there[task] = {**there.get(task, {}), **rates}
    path.write_text(HEAD + yaml.safe_dump(there))


def run_matrix(matrix: Matrix, plans: Sequence[Plan], out: Path, jobs: int, rates: Path) -> dict[str, str]:
    """Runs cells, `jobs` at once; what failed, and why."""
    names = [plan.cell.name for plan in matrix.plans]
    write_json(out / f"{matrix.name}.matrix.json", {"matrix": matrix.name, "cells": names})
    failed = run_all({plan.cell.name: partial(run_cell, plan, matrix, out) for plan in plans}, jobs)
    print(f"{len(plans) - len(failed)} of {len(plans)} cells done, in {out}")
    for name, problem in failed.items():
        print(f"failed: {name}: {problem}")
    if matrix.is_sweep:
        chosen = choose_rates(matrix.plans, out)
        write_rates(chosen, rates)
        print(f"written: {rates}, {sum(map(len, chosen.values()))} rates")
    return failed


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run a matrix of experiments.")
    add = parser.add_argument
    add("--matrix", type=Path, required=True, help="YAML of the matrix, see experiments/")
    add("--out", type=Path, help="folder of data and cells (default: runs/experiments/NAME)")
    add("--jobs", type=int, default=1, help="cells at once, one thread each (default: 1)")
    add("--cells", metavar="PATTERN", help="only those whose names match, e.g. 'p_hop/*/loop/*'")
    add("--list", action="store_true", help="name the cells with their numbers, and stop")
    add("--index", type=int, metavar="I", help="only cell number I, from 0, of those that --list names")
    add("--rates", type=Path, default=RATES, help="what a sweep writes (default: learning_rates.yaml here)")
    return parser.parse_args()


def select(arguments: argparse.Namespace, matrix: Matrix) -> list[Plan]:
    """The plans asked for. Raises ValueError for an impossible number or a pattern of none."""
    if arguments.jobs < 1:
        raise ValueError(f"--jobs {arguments.jobs} must be at least 1")
    plans = matrix.chosen(arguments.cells)
    if arguments.index is None:
        return plans
    if not 0 <= arguments.index < len(plans):
        raise ValueError(
            f"--index {arguments.index} must be from 0 to {len(plans) - 1}, of {len(plans)} cells"
        )
    return [plans[arguments.index]]


def main() -> None:
    arguments = parse()
    with user_errors(ValueError, OSError):
        matrix = read_matrix(arguments.matrix)
        plans = select(arguments, matrix)
        if arguments.list:
            for number, plan in enumerate(plans):
                print(f"{number}\t{plan.cell.name}\t{plan.max_steps} steps")
            return
        out = arguments.out or Path("runs/experiments") / matrix.name
        failed = run_matrix(matrix, plans, out, arguments.jobs, arguments.rates)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
