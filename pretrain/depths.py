"""How deep an optimizer step loops, row by row, and the deepest that a run gets."""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from model import ModelConfig
from model.recurrence import sample_depth, sample_depths


@dataclasses.dataclass(frozen=True)
class StepDepths:
    """Loop steps of the rows of an optimizer step, the same on every rank and for every layout."""

    rows: Tensor  # (ranks, rows of a rank) int64, in host memory
    per_row: bool  # whether they may differ

    @property
    def deepest(self) -> int:
        return int(self.rows.max())

    @property
    def mean(self) -> int | float:
        return float(self.rows.double().mean()) if self.per_row else self.deepest

    def passes(self, rows: slice) -> int:
        """Loop steps that every rank takes for some of its rows: those of the deepest one on any rank.

        With ZeRO-3 and expert parallelism all ranks run every pass together.
        """
        return int(self.rows[:, rows].max())

    def all_passes(self, num_rows: int) -> list[int]:
        """`passes` of each micro-batch of num_rows rows per rank."""
        return [int(part.max()) for part in self.rows.split(num_rows, 1)]

    def mean_of(self, cost: Callable[[int], float]) -> float:
        """The rows' mean of what a depth costs."""
        depths, counts = self.rows.unique(return_counts=True)
        costs = [cost(depth) * count for depth, count in zip(depths.tolist(), counts.tolist(), strict=True)]
        return sum(costs) / self.rows.numel()


def step_depths(config: ModelConfig, seed: int, step: int, world_size: int, num_rows: int) -> StepDepths:
    """The depths of optimizer step `step`: functions of (seed, step, number of the row in the global batch).

    Args:
        num_rows: of the global batch; each rank has a contiguous share, see Loader.batch.
    """
    per_row = config.recurrence.depth_per == "sequence"
    rows = (
        sample_depths(config, seed, step, num_rows)
        if per_row
        else torch.full((num_rows,), sample_depth(config, seed, step))
    )
    return StepDepths(rows.view(world_size, -1), per_row)


def trained_at(config: ModelConfig, step: int) -> ModelConfig:
    """The config with the back-propagated depth of optimizer step `step`, for counts at its loop steps."""
    r = config.recurrence
    cut = r.backprop_at(step)
    if cut == r.backprop_steps:
        return config
    return dataclasses.replace(
        config, recurrence=dataclasses.replace(r, backprop_steps=cut, depth_schedule=None)
    )


def deepest(config: ModelConfig) -> ModelConfig:
    """The config of the deepest step of a run, without a schedule: what memory is planned for.

    Draws around a mean per step count with their mean, draws per row with max_steps, which the deepest row of
    a large batch comes close to.
    """
    r = config.recurrence
    points = r.depth_schedule or []
    if not points and r.depth_per == "step":
        return config
    steps = max([math.ceil(point.num_steps) for point in points], default=r.num_steps)
    steps = r.max_steps if r.depth_per == "sequence" else steps
    cuts = [point.backprop_steps for point in points if point.backprop_steps is not None]
    flat = dataclasses.replace(
        r,
        num_steps=max(steps, r.halting.min_steps, r.virtual_layers or 1),  # a config needs as many
        backprop_steps=max(cuts, default=r.backprop_steps),
        depth_schedule=None,
        depth_per="step",
    )
    return dataclasses.replace(config, recurrence=flat)
