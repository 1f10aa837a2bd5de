"""The records of finished cells, and which cells of a matrix are missing or have failed."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from experiments.groups import GROUPS
from experiments.record import FAILED, RECORD

Record = dict[str, Any]  # experiments/record.py says what is in it
NAMES = ("matrix", "cell", "group", "task", "size", "seed", "budget", "examples", "parameters")


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
    records: list[Record] = field(default_factory=list)  # of the groups themselves
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

    records: list[tuple[str, Record]] = field(default_factory=list)  # each with where it is
    failed: dict[str, str] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)


def read_runs(sources: Sequence[Path]) -> Runs:
    """Everything in files of records and below run folders; the order of the sources does not matter.

    Args:
        sources: NAME.jsonl of experiments/publish.py, or the --out of experiments/run.py.

    Raises:
        ValueError, FileNotFoundError: one line; no cells at all, a damaged record, or a cell found twice.
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
    for path in sorted(source.rglob(RECORD)):
        found.records.append((str(path), read_cell(path)))
    for path in sorted(source.rglob(FAILED)):
        entry = _read(path, ("cell", "problem"))
        found.failed[entry["cell"]] = entry["problem"]
    for path in sorted(source.rglob("*.matrix.json")):
        cells = _read(path, ("cells",))["cells"]
        found.missing |= {cell for cell in cells if not (path.parent / "cells" / cell / RECORD).is_file()}
    return found


def read_records(path: Path) -> tuple[list[str], list[Record]]:
    """The names of all cells of a matrix, and the records of those that are done.

    Args:
        path: JSON lines: first {"matrix": NAME, "cells": [NAMES]}, then a record per line.

    Raises:
        ValueError: a line is damaged or lacks a key; the message names it.
    """
    lines = path.read_bytes().splitlines()
    head, *records = (
        _entry(f"{path}, line {number}", line, ("matrix", "cells") if number == 1 else NAMES, "restore it")
        for number, line in enumerate(lines or [b""], 1)
    )
    return head["cells"], records


def _variant_order(variant: Mapping[str, Any] | None) -> tuple[str, float, str]:
    """Numbers by their value: as text 0.01 would come before 0.0."""
    ((key, value),) = (variant or {"": None}).items()
    return key, float(value) if isinstance(value, int | float) else math.inf, json.dumps(value)


def read_cell(path: Path) -> Record:
    """A cell.json. Raises ValueError, one line, if it is damaged or lacks a key."""
    return _read(path, NAMES)


def _read(path: Path, keys: Iterable[str]) -> Record:
    return _entry(str(path), path.read_bytes(), keys, "remove it and run its cell again")


def _entry(where: str, text: bytes, keys: Iterable[str], fix: str) -> Record:
    try:
        found = json.loads(text)
        lacking = [key for key in keys if key not in found]
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError):
        raise ValueError(f"{where} is damaged; {fix}") from None
    if lacking:
        raise ValueError(f"{where} has no {', '.join(lacking)}; {fix}")
    return dict(found)


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
    """None if it was not measured; may be NaN or infinite. Without a loop it is the same at all steps."""
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
