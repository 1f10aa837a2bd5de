"""The tables of the report: what each group scored and what it cost."""

import math
import statistics
from collections.abc import Sequence

from common.pages import Block, Section, Table
from experiments.groups import GROUPS
from experiments.reporting.records import Record, Setting, most_steps, value_of, values_of
from experiments.reporting.statistics import Interval, bootstrap_interval

COSTS = (
    "seeds",
    "parameters",
    "active",
    "unrolled",
    "inference MFLOPs/token",
    "training TFLOPs",
    "tokens/s",
    "memory MiB",
    "mean steps",
    "learning rate",
)
NOTHING = "–"


def number(value: float | None) -> str:
    """Three decimals; a dash for None."""
    if value is None:
        return NOTHING
    return f"{value:.3f}" if math.isfinite(value) else str(value)


def interval_text(interval: Interval) -> str:
    return f"[{interval.lo:.3f}, {interval.hi:.3f}]"


def score_text(records: Sequence[Record], metric: str, steps: str | int = "trained") -> str:
    """Mean and bootstrap interval over the seeds, and how many of them are not finite."""
    measured = [value for r in records if (value := value_of(r, metric, steps)) is not None]
    values = [value for value in measured if math.isfinite(value)]
    if not measured:
        return NOTHING
    broken = f"; {len(measured) - len(values)} not finite" if len(values) < len(measured) else ""
    if not values:
        return broken.removeprefix("; ")
    mean = number(statistics.fmean(values))
    return f"{mean} {interval_text(bootstrap_interval(values))}{broken}" if len(values) > 1 else mean + broken


def cost_cells(records: Sequence[Record]) -> tuple[str, ...]:
    """The costs of one group's seeds in the order of COSTS; medians of what was measured."""
    first = records[0]

    def middle(key: str, scale: float = 1.0) -> float | None:
        values = values_of(records, key)
        return statistics.median(values) / scale if values else None

    def whole(value: float | None) -> str:
        return NOTHING if value is None else f"{value:,.0f}"

    flops = value_of(first, "inference_flops_per_token")
    training = middle("training_flops", 1e12)
    steps = middle("mean_steps")
    rate = first.get("learning_rate")
    return (
        str(len(records)),
        whole(first["parameters"]),
        whole(first.get("active_parameters")),
        whole(first.get("unrolled_parameters")),
        NOTHING if flops is None else f"{flops / 1e6:.3g}",
        NOTHING if training is None else f"{training:.3g}",
        whole(middle("tokens_per_second")),
        whole(middle("peak_memory_bytes", 2**20)),
        NOTHING if steps is None else f"{steps:.2f}",
        NOTHING if rate is None else f"{rate:g}",
    )


def task_section(setting: Setting, groups: dict[str, list[Record]]) -> Section:
    """All groups of one task, size and budget."""
    everything = [record for records in groups.values() for record in records]
    columns = _columns(groups)
    rows = [
        (group, *(score_text(records, metric, steps) for _, metric, steps in columns), *cost_cells(records))
        for group, records in groups.items()
    ]
    blocks: list[Block] = [Table(("group", *(name for name, _, _ in columns), *COSTS), rows)]
    facts = _facts(everything)
    return Section(str(setting), [facts, *blocks] if facts else blocks)


def _columns(groups: dict[str, list[Record]]) -> list[tuple[str, str, str | int]]:
    """Heading, metric and steps of each score that any group has."""
    everything = [record for records in groups.values() for record in records]
    if any("bits_per_byte" in record for record in everything):
        return [
            ("bits per byte", "bits_per_byte", "trained"),
            ("bits per byte, 2R steps", "bits_per_byte", "2R"),
            ("perplexity per byte", "perplexity", "trained"),
            ("validation loss", "validation_loss", "trained"),
        ]
    loops = [record for record in everything if record["trained_steps"] > 1 and "accuracy" in record]
    columns: list[tuple[str, str, str | int]] = [("accuracy", "accuracy", "trained")]
    most = most_steps(loops) if loops else 1
    if any(most != record["trained_steps"] for record in loops):
        columns.append((f"accuracy, {most} steps", "accuracy", most))
    if any(record.get("ood_accuracy") for record in everything):
        columns += [
            ("accuracy beyond the trained depth", "ood_accuracy", "trained"),
            ("the same, 2R steps", "ood_accuracy", "2R"),
        ]
    columns += [
        ("all labels", "label_accuracy", "trained"),
        ("validation loss", "validation_loss", "trained"),
    ]
    return [column for column in columns if any(values_of([r], column[1], column[2]) for r in everything)]


def _facts(records: Sequence[Record]) -> str:
    """What all cells of a setting have in common."""
    first = records[0]
    guesses = ", ".join(f"{way} {number(value)}" for way, value in (first.get("guesses") or {}).items())
    tokens = sorted({f"{record['tokens'] / 1e6:.2f}M" for record in records if "tokens" in record})
    parts = [
        f"Tested on {first['num_samples']:,} samples." if "num_samples" in first else "",
        f"Guessing reaches: {guesses}." if guesses else "",
        f"Trained on serial depths to {first['trained_depth']}." if "trained_depth" in first else "",
        f"Training tokens per cell: {', '.join(tokens)}." if tokens else "",
        f"Device: {', '.join(sorted({str(r.get('device', 'unknown')) for r in records}))}.",
    ]
    return " ".join(part for part in parts if part)


def groups_section(records: Sequence[Record]) -> Section:
    present = {record["group"] for record in records}
    rows = [(name, group.source) for name, group in GROUPS.items() if name in present]
    return Section("Groups", [Table(("group", "what it is"), rows)])
