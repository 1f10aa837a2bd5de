"""Tests the claims of CLAIMS.md on the records: units, equality checks, tests, verdicts."""

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from experiments.groups import GROUPS, Pair, unequal
from experiments.reporting.records import Record, Setting, settings_of, steps_of, value_of
from experiments.reporting.statistics import (
    ALPHA,
    MIN_PAIRS,
    Estimate,
    Floats,
    Interval,
    Rule,
    Verdict,
    decide,
    estimate,
    holm_adjusted,
    holm_levels,
    p_value,
)

CLAIMS = Path(__file__).parents[1] / "CLAIMS.md"
# The range of a metric; a difference of two lies within plus and minus its width.
LIMITS = {
    "accuracy": (0, 1),
    "ood_accuracy": (0, 1),
    "spearman_steps_depth": (-1, 1),
    "mean_steps_share": (0, 1),
}


@dataclass(frozen=True)
class Side:
    """A group at a number of steps: `trained`, `2R` or a number."""

    group: str
    steps: str

    def __str__(self) -> str:
        return self.group if self.steps == "trained" else f"{self.group} at {self.steps} steps"


@dataclass(frozen=True)
class Claim:
    """A heading of CLAIMS.md with its YAML block."""

    title: str
    text: str
    id: str
    metric: str
    tasks: tuple[str, ...]
    a: Side
    b: Side | None
    equal: str | None
    tolerance: float
    rule: Rule

    @property
    def sides(self) -> list[Side]:
        return [side for side in (self.a, self.b) if side is not None]


@dataclass(frozen=True)
class Unit:
    """One claim in one setting."""

    claim: Claim
    setting: Setting
    seeds: tuple[int, ...]  # the seeds compared
    commands: tuple[str, ...]
    sides: tuple[float, ...]  # means of a and b
    found: Estimate | None  # None: not tested, so undecided
    remark: str  # why it was not tested, or what was left out
    level: float = ALPHA
    adjusted: float = 1.0

    @property
    def interval(self) -> Interval | None:
        return None if self.found is None else self.found.interval(self.level)

    @property
    def verdict(self) -> Verdict:
        if self.found is None or self.interval is None:
            return "undecided"
        return decide(self.claim.rule, self.found.mean, self.interval)


def read_claims(path: Path = CLAIMS) -> list[Claim]:
    """All claims, in their order. Raises ValueError for a block that is not a valid claim."""
    parts = re.split(r"^## ", path.read_text(), flags=re.M)[1:]
    return [_claim(path, part) for part in parts if "```yaml" in part]


def _claim(path: Path, part: str) -> Claim:
    title, _, rest = part.partition("\n")
    text, block = re.fullmatch(r"(.*?)```yaml\n(.*?)```.*", rest, flags=re.S).groups()  # type: ignore[union-attr]
    values: dict[str, Any] = yaml.safe_load(block)
    where = f"{path.name}, claim {values.get('id', title)}"
    names = {
        "id",
        "metric",
        "tasks",
        "a",
        "b",
        "equal",
        "tolerance",
        "direction",
        "threshold",
        "minimum_effect",
    }
    unknown = set(values) - names
    lacking = {"id", "metric", "tasks", "a", "direction", "threshold"} - set(values)
    if unknown or lacking:
        raise ValueError(
            f"{where}: unknown or missing keys {', '.join(sorted(unknown | lacking))}; see the other claims"
        )
    if values["direction"] not in ("higher", "not_lower", "within"):
        raise ValueError(f"{where}: direction {values['direction']!r}; choose higher, not_lower or within")
    sides = [
        Side(side["group"], str(side["steps"])) for side in (values["a"], values.get("b")) if side is not None
    ]
    for side in sides:
        if side.group not in GROUPS:
            raise ValueError(f"{where}: unknown group {side.group!r}; choose from {', '.join(GROUPS)}")
    threshold = values["threshold"]
    rule = Rule(
        values["direction"],
        tuple(map(float, threshold)) if isinstance(threshold, list) else (float(threshold),),
        float(values.get("minimum_effect", 0.0)),
    )
    return Claim(
        title.strip(),
        " ".join(text.split()),
        values["id"],
        values["metric"],
        tuple(values["tasks"]),
        sides[0],
        sides[1] if len(sides) > 1 else None,
        values.get("equal"),
        float(values.get("tolerance", 0.0)),
        rule,
    )


def not_claimed(path: Path = CLAIMS) -> str:
    """The section on what is not claimed, as Markdown."""
    found = re.search(r"^## Not claimed\n(.*?)(?=^## |\Z)", path.read_text(), flags=re.S | re.M)
    return found[1].strip() if found else ""


def judge(claims: Sequence[Claim], records: Sequence[Record]) -> list[Unit]:
    """Every claim in every setting that has its task and groups, all tests corrected together."""
    settings = settings_of(records)
    units = [
        _unit(claim, setting, groups)
        for claim in claims
        for task in claim.tasks
        for setting, groups in settings.items()
        if setting.task == task and all(side.group in groups for side in claim.sides)
    ]
    tested = [unit for unit in units if unit.found is not None]
    values = [p_value(unit.claim.rule, unit.found) for unit in tested if unit.found is not None]
    corrected = zip(holm_levels(values), holm_adjusted(values), strict=True)
    return [unit if unit.found is None else _corrected(unit, *next(corrected)) for unit in units]


def _corrected(unit: Unit, level: float, adjusted: float) -> Unit:
    return replace(unit, level=level, adjusted=adjusted)


def claim_verdict(claim: Claim, units: Sequence[Unit]) -> Verdict:
    """The verdict that all its units share, if every task of the claim has one; else undecided."""
    own = [unit for unit in units if unit.claim.id == claim.id]
    verdicts = {unit.verdict for unit in own}
    if {unit.setting.task for unit in own} != set(claim.tasks) or len(verdicts) != 1:
        return "undecided"
    return verdicts.pop()


def _unit(claim: Claim, setting: Setting, groups: dict[str, list[Record]]) -> Unit:
    by_seed = [{r["seed"]: r for r in groups[side.group]} for side in claim.sides]
    seeds = sorted(set.intersection(*map(set, by_seed)))
    pairs = [tuple(side[seed] for side in by_seed) for seed in seeds]
    steps = [side.steps for side in claim.sides]
    values = [
        [value_of(record, claim.metric, at) for record, at in zip(pair, steps, strict=True)] for pair in pairs
    ]
    problem = _problem(claim, pairs, seeds, values)
    commands = dict.fromkeys(command_of(side[min(side)]) for side in by_seed)
    unit = Unit(claim, setting, tuple(seeds), tuple(commands), (), None, problem or _unpaired(claim, by_seed))
    if problem and not pairs or any(v is None or not math.isfinite(v) for row in values for v in row):
        return unit
    table = np.array(values, dtype=np.float64)  # (seeds, sides)
    unit = replace(unit, sides=tuple(map(float, table.mean(axis=0))))
    if problem:
        return unit
    effects = table[:, 0] - table[:, 1] if claim.b else table[:, 0]
    least, most = LIMITS.get(claim.metric, (-math.inf, math.inf))
    limits = Interval(least - most, most - least) if claim.b else Interval(least, most)
    return replace(unit, found=estimate([float(e) for e in effects], _outcomes(claim, pairs), limits))


def _problem(
    claim: Claim, pairs: Sequence[tuple[Record, ...]], seeds: Sequence[int], values: Sequence[list[Any]]
) -> str:
    """Why a unit cannot be tested; empty if it can."""
    for pair, seed, row in zip(pairs, seeds, values, strict=True):
        for side, value in zip(claim.sides, row, strict=True):
            if value is None:
                return f"{claim.metric} of {side}, seed {seed}, has no value"
            if not math.isfinite(value):
                return f"{claim.metric} of {side}, seed {seed}, is {value}: without it the mean would flatter"
        apart = _apart(claim, pair)
        if apart:
            return f"not compared, seed {seed}: {apart}"
    if len(pairs) < MIN_PAIRS:
        what = "pairs" if claim.b else "seeds"
        return f"{len(pairs)} of the {MIN_PAIRS} {what} that a verdict needs"
    return ""


def _apart(claim: Claim, pair: tuple[Record, ...]) -> str | None:
    """Why a pair cannot be compared; None if it can."""
    if claim.b is None or claim.equal is None:
        return None
    a, b = pair
    if a.get("num_samples") != b.get("num_samples"):
        return f"tested on {a.get('num_samples')} and {b.get('num_samples')} samples"
    sizes = [_size(record, claim.equal) for record in pair]
    return unequal(Pair(claim.a.group, claim.b.group, claim.equal, claim.tolerance), *sizes)


def _size(record: Record, what: str) -> float:
    if what == "inference_flops":
        return float(record["inference_flops_per_token"][steps_of(record)])
    return float(record[what])


def _unpaired(claim: Claim, by_seed: Sequence[dict[int, Record]]) -> str:
    """The seeds that only one side has; empty if there are none."""
    if claim.b is None:
        return ""
    a, b = (set(side) for side in by_seed)
    alone = [(claim.a.group, sorted(a - b)), (claim.b.group, sorted(b - a))]
    return "; ".join(
        f"no partner for {group}, seed {', '.join(map(str, seeds))}" for group, seeds in alone if seeds
    )


def _outcomes(claim: Claim, pairs: Sequence[tuple[Record, ...]]) -> Floats | None:
    """(seeds, samples): what each test sample adds to the effect; None where that is not stored."""
    rows = []
    for pair in pairs:
        stored = [
            record.get("correct", "") if steps_of(record, side.steps) == steps_of(record) else ""
            for record, side in zip(pair, claim.sides, strict=True)
        ]
        if claim.metric != "accuracy" or not all(stored):
            return None
        rows.append([np.asarray(list(correct), dtype=np.float64) for correct in stored])
    if len({len(correct) for row in rows for correct in row}) != 1:
        return None
    return np.stack([row[0] - row[1] if len(row) > 1 else row[0] for row in rows])


def command_of(record: Record) -> str:
    """The command that runs all seeds of a record's cell, into the default folder."""
    seeds = record["cell"].rpartition("/")[0] + "/*"
    return shlex.join(["python", "experiments/run.py", "--matrix", record["matrix"], "--cells", seeds])
