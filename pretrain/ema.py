"""Exponential moving average of the weights, kept as ZeRO keeps them: each rank averages its own shards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from pretrain.checkpoint import EMA


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


def average_files(
    average: MovingAverage, parameters: Callable[[], Iterator[tuple[str, Tensor]]], rank: int, world_size: int
) -> dict[str, bytes]:
    """The average as checkpoint files: whole tensors by name, so that any layout can read them. This rank's
    are in host memory until they are written; the ranks share them evenly.

    Args:
        parameters: name and whole value of every trained parameter as it is; all ranks take part.
    """
    files, held = {}, [0] * world_size  # bytes of every rank
    with average.in_place():
        for name, value in parameters():
            owner = held.index(min(held))
            held[owner] += value.nbytes
            if owner == rank:
                files[f"{EMA}/{name}.safetensors"] = to_safetensors({name: value.cpu().contiguous()})
    return files


def read_average(checkpoint: Path, name: str) -> Tensor:
    """The average of a parameter, whole, from a checkpoint that holds one."""
    return load_file(checkpoint / EMA / f"{name}.safetensors")[name]
