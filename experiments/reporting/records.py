"""The records of finished cells, and which cells of a matrix are missing or have failed."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from common.schema import from_plain
from experiments.groups import GROUPS
from experiments.jobs import cell_folder
from experiments.record import FAILED, MATRIX_CELLS, RECORD, CellRecord, FailedCell, MatrixCells

T = TypeVar("T")
Record = dict[str, Any]  # a CellRecord as it is stored
RESTORE, RUN_AGAIN = "restore it", "remove it and run its cell again"


class Setting(NamedTuple):
    """What cells must share to be compared."""

    task: str
    size: str
    budget: str
    examples: int

    def __str__(self) -> str:
        return f"{self.task}, {self.size}, {budget_text(self.budget)}{examples_text(self.examples)}"


@dataclass
class Runs:
    """What the report is made from."""

    records: list[Record] = field(default_factory=list)  # of groups as they are
    studies: list[Record] = field(default_factory=list)  # of cells that vary something
    sweep: int = 0  # cells that only chose a learning rate
    failed: dict[str, str] = field(default_factory=dict)  # cell -> what went wrong
    missing: list[str] = field(default_factory=list)


def budget_text(budget: str) -> str:
    steps, of, group = budget.partition("-flops-of-")
    return f"the training FLOPs of {group} in {steps} steps" if of else f"{steps} steps"


def examples_text(examples: int) -> str:
    return f", {examples:,} examples" if examples else ""


@dataclass
class _Found:
    """What one --runs holds."""

    records: list[tuple[str, Record]] = field(default_factory=list)  # each with its location
    failed: dict[str, str] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)


def read_runs(sources: Sequence[Path]) -> Runs:
    """Everything in files of records and below run folders; the order of the sources does not matter.

    Args:
        sources: NAME.jsonl of experiments/publish.py, or the --out of experiments/run.py.

    Raises:
        ValueError: no cells at all, a damaged file of records, or a cell found twice. A damaged cell.json is
            one of the failed cells.
        FileNotFoundError: a source does not exist.
    """
    runs, locations = Runs(), dict[tuple[Any, ...], str]()
    missing: set[str] = set()
    for source in sources:
        found = _found(source)
        for where, record in found.records:
            _add(runs, locations, where, record)
        runs.failed |= found.failed
        missing |= found.missing
    if not locations:
        raise ValueError(
            f"--runs {' '.join(map(str, sources))}: no {RECORD} below; give the --out of experiments/run.py"
        )
    runs.missing = sorted(missing - set(runs.failed))
    runs.failed = dict(sorted(runs.failed.items()))
    for records in (runs.records, runs.studies):
        records.sort(
            key=lambda r: (*setting_of(r), _order(r["group"]), *_variant_order(r.get("variant")), r["seed"])
        )
    return runs


def _found(source: Path) -> _Found:
    if source.is_file():
        cells, records = read_records(source)
        missing = set(cells) - {record["cell"] for record in records}
        return _Found([(str(source), record) for record in records], missing=missing)
    if not source.is_dir():
        raise FileNotFoundError(
            f"--runs {source} does not exist: give the --out of experiments/run.py or a file of records"
        )
    found = _Found()
    for path in sorted(source.rglob(f"*{MATRIX_CELLS}")):
        for cell in read_matrix_cells(path).cells:
            if not (cell_folder(cell, path.parent) / RECORD).is_file():
                found.missing.add(cell)
    for path in sorted(source.rglob(RECORD)):
        try:
            found.records.append((str(path), read_cell(path)))
        except ValueError as error:
            found.failed[_cell_name(path)] = str(error)
    for path in sorted(source.rglob(FAILED)):
        try:
            entry = read_failed(path)
            found.failed[entry.cell] = entry.problem
        except ValueError as error:
            found.failed[_cell_name(path)] = str(error)
    return found


def read_records(path: Path) -> tuple[list[str], list[Record]]:
    """The names of all cells of a matrix, and the records of those that are done.

    Args:
        path: JSON lines: first a MatrixCells, then a CellRecord per line.

    Raises:
        ValueError: a line is damaged, lacks a key or has a value of a wrong type; the message names it.
    """
    head, *lines = path.read_bytes().splitlines() or [b""]
    cells = _parsed(MatrixCells, head, f"{path}, line 1", RESTORE).cells
    return cells, [
        _checked_record(line, f"{path}, line {number}", RESTORE) for number, line in enumerate(lines, 2)
    ]


def _variant_order(variant: Mapping[str, Any] | None) -> tuple[str, float, str]:
    """Sorts numbers by value: as text, 0.01 would come before 0.0."""
    ((key, value),) = (variant or {"": None}).items()
    return key, float(value) if isinstance(value, int | float) else math.inf, json.dumps(value)


def read_cell(path: Path) -> Record:
    """A cell.json. Raises ValueError if it is damaged, lacks a key or has a value of a wrong type."""
    return _checked_record(path.read_bytes(), str(path), RUN_AGAIN)


def read_matrix_cells(path: Path) -> MatrixCells:
    """A NAME.matrix.json. Raises ValueError, one line, if it is damaged."""
    return _read(MatrixCells, path)


def read_failed(path: Path) -> FailedCell:
    """A cell's failed.json. Raises ValueError, one line, if it is damaged."""
    return _read(FailedCell, path)


def _checked_record(text: bytes, where: str, fix: str) -> Record:
    _parsed(CellRecord, text, where, fix)
    return dict(json.loads(text))


def _read(kind: type[T], path: Path) -> T:
    return _parsed(kind, path.read_bytes(), str(path), RUN_AGAIN)


def _parsed(kind: type[T], text: bytes, where: str, fix: str) -> T:
    try:
        return from_plain(kind, json.loads(text), f"{where}: ")
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError(f"{where} is damaged; {fix}") from None
    except ValueError as error:
        line = str(error) if where in str(error) else f"{where}: {error}"
        raise ValueError(f"{line}; {fix}") from None


def _cell_name(path: Path) -> str:
    """The cell of a file in OUT/cells/CELL."""
    parts = path.parent.parts
    return "/".join(parts[parts.index("cells") + 1 :]) if "cells" in parts else str(path.parent)


def _add(runs: Runs, locations: dict[tuple[Any, ...], str], where: str, record: Record) -> None:
    key = (record["cell"], record["examples"])
    if key in locations:
        raise ValueError(
            f"cell {record['cell']} is in {locations[key]} and {where}: give --runs only one of them"
        )
    locations[key] = where
    if "@lr=" in record["cell"]:
        runs.sweep += 1
    else:
        (runs.studies if record.get("variant") else runs.records).append(record)


def _order(group: str) -> int:
    return list(GROUPS).index(group) if group in GROUPS else len(GROUPS)


def setting_of(record: Record) -> Setting:
    return Setting(record["task"], record["size"], record["budget"], record["examples"])


def settings_of(records: Sequence[Record]) -> dict[Setting, dict[str, list[Record]]]:
    """By setting and group, one record per seed."""
    found: dict[Setting, dict[str, list[Record]]] = {}
    for record in records:
        found.setdefault(setting_of(record), {}).setdefault(record["group"], []).append(record)
    return found


def steps_of(record: Record, steps: str | int = "trained") -> str:
    """`trained`, `2R` or a number, as a key of a record."""
    trained = int(record["trained_steps"])
    return str({"trained": trained, "2R": 2 * trained}.get(str(steps), steps))


def value_of(record: Record, metric: str, steps: str | int = "trained") -> float | None:
    """None if not measured; may be NaN or infinite. Without a loop the value is the same at all steps."""
    found = record.get(metric)
    if isinstance(found, dict):
        if record["trained_steps"] == 1 and len(found) == 1:
            (found,) = found.values()
        else:
            found = found.get(steps_of(record, steps))
    return None if found is None else float(found)


def values_of(records: Sequence[Record], metric: str, steps: str | int = "trained") -> list[float]:
    """The finite values of those that were measured."""
    found = (value_of(record, metric, steps) for record in records)
    return [value for value in found if value is not None and math.isfinite(value)]


def most_steps(records: Sequence[Record], metric: str = "accuracy") -> int:
    """The most steps with which all of these were tested."""
    tested = [set(map(int, record.get(metric) or {"1": 0})) for record in records]
    return max(set.intersection(*tested), default=1)
