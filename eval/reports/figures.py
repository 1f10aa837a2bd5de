"""Figures about one run."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from common.pages import Picture
from eval.scoring.core import Score

matplotlib.use("Agg")

COLORS = ("#2b6cb0", "#dd6b20", "#a0aec0", "#718096")
MAX_COLUMNS = 200  # of a heat map; more steps than this are averaged into bins


def picture(figure: Figure, description: str) -> Picture:
    """The figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return Picture(buffer.getvalue(), description)


def series(metrics: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the lines that have the field."""
    lines = [line for line in metrics if line.get(name) is not None]
    return [line["step"] for line in lines], [line[name] for line in lines]


def loss_figure(metrics: Sequence[dict[str, Any]]) -> Figure:
    """Training and validation loss, gradient norm and learning rate against steps."""
    figure = Figure(figsize=(10, 3.6))
    losses, norms = figure.subplots(1, 2, width_ratios=(3, 2))
    losses.plot(*series(metrics, "loss"), color=COLORS[0], linewidth=0.8, label="training")
    validation = series(metrics, "val_loss")
    if validation[0]:
        losses.plot(*validation, color=COLORS[1], marker="o", markersize=3, label="validation")
    losses.set(xlabel="step", ylabel="loss (nats per token)")
    losses.legend()
    norms.plot(*series(metrics, "grad_norm"), color=COLORS[2], linewidth=0.8)
    norms.set(xlabel="step", ylabel="gradient norm (grey)", yscale="log")
    rates = norms.twinx()
    rates.plot(*series(metrics, "lr"), color=COLORS[0])
    rates.set_ylabel("learning rate (blue)")
    figure.tight_layout()
    return figure


def expert_load_figure(metrics: Sequence[dict[str, Any]]) -> Figure:
    """Per MoE layer, each expert's share of the tokens over time, and the busiest expert against the mean.

    `expert_load` of a line is [layer][expert], fractions; a share of 1 / experts is perfect balance.

    Raises:
        ValueError: expert_load has another shape.
    """
    steps, loads = series(metrics, "expert_load")
    try:
        shares = np.asarray(loads, dtype=np.float64)  # (S steps, L layers, E experts)
    except ValueError:
        raise ValueError(
            "metrics.jsonl: expert_load has different numbers of layers or experts at different steps"
        ) from None
    if shares.ndim != 3 or not shares.size:
        raise ValueError(
            f"metrics.jsonl: expert_load must be [layer][expert], it has {shares.ndim - 1} levels"
            f" and {shares.size} numbers"
        )
    num_layers, num_experts = shares.shape[1:]
    figure = Figure(figsize=(10, 1.5 * num_layers + 2.6), layout="constrained")
    axes = figure.subplots(num_layers + 1, 1, squeeze=False, height_ratios=[1.2] * num_layers + [2])[:, 0]
    columns = np.array_split(np.arange(len(steps)), min(len(steps), MAX_COLUMNS))
    binned = np.stack([shares[rows].mean(axis=0) for rows in columns])
    for layer, axis in enumerate(axes[:-1]):
        picture = axis.imshow(
            binned[:, layer].T,
            aspect="auto",
            vmin=0,
            vmax=min(1.0, 3 / num_experts),
            cmap="viridis",
            interpolation="nearest",
            extent=(steps[0] - 0.5, steps[-1] + 0.5, num_experts - 0.5, -0.5),
        )
        axis.set(ylabel=f"MoE layer {layer}\nexpert")
        busiest = shares[:, layer].max(-1) / shares[:, layer].mean(-1).clip(min=1e-12)
        axes[-1].plot(steps, busiest, label=f"MoE layer {layer}")
    axes[-1].set(xlabel="step", ylabel="busiest expert / mean", ylim=(0.9, None))
    axes[-1].axhline(1, color=COLORS[2], linewidth=0.8)
    axes[-1].margins(x=0)
    axes[-1].legend()
    figure.colorbar(picture, ax=list(axes), label="share of the layer's tokens", shrink=0.6)
    return figure


def accuracy_figure(groups: Sequence[str], bars: dict[str, list[Score]]) -> Figure:
    """Grouped bars of accuracies with their standard errors: one group per level, one bar per method."""
    figure = Figure(figsize=(8, 3.6))
    axis = figure.subplots()
    width = 0.8 / len(bars)
    for i, ((label, scores), color) in enumerate(zip(bars.items(), COLORS, strict=True)):
        axis.bar(
            [g + (i - (len(bars) - 1) / 2) * width for g in range(len(groups))],
            [score.value for score in scores],
            width,
            yerr=[score.stderr or 0 for score in scores],
            capsize=3,
            color=color,
            label=label,
        )
    axis.set_xticks(range(len(groups)), groups)
    axis.set(ylabel="accuracy ± standard error", ylim=(0, 1.05))
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=len(bars), frameon=False)
    figure.tight_layout()
    return figure
