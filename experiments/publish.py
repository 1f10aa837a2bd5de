"""Adds the finished cells of a run folder to the committed records, one file per matrix.

    python experiments/publish.py --runs runs/experiments/quick [--out experiments/results]

RUNS is the --out of experiments/run.py. The first line of OUT/NAME.jsonl names the matrix and all its cells;
their records follow, one per line and in the same order (experiments/record.py says what is in them). The run
folder's record replaces one that is there already.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from common.errors import user_errors
from common.files import write_file
from experiments.record import MATRIX_CELLS, RECORD, MatrixCells
from experiments.reporting.records import Record, read_cell, read_matrix_cells, read_records

RESULTS = Path(__file__).parent / "results"


def publish(runs: Path, out: Path) -> dict[Path, int]:
    """The files written, and how many records each took from the run folder.

    Raises:
        ValueError: one line; there is nothing to publish, a record is damaged, or OUT has a record of a cell
            that the matrix no longer has.
    """
    written = {}
    for listed in sorted(runs.glob(f"*{MATRIX_CELLS}")):
        matrix = read_matrix_cells(listed)
        target = out / f"{matrix.matrix}.jsonl"
        stored = read_records(target)[1] if target.is_file() else []
        paths = [runs / "cells" / cell / RECORD for cell in matrix.cells]
        new = [read_cell(path) for path in paths if path.is_file()]
        records = {record["cell"]: record for record in [*stored, *new]}
        strange = sorted(set(records) - set(matrix.cells))
        if strange:
            raise ValueError(
                f"{target} has {len(strange)} records of cells that the matrix no longer has, the first "
                f"{strange[0]}; remove their lines or restore the matrix"
            )
        if new:
            write_records(target, matrix, [records[cell] for cell in matrix.cells if cell in records])
            written[target] = len(new)
    if not written:
        if (runs / "results.json").is_file():
            raise ValueError(
                f"--runs {runs} is a latent_cot matrix, whose results are in results.json and table.md; only "
                "matrices of groups write records to publish"
            )
        raise ValueError(f"--runs {runs} holds no finished cell; give the --out of experiments/run.py")
    return written


def write_records(path: Path, matrix: MatrixCells, records: list[Record]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(json.dumps(line) + "\n" for line in (asdict(matrix), *records)).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description="Add a run folder's finished cells to the records.")
    parser.add_argument("--runs", type=Path, required=True, help="the --out of experiments/run.py")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of NAME.jsonl (default: %(default)s)"
    )
    arguments = parser.parse_args()
    with user_errors(ValueError, OSError):
        for path, count in publish(arguments.runs, arguments.out).items():
            print(f"written: {path}, {count} records from {arguments.runs}")


if __name__ == "__main__":
    main()
