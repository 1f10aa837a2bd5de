"""Tensors between host and device without a wait: pinned memory on the way in, an event on the way back.

On a CPU nothing is copied: host and device are the same memory.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pretrain.process_group import device


def pinned(value: Tensor) -> Tensor:
    """The host tensor in page-locked memory, from which a copy to the device needs no wait."""
    return value if device().type == "cpu" else value.pin_memory()


def to_device(value: Tensor) -> Tensor:
    """A copy of a pinned tensor on the device; the host goes on at once.

    torch's allocator keeps the pinned memory until the copy is done.
    """
    return value.to(device(), non_blocking=True)


class Fetched:
    """Host copies of tensors that the device may not have computed yet.

    The copies are queued behind what computes the tensors; `read` waits for them, not for what is queued
    later.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._values = {name: _queued_copy(value.detach()) for name, value in tensors.items()}
        self._done = None if device().type == "cpu" else torch.Event(device())
        if self._done is not None:
            self._done.record()

    def read(self) -> dict[str, Tensor]:
        """The tensors by name, in host memory."""
        if self._done is not None:
            self._done.synchronize()
        return self._values


def _queued_copy(value: Tensor) -> Tensor:
    if value.device.type == "cpu":  # also with offload, where the gradient norm is in host memory
        return value
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
