"""The files of a run, checked: what a report reads of them has the types and limits that its writers keep."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from common.files import read_json_lines
from common.schema import Limits, as_type, from_plain

MAX_INTEGER = 2**53  # the largest that figures, which compute with doubles, tell apart
MAX_NUMBER = 1e39  # beyond fp32, in which models compute
StandardError = Annotated[float, Limits(least=0)]


@dataclass(frozen=True)
class _Step:
    """What is read of a line of metrics.jsonl."""

    step: int
    tokens: int | None = None
    tokens_per_second: float | None = None
    loss: float | None = None
    val_loss: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    recurrence_depth: float | None = None
    expert_load: list[list[float]] | None = None  # [layer][expert]
    eval: dict[str, dict[str, float]] | None = None  # task -> "metric,filter"
    eval_failed: str | None = None

    def __post_init__(self) -> None:
        for task, scores in (self.eval or {}).items():
            for key, value in scores.items():
                if "_stderr," in key:
                    as_type(StandardError, value, f"eval.{task}.{key}")


@dataclass(frozen=True)
class _Guess:
    value: float
    stderr: StandardError | None


@dataclass(frozen=True)
class _Counts:
    effective: int
    original: int = 0


_TABLES: dict[str, Any] = {  # of a results file, by task
    "results": dict[str, dict[str, Any]],
    "baselines": dict[str, dict[str, _Guess]],
    "group_subtasks": dict[str, list[str]],
    "configs": dict[str, dict[str, Any]],
    "n-shot": dict[str, int],
    "higher_is_better": dict[str, dict[str, bool]],
    "n-samples": dict[str, _Counts],
    "config": dict[str, Any],
}
_STEPS = int | Literal["adaptive"] | None
_FIELDS: dict[str, dict[str, Any]] = {  # that are not in every file, or null
    "results": {
        "num_steps": _STEPS,
        "depth": _STEPS,
        "mean_steps": float | None,
    },
    "configs": {"task": str, "num_samples": int},
}


@dataclass(frozen=True)
class Trace:
    """A line of the samples of causal_loop."""

    level: int
    prompt: str
    answer: int
    resps: dict[str, str]
    right: float


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError, naming the file, if it is not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): delete it or write it again") from None
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} holds a JSON {type(value).__name__}, not an object: delete it or write it again"
        )
    return value


def read_results_file(path: Path) -> dict[str, Any]:
    """Raises ValueError, naming the file and the key, for a results file that eval/run.py has not written."""
    report = read_json(path)
    try:
        check_report(report)
    except ValueError as error:
        raise ValueError(f"{path}: {error}: delete it or evaluate again") from None
    return report


def check_report(report: dict[str, Any]) -> None:
    """Raises ValueError for what is missing or of another type in what a results file holds."""
    for table, shape in _TABLES.items():
        if table not in report:
            raise ValueError(f"lacks a field that eval/run.py writes, {table}")
        as_type(shape, report[table], table)
        _check_limits(report[table], table)
    as_type(int | None, report["config"].get("num_steps"), "config.num_steps")
    as_type(str | None, report["config"].get("decontamination"), "config.decontamination")
    for name, entry in report["results"].items():
        for table in set(_TABLES) - {"config"}:
            if name not in report[table]:
                raise ValueError(f"lacks a field that eval/run.py writes, {table}.{name}")
        _check_scores(name, entry, report["higher_is_better"][name])
    for table, fields in _FIELDS.items():
        for name, entry in report[table].items():
            for field, kind in fields.items():
                if field in entry:
                    as_type(kind, entry[field], f"{table}.{name}.{field}")


def _check_scores(name: str, entry: dict[str, Any], higher: dict[str, bool]) -> None:
    for key, value in entry.items():
        metric, comma, filter_name = key.partition(",")
        where = f"results.{name}.{key}"
        if not comma:
            continue
        if metric.endswith("_stderr"):
            as_type(StandardError | Literal["N/A"], value, where)
            continue
        as_type(float, value, where)
        if f"{metric}_stderr,{filter_name}" not in entry or metric not in higher:
            raise ValueError(f"{where} has no standard error, or no entry in higher_is_better")
        if higher[metric] and not 0 <= value <= 1:
            raise ValueError(f"{where}={value!r} is not a share between 0 and 1")


def _check_limits(value: Any, where: str) -> None:
    """Numbers that figures can draw."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_limits(item, f"{where}.{key}")
    elif isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise ValueError(f"{where} is an integer beyond {MAX_INTEGER}")
    elif isinstance(value, float) and not abs(value) <= MAX_NUMBER:
        raise ValueError(f"{where}={value!r} is not a number up to {MAX_NUMBER:g}")


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of metrics.jsonl, and one line of text for each damaged one. Nothing without a file.

    Its torn end, normal after a kill, is left out without a word.
    """
    known = set(_Step.__dataclass_fields__)

    def check(record: dict[str, Any], where: str) -> dict[str, Any]:
        values = {key: value for key, value in record.items() if key in known}
        from_plain(_Step, values, where)
        _check_limits(values, where)
        return record

    return _checked_lines(path, check)


def read_traces(path: Path) -> tuple[list[Trace], list[str]]:
    """The samples of causal_loop, and one line of text for each damaged line."""

    def check(record: dict[str, Any], where: str) -> Trace:
        values = {key: record[key] for key in ("level", "prompt", "answer", "resps") if key in record}
        trace = from_plain(Trace, {**values, "right": record.get("exact_match,trace")}, where)
        if "trace" not in trace.resps:
            raise ValueError(f"{where}.resps.trace is missing")
        return trace

    return _checked_lines(path, check)


def _checked_lines(path: Path, check: Any) -> tuple[list[Any], list[str]]:
    if not path.is_file():
        return [], []
    found = read_json_lines(path)
    damaged = {number for number, _ in found.damaged}
    numbers = (n for n in range(1, len(found.records) + len(damaged) + 1) if n not in damaged)
    records, problems = [], found.warnings()
    for number, record in zip(numbers, found.records, strict=True):
        try:
            records.append(check(record, f"{path} line {number}"))
        except ValueError as error:
            problems.append(f"{error}: the line is not used")
    return records, problems
