"""Exponential moving average of the weights, kept as ZeRO keeps them: each rank averages its own shards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class MovingAverage:
    """Average of one rank's fp32 shards; costs as much memory as the shards, and no communication.

    Args:
        shards: returns the rank's fp32 weights, flat and in a fixed order; called every time.
        decay: share of the past in every update, (0, 1). There is no bias correction: the average starts at
            the present weights.
    """

    def __init__(self, shards: Callable[[], list[Tensor]], decay: float) -> None:
        self.shards, self.decay = shards, decay
        self.restart()

    def restart(self) -> None:
        """The average becomes the present weights."""
        self.values = [shard.detach().clone() for shard in self.shards()]

    @torch.no_grad()
    def update(self) -> None:
        """average = decay average + (1 - decay) weights."""
        for value, shard in zip(self.values, self.shards(), strict=True):
            value.lerp_(shard, 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the average replaces the weights, which are kept aside."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for value, shard in zip(self.values, self.shards(), strict=True):
            kept = shard.clone()
            shard.copy_(value)
            value.copy_(kept)
