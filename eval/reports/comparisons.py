"""Figures that compare runs."""

import math
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from common.pages import printable
from eval.reports.figures import series
from eval.scoring.core import Score

# Okabe and Ito's colours, which colour-blind readers can tell apart (jfly.uni-koeln.de/color).
RUN_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#f0e442", "#000000")
PUBLISHED_COLOR = "#cbd5e0"
GUESS_STYLES: dict[str, Literal["--", ":"]] = {"chance": "--", "majority": ":"}
GUESS_COLOR = "#4a5568"
COLUMNS = 2  # panels per row
NAME_LENGTH = 34  # longer names are cut in legends


class Point(NamedTuple):
    """A point of a curve; a starred one has adaptive depth and is not joined by the line."""

    x: float
    score: Score
    starred: bool = False


class Curve(NamedTuple):
    run: int  # index of the run, which sets the colour
    points: list[Point]
    dashed: bool = False


Curves = dict[str, Curve]  # by label in the legend
Guesses = dict[str, Score]  # "chance", "majority"


def color_of(number: int) -> str:
    return RUN_COLORS[number % len(RUN_COLORS)]


def label_of(name: str) -> str:
    """A name as figures show it: a `$` starts no formula, and a `_` at its start hides no legend entry."""
    lines = (printable(line).replace("$", r"\$") for line in name.split("\n"))
    return re.sub("^_", " _", "\n".join(lines))


def shortened(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"


def bars_figure(
    groups: Sequence[str], bars: dict[str, list[Score | None]], guesses: Sequence[Guesses]
) -> Figure:
    """Accuracies with standard errors: one group per task, one bar per run, lines for what guessing reaches.

    Args:
        groups: names of the tasks.
        bars: by label, one score per group, None where the run has none.
        guesses: one entry per group.
    """
    width = min(16.0, max(8.0, 1.6 + len(groups) * (0.8 + 0.12 * len(bars))))
    figure = Figure(figsize=(width, 3.8), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(bars)
    for i, (label, scores) in enumerate(bars.items()):
        shown = [(g, score) for g, score in enumerate(scores) if score is not None]
        axis.bar(
            [g + (i - (len(bars) - 1) / 2) * width for g, _ in shown],
            [score.value for _, score in shown],
            width,
            yerr=[score.stderr or 0 for _, score in shown],
            capsize=min(3.0, 12 * width),
            color=color_of(i),
            label=label_of(label),
        )
    for kind, style in GUESS_STYLES.items():
        levels = [(g, guess[kind].value) for g, guess in enumerate(guesses) if kind in guess]
        if levels:
            axis.hlines(
                [value for _, value in levels],
                [g - 0.45 for g, _ in levels],
                [g + 0.45 for g, _ in levels],
                colors=GUESS_COLOR,
                linestyles=style,
                label=kind,
            )
    crowded = sum(map(len, groups)) > 9 * figure.get_figwidth()
    axis.set_xticks(
        range(len(groups)),
        [label_of(group) for group in groups],
        rotation=35 if crowded else 0,
        ha="right" if crowded else "center",
    )
    axis.set_xlim(-0.6, len(groups) - 0.4)
    own = [score for scores in bars.values() for score in scores if score is not None]
    _accuracy_axis(axis, [*own, *(score for guess in guesses for score in guess.values())])
    handles, names = axis.get_legend_handles_labels()
    _legend(figure, dict(zip(names, handles, strict=True)))
    return figure


def curves_figure(
    panels: dict[str, tuple[Curves, Guesses]], xlabel: str, log: bool = False, whole: bool = True
) -> Figure:
    """One panel per task: accuracy with standard errors against `xlabel`, one line per run.

    Args:
        panels: by task, the curves and what guessing reaches.
        log: a logarithmic axis of base 2.
        whole: x values are whole numbers; up to 10 of them get a label each.
    """
    rows = math.ceil(len(panels) / COLUMNS)
    columns = min(COLUMNS, len(panels))
    width = 5.4 if columns > 1 else 8.0
    figure = Figure(figsize=(width * columns, 3.4 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (task, (curves, guesses)) in zip(axes, panels.items(), strict=False):
        for label, curve in curves.items():
            _draw(axis, curve, label_of(label))
        for kind, style in GUESS_STYLES.items():
            if kind in guesses:
                axis.axhline(guesses[kind].value, color=GUESS_COLOR, linestyle=style, linewidth=1, label=kind)
        if log:
            axis.set_xscale("log", base=2)
        ticks = sorted({point.x for curve in curves.values() for point in curve.points if not point.starred})
        if whole and len(ticks) <= 10:
            axis.set_xticks(ticks, [f"{x:.3g}" for x in ticks])
            axis.minorticks_off()
        axis.set(title=label_of(task), xlabel=xlabel)
        _accuracy_axis(axis, [*_scores(curves), *guesses.values()])
        if not whole:
            axis.xaxis.set_major_formatter(EngFormatter())
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    found: dict[str, Any] = {}
    for axis in axes:
        found.update(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    _legend(figure, found)
    return figure


def _scores(curves: Curves) -> list[Score]:
    return [point.score for curve in curves.values() for point in curve.points]


def _draw(axis: Axes, curve: Curve, label: str) -> None:
    for starred in (False, True):
        points = sorted((p for p in curve.points if p.starred == starred), key=lambda point: point.x)
        if points:
            axis.errorbar(
                [point.x for point in points],
                [point.score.value for point in points],
                yerr=[point.score.stderr or 0 for point in points],
                capsize=3,
                marker="*" if starred else "s" if curve.dashed else "o",
                markersize=12 if starred else 4,
                linestyle="none" if starred else "--" if curve.dashed else "-",
                color=color_of(curve.run),
                label=f"{label}, adaptive" if starred else label,
            )


def published_figure(
    panels: dict[str, list[tuple[str, Score, int | None]]], chance: dict[str, float]
) -> Figure:
    """One panel per task, one bar per model, the best on top; published ones are grey.

    Args:
        panels: by task, (name, score, index of the run or None for a published model).
        chance: by task, the accuracy of random guessing; 0 draws no line.
    """
    heights = [0.32 * len(bars) + 0.9 for bars in panels.values()]
    figure = Figure(figsize=(8, sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (task, bars) in zip(axes, panels.items(), strict=True):
        ordered = sorted(bars, key=lambda bar: bar[1].value)
        axis.barh(
            range(len(ordered)),
            [score.value for _, score, _ in ordered],
            xerr=[score.stderr or math.nan for _, score, _ in ordered],
            capsize=2,
            color=[PUBLISHED_COLOR if run is None else color_of(run) for _, _, run in ordered],
        )
        for y, (_, score, _) in enumerate(ordered):
            axis.text(score.value + (score.stderr or 0) + 0.008, y, f"{score.value:.3f}", va="center", size=8)
        axis.set_yticks(range(len(ordered)), [label_of(name) for name, _, _ in ordered])
        if chance.get(task):
            axis.axvline(chance[task], color=GUESS_COLOR, linestyle="--", linewidth=1, label="chance")
            axis.legend(loc="lower right", frameon=False)
        axis.set(title=label_of(task), xlim=(0, 1.0))
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("accuracy")
    return figure


def losses_figure(runs: dict[str, list[dict[str, Any]]]) -> Figure:
    """Training loss (thin) and validation loss (dots) against tokens, from the metrics.jsonl of each run."""
    figure = Figure(figsize=(8, 3.8))
    axis = figure.subplots()
    for i, (name, lines) in enumerate(runs.items()):
        name = label_of(name)
        tokens = {line["step"]: line.get("tokens") or line["step"] for line in lines}
        steps, values = series(lines, "loss")
        axis.plot(
            [tokens[n] for n in steps], values, color=color_of(i), linewidth=0.6, alpha=0.45, label=name
        )
        steps, values = series(lines, "val_loss")
        if steps:
            label = f"{name}, validation"
            axis.plot(
                [tokens[n] for n in steps], values, color=color_of(i), marker="o", markersize=4, label=label
            )
    axis.xaxis.set_major_formatter(EngFormatter())
    axis.set(xlabel="tokens", ylabel="loss (nats per token)")
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _accuracy_axis(axis: Axes, scores: Sequence[Score]) -> None:
    """From 0 to 1, or less where all scores are low, since a small model's scores differ little."""
    top = max((score.value + (score.stderr or 0) for score in scores), default=1.0)
    axis.set(ylabel="accuracy ± standard error", ylim=(0, 1.05 if top > 0.6 else max(0.1, 1.3 * top)))
    axis.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, found: dict[str, Any]) -> None:
    """One legend above all panels, guesses last; `found`: handles by label."""
    names = sorted(found, key=lambda name: name in GUESS_STYLES)
    # The legend fits about 13 letters per inch; each entry's marker takes the room of 6.
    longest = max((len(name) + 6 for name in names), default=1)
    ncols = max(1, min(len(names), int(13 * figure.get_figwidth() / longest)))
    handles = [found[name] for name in names]
    figure.legend(handles, names, loc="outside upper center", ncols=ncols, frameon=False)
