"""The records of finished cells, and what of a matrix is missing or has failed."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from experiments.groups import GROUPS
from experiments.record import FAILED, RECORD

Record = dict[str, Any]  # experiments/record.py says what is in it
NAMES = ("matrix", "cell", "group", "task", "size", "seed", "budget", "examples", "command", "parameters")


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


def read_runs(folders: Sequence[Path]) -> Runs:
    """Everything below the folders; what is found does not depend on their order.

    Raises:
        ValueError, FileNotFoundError: one line; no cells at all, a damaged record, or a cell found twice.
    """
    runs, places = Runs(), dict[tuple[Any, ...], Path]()
    wanted: set[tuple[str, Path]] = set()
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"--runs {folder} is no folder: give the --out of experiments/run.py")
        for path in sorted(folder.rglob(RECORD)):
            _add(runs, places, path)
        for path in sorted(folder.rglob(FAILED)):
            found = _read(path, ("cell", "problem"))
            runs.failed[found["cell"]] = found["problem"]
        for path in sorted(folder.rglob("*.matrix.json")):
            cells = _read(path, ("cells",))["cells"]
            wanted |= {(cell, path.parent / "cells" / cell) for cell in cells}
    if not places:
        raise ValueError(
            f"--runs {' '.join(map(str, folders))}: no {RECORD} below; experiments/run.py writes"
        )
    runs.missing = sorted({name for name, at in wanted if not (at / RECORD).is_file()} - set(runs.failed))
    runs.failed = dict(sorted(runs.failed.items()))
    for records in (runs.records, runs.studies):
        records.sort(
            key=lambda r: (*setting_of(r), _order(r["group"]), *_variant_order(r.get("variant")), r["seed"])
        )
    return runs


def _variant_order(variant: Mapping[str, Any] | None) -> tuple[str, float, str]:
    """Numbers by their value: as text 0.01 would stand before 0.0."""
    ((key, value),) = (variant or {"": None}).items()
    return key, float(value) if isinstance(value, int | float) else math.inf, json.dumps(value)


def _read(path: Path, keys: Iterable[str]) -> Record:
    try:
        found = json.loads(path.read_text())
        lacking = [key for key in keys if key not in found]
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError):
        raise ValueError(f"{path} is damaged; remove it and run its cell again") from None
    if lacking:
        raise ValueError(f"{path} has no {', '.join(lacking)}; remove it and run its cell again")
    return dict(found)


def _add(runs: Runs, places: dict[tuple[Any, ...], Path], path: Path) -> None:
    record = _read(path, NAMES)
    key = (record["cell"], record["examples"])
    if key in places:
        raise ValueError(
            f"cell {record['cell']} is in {places[key]} and {path}: give --runs only one of them"
        )
    places[key] = path
    if "@lr=" in record["cell"]:
        runs.sweep += 1
    else:
        (runs.studies if record.get("variant") else runs.records).append(record)


def _order(group: str) -> int:
    return list(GROUPS).index(group) if group in GROUPS else len(GROUPS)


def setting_of(record: Record) -> Setting:
    return Setting(record["task"], record["size"], record["budget"], record["examples"])


def settings_of(records: Sequence[Record]) -> dict[Setting, dict[str, list[Record]]]:
    """By setting and group, one record a seed."""
    found: dict[Setting, dict[str, list[Record]]] = {}
    for record in records:
        found.setdefault(setting_of(record), {}).setdefault(record["group"], []).append(record)
    return found


def steps_of(record: Record, steps: str | int = "trained") -> str:
    """`trained`, `2R` or a number, as the records' keys have it."""
    trained = int(record["trained_steps"])
    return str({"trained": trained, "2R": 2 * trained}.get(str(steps), steps))


def value_of(record: Record, metric: str, steps: str | int = "trained") -> float | None:
    """None if it was not measured; may be no number. Without a loop it is the same at all steps."""
    found = record.get(metric)
    if isinstance(found, dict):
        if record["trained_steps"] == 1 and len(found) == 1:
            (found,) = found.values()
        else:
            found = found.get(steps_of(record, steps))
    return None if found is None else float(found)


def values_of(records: Sequence[Record], metric: str, steps: str | int = "trained") -> list[float]:
    """Those that were measured."""
    found = (value_of(record, metric, steps) for record in records)
    return [value for value in found if value is not None and math.isfinite(value)]


def most_steps(records: Sequence[Record], metric: str = "accuracy") -> int:
    """The most steps that all of these were tested with."""
    tested = [set(map(int, record.get(metric) or {"1": 0})) for record in records]
    return max(set.intersection(*tested), default=1)
