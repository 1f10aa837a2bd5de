"""The picture of eval/reasoning.py."""

from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

from eval.reports.figures import COLORS
from eval.scoring.core import Score, mean_score
from eval.scoring.results import TaskResult


def picture(results: Sequence[TaskResult]) -> Figure:
    """`depth_figure` of the results of eval/reasoning.py: one line per problem depth where there is one."""
    whole = results[0]
    lines: dict[str, list[Score]] = {}
    for result in results:
        label = result.task.removeprefix(f"{whole.task}_").replace("problem_depth", "problem depth ")
        if not label.startswith("labels"):
            lines["all answers" if result is whole else label] = [
                mean_score(values) for values in result.values.values()
            ]
    steps, trained = list(whole.facts["by_steps"]), whole.facts["trained_steps"]
    return depth_figure(steps, lines, whole.baselines, trained, whole.task)


def depth_figure(
    steps: Sequence[int],
    lines: dict[str, list[Score]],
    baselines: dict[str, Score],
    trained: int,
    title: str,
) -> Figure:
    """Accuracy against test-time depth: `lines` has one Score per entry of `steps`, the first line pooled.

    Dashed: what guessing reaches. Dotted: the `trained` depth.
    """
    figure = Figure(figsize=(8, 4.2))
    axis = figure.subplots()
    by_depth = matplotlib.colormaps["viridis"]
    for i, (label, scores) in enumerate(lines.items()):
        axis.errorbar(
            steps,
            [score.value for score in scores],
            yerr=[score.stderr or 0 for score in scores],
            capsize=3,
            marker="o",
            markersize=4,
            color=COLORS[0] if i == 0 else by_depth((i - 1) / max(1, len(lines) - 2)),
            linewidth=2.5 if i == 0 else 1.2,
            label=label,
        )
    for (name, score), color in zip(baselines.items(), COLORS[1:] * len(baselines), strict=False):
        axis.axhline(score.value, color=color, linestyle="--", linewidth=1, label=name)
    axis.axvline(trained, color=COLORS[3], linestyle=":", linewidth=1, label="trained depth")
    axis.set_xscale("log", base=2)
    axis.set_xticks(steps, [str(n) for n in steps])
    axis.minorticks_off()
    axis.set(
        xlabel="loop steps at test time", ylabel="accuracy ± standard error", ylim=(0, 1.05), title=title
    )
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.tight_layout()
    return figure
