"""The pictures of the report. Whiskers: 95 % bootstrap intervals over the seeds; dots: seeds."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from common.files import replacing
from eval.reports.comparisons import GUESS_COLOR, RUN_COLORS
from experiments.groups import GROUPS
from experiments.reporting.records import Record, Setting, budget_text, steps_of, value_of, values_of
from experiments.reporting.statistics import bootstrap_interval

matplotlib.use("Agg")

COLUMNS = 3
BEYOND, GUESS = "deeper than trained", "best guess"
CLOSE = 0.03  # relative: marks whose sizes differ by no more are drawn side by side
SPREAD = 72.0  # points: the most that marks drawn side by side may take together
COMMON = (BEYOND, GUESS)  # last in every legend
# The claims' groups come first and get the clearest colours; yellow, which is hard to see, is left out.
MAIN = ("loop", "dense_params", "dense_flops", "dense_narrow", "fixed", "random", "adaptive")
ORDER = (*MAIN, *(name for name in GROUPS if name not in MAIN))
COLORS = tuple(color for color in RUN_COLORS if color != "#f0e442")
MARKERS = "osD^v"
NAMES = {
    "loop": "loop: its layers run R times",
    "dense_params": "dense: as many layers, same parameters",
    "dense_narrow": "dense: same parameters, deep and narrow",
    "dense_flops": "dense: R times the layers, same FLOPs",
    "fixed": "loop with injection, fixed steps",
    "random": "loop with injection, steps drawn at random",
    "adaptive": "loop, learned halting",
}
Groups = Mapping[str, Sequence[Record]]


def style(group: str) -> dict[str, Any]:
    i = ORDER.index(group) if group in ORDER else len(ORDER)  # of a group that no longer exists
    return {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i // len(COLORS) % len(MARKERS)]}


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG; the same figure gives the same bytes."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    return path


def ordered(groups: Groups) -> dict[str, Sequence[Record]]:
    return {name: groups[name] for name in ORDER if name in groups}


def _panels(names: Sequence[str], draw: Callable[[Axes, int], None], height: float = 3.6) -> Figure:
    """One panel per name, one legend above them all."""
    columns = min(COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(max(7.5, 4.6 * columns), height * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    found: dict[str, Any] = {}
    for i, name in enumerate(names):
        draw(axes[i], i)
        axes[i].set_title(name, fontsize=10)
        axes[i].spines[["top", "right"]].set_visible(False)
        found.update(zip(*reversed(axes[i].get_legend_handles_labels()), strict=True))
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    labels = sorted(found, key=lambda label: label in COMMON)
    longest = max(len(label) + 6 for label in labels)
    ncols = max(1, min(len(labels), int(13 * figure.get_figwidth() / longest)))
    figure.legend(
        [found[label] for label in labels], labels, loc="outside upper center", ncols=ncols, frameon=False
    )
    return figure


def _whiskers(values: Sequence[float]) -> tuple[float, list[list[float]]]:
    """Mean, and the errors in the form that errorbar takes."""
    mean = fmean(values)
    if len(values) < 2:
        return mean, [[0.0], [0.0]]
    lo, hi = bootstrap_interval(values)
    return mean, [[max(0.0, mean - lo)], [max(0.0, hi - mean)]]


def _lines(axis: Axes, points: Mapping[float, Sequence[float]], label: str, **look: Any) -> None:
    """Means with whiskers against x; an x without values is left out."""
    drawn = {x: _whiskers(values) for x, values in sorted(points.items()) if values}
    if drawn:
        errors = [[error[side][0] for _, error in drawn.values()] for side in (0, 1)]
        means = [mean for mean, _ in drawn.values()]
        axis.errorbar(list(drawn), means, yerr=errors, capsize=2.5, markersize=5, label=label, **look)


def best_guess(records: Sequence[Record]) -> float | None:
    """The best accuracy of guessing without reading the problem, over these records."""
    return max((max(r["guesses"].values()) for r in records if r.get("guesses")), default=None)


def _guess(axis: Axes, records: Sequence[Record]) -> None:
    guess = best_guess(records)
    if guess is not None:
        axis.axhline(guess, color=GUESS_COLOR, linestyle="--", linewidth=1, label=GUESS, zorder=0)


def _accuracies(axis: Axes) -> None:
    axis.set(ylabel="accuracy", ylim=(0, 1.03))


def _log(axis: Axes, ticks: Sequence[float], base: int = 2) -> None:
    if min(ticks, default=1) > 0:
        axis.set_xscale("log", base=base)
    else:
        axis.set_xscale("symlog", base=base, linthresh=1)  # can show 0
    if 0 < len(ticks) <= 8:
        axis.set_xticks(sorted(ticks), [EngFormatter(sep="")(x) for x in sorted(ticks)])
        axis.minorticks_off()


HEADLINE = ("dense_params", "dense_narrow", "loop", "dense_flops")


def headline_figure(panels: Mapping[Setting, Groups], effects: Mapping[Setting, str], title: str) -> Figure:
    """One panel per task, one bar per model; its title has the effect at equal parameters and the verdict."""
    figure = Figure(figsize=(10, 1.1 + 2.2 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (setting, groups) in zip(axes, panels.items(), strict=True):
        names = [name for name in reversed(HEADLINE) if name in groups]
        base = fmean(record["parameters"] for record in groups["loop"])
        flops = fmean(_flops(record) for record in groups["loop"])
        for y, name in enumerate(names):
            values = values_of(groups[name], "accuracy")
            mean, error = _whiskers(values)
            color = style(name)["color"]
            axis.barh(y, mean, 0.62, color=color, alpha=1.0 if name == "loop" else 0.55)
            axis.errorbar(mean, y, xerr=error, color="#1a202c", capsize=3, linewidth=1.2)
            axis.scatter(values, [y + 0.2] * len(values), s=9, color="#1a202c", zorder=3)
            size = fmean(record["parameters"] for record in groups[name]) / base
            work = fmean(_flops(record) for record in groups[name]) / flops
            said = f"{mean:.2f}    {size:.1f}× parameters, {work:.2g}× FLOPs"
            axis.text(1.02, y, said, va="center", fontsize=9)
        axis.set_yticks(range(len(names)), [NAMES[name] for name in names])
        for tick, name in zip(axis.get_yticklabels(), names, strict=True):
            tick.set_fontweight("bold" if name == "loop" else "normal")
        guess = best_guess([record for records in groups.values() for record in records])
        if guess is not None:
            axis.axvline(guess, color=GUESS_COLOR, linestyle="--", linewidth=1)
            axis.text(guess, len(names) - 0.45, GUESS, fontsize=8, color=GUESS_COLOR, ha="center")
        axis.set(xlim=(0, 1))
        axis.set_title(
            f"{setting.task} ({setting.size}). {effects[setting]}", fontsize=10, loc="left", pad=12
        )
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel(
        "accuracy on unseen problems (bar: mean; dots: seeds; whisker: bootstrap interval, 95 %)"
    )
    figure.suptitle(title, fontsize=13, fontweight="bold")
    return figure


def _flops(record: Record) -> float:
    return float(record["inference_flops_per_token"][steps_of(record)])


def depth_figure(panels: Mapping[Setting, Groups]) -> Figure:
    """Accuracy by problem depth; depths beyond those trained on are shaded."""

    def draw(axis: Axes, i: int) -> None:
        """Panel i: one line per group, and a dotted one at twice the trained steps for loops."""
        groups = list(panels.values())[i]
        everyone = [record for records in groups.values() for record in records]
        depths = sorted({int(depth) for record in everyone for depth in record["by_depth"]})
        for group, records in ordered(groups).items():
            for steps, line in (("trained", "-"), ("2R", ":")):
                if steps == "2R" and group not in ("loop", "fixed", "random"):
                    continue
                points = {
                    float(depth): values_of([_at_depth(r, depth) for r in records], "there", steps)
                    for depth in depths
                }
                label = group if steps == "trained" else f"{group}, 2R steps"
                _lines(axis, points, label, **style(group), linestyle=line)
        trained = everyone[0].get("trained_depth")
        if trained is not None and trained < depths[-1]:
            axis.axvspan(trained + 0.5, depths[-1] + 0.5, color="#edf2f7", zorder=0, label=BEYOND)
        _guess(axis, everyone)
        _accuracies(axis)
        axis.set(xlabel="problem depth", xlim=(depths[0] - 0.5, depths[-1] + 0.5))
        axis.set_xticks(depths if len(depths) <= 12 else depths[::2])

    return _panels([str(setting) for setting in panels], draw, 4.2)


def _at_depth(record: Record, depth: int) -> Record:
    return {**record, "there": record["by_depth"].get(str(depth))}


def parameters_figure(panels: Mapping[Setting, Groups]) -> Figure:
    """Accuracy at the trained steps against parameters."""

    def draw(axis: Axes, i: int) -> None:
        groups = list(panels.values())[i]
        sizes = []
        for group, records in ordered(groups).items():
            values = values_of(records, "accuracy")
            if values:
                sizes.append(fmean(record["parameters"] for record in records))
                _lines(axis, {sizes[-1]: values}, group, **style(group), linestyle="none")
        _side_by_side(axis, sizes, 9.0)
        _cost_axis(axis, groups, "parameters (equal ones are drawn side by side)", 0.3)

    return _panels([str(setting) for setting in panels], draw)


def _side_by_side(axis: Axes, sizes: Sequence[float], most: float = 5.0) -> None:
    """Move marks of nearly equal x apart by `most` points, or less if they are many: none hides another.

    Args:
        sizes: x of each group drawn so far, in their order.
    """
    for i, (container, size) in enumerate(zip(axis.containers, sizes, strict=True)):
        near = [j for j, other in enumerate(sizes) if abs(other - size) <= CLOSE * size]
        points = (near.index(i) - (len(near) - 1) / 2) * min(most, SPREAD / len(near))
        move = ScaledTranslation(points / 72, 0, axis.figure.dpi_scale_trans)
        for artist in container.get_children():
            artist.set_transform(artist.get_transform() + move)


def flops_figure(panels: Mapping[Setting, Groups]) -> Figure:
    """Accuracy against inference FLOPs; for the main groups, a loop's line runs over its test-time steps."""

    def draw(axis: Axes, i: int) -> None:
        groups = list(panels.values())[i]
        for group, records in ordered(groups).items():
            first, trained = records[0], values_of(records, "accuracy")
            points = {
                float(flops): values_of(records, "accuracy", int(steps))
                for steps, flops in first["inference_flops_per_token"].items()
                if group in MAIN
            }
            _lines(axis, points or {_flops(first): trained}, group, **style(group), linewidth=1)
            if first["trained_steps"] > 1 and trained and group in MAIN:
                axis.plot(_flops(first), fmean(trained), "o", ms=11, mfc="none", color=style(group)["color"])
        _cost_axis(axis, groups, "inference FLOPs per token (ring: trained steps)")

    return _panels([str(setting) for setting in panels], draw)


def _cost_axis(axis: Axes, groups: Groups, xlabel: str, margin: float = 0.1) -> None:
    _guess(axis, [record for records in groups.values() for record in records])
    _accuracies(axis)
    axis.set_xscale("log")
    axis.margins(x=margin)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set(xlabel=xlabel)


# What studies.by_value and by_shots return: by task, size, budget and group, the seeds at each value.
Varied = Mapping[tuple[str, str, str, str], Mapping[float, Sequence[Record]]]


def varied_figure(found: Varied, xlabel: str) -> Figure:
    """Accuracy against what a study varies, one line per group."""
    panels = list(dict.fromkeys((task, size, budget) for task, size, budget, _ in found))

    def draw(axis: Axes, i: int) -> None:
        ticks: set[float] = set()
        for (*panel, group), values in found.items():
            if tuple(panel) == panels[i]:
                points = {x: values_of(records, "accuracy") for x, records in values.items()}
                _lines(axis, points, group, **style(group))
                ticks |= set(points)
                _guess(axis, [record for records in values.values() for record in records])
        _accuracies(axis)
        _log(axis, sorted(ticks))
        axis.set(xlabel=xlabel)

    return _panels([f"{task}, {size}, {budget_text(budget)}" for task, size, budget in panels], draw)


NEAR = 0.02  # how far below a depth's best accuracy is near enough


def steps_figure(panels: Mapping[Setting, Groups]) -> Figure:
    """Against problem depth, the fewest steps tested whose accuracy is within NEAR of that depth's best."""

    def draw(axis: Axes, i: int) -> None:
        """Panel i: one line per group, and the mean steps that learned halting spends."""
        groups = list(panels.values())[i]
        for group, records in ordered(groups).items():
            depths = sorted({int(depth) for record in records for depth in record["by_depth"]})
            points = {
                float(depth): [
                    enough_steps(r["by_depth"][str(depth)]) for r in records if str(depth) in r["by_depth"]
                ]
                for depth in depths
            }
            _lines(axis, points, group, **style(group))
            if group == "adaptive":
                spent = fmean(values_of(records, "mean_steps"))
                axis.axhline(
                    spent, color=style(group)["color"], linestyle=":", label="adaptive: mean steps spent"
                )
            trained = value_of(records[0], "trained_depth")
        _side_by_side(axis, [0.0] * len(axis.containers))
        if trained is not None:
            axis.axvspan(trained + 0.5, depths[-1] + 0.5, color="#edf2f7", zorder=0, label=BEYOND)
        axis.set(xlabel="problem depth", ylabel=f"steps to come within {NEAR} of the best")
        axis.set(ylim=(0, None), xlim=(depths[0] - 0.5, depths[-1] + 0.5))

    return _panels([str(setting) for setting in panels], draw, 4.0)


def enough_steps(by_steps: Mapping[str, float]) -> float:
    """The fewest steps whose accuracy is within NEAR of the best of all steps."""
    best = max(by_steps.values())
    return float(min(int(steps) for steps, value in by_steps.items() if value >= best - NEAR))
