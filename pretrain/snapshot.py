"""A checkpoint's contents, copied to host memory while training stands still, or on CUDA goes on."""

import copy
from typing import Any

import torch
from torch import Tensor


class HostCopies:
    """Copies of tensors in host memory.

    On CUDA they go to pinned memory, which is kept and used again by the next snapshot, on a stream of their
    own: training goes on meanwhile, and only its next optimizer step waits, on the device. On a CPU each copy
    has memory of its own, which is free when the checkpoint is written.

    Args:
        reuse: keep the memory; the copies of one snapshot are overwritten by the next.
    """

    def __init__(self, device: torch.device, reuse: bool) -> None:
        self.reuse = reuse
        self.api = torch.get_device_module(device)
        self.stream, self.done = self.api.Stream(), self.api.Event()
        self._kept: list[tuple[Any, Tensor]] = []  # in the order of a snapshot, which is always the same
        self._used = 0

    def begin(self) -> None:
        """Before the first copy of a snapshot; the last snapshot's copies have been written by now."""
        self._used = 0

    def deep(self, value: Any) -> Any:
        """A deep copy with its tensors in host memory, once `wait` returns."""
        if isinstance(value, Tensor):
            return self.copy(value.detach())
        if isinstance(value, dict):
            return {key: self.deep(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.deep(item) for item in value)
        return copy.deepcopy(value)

    def copy(self, tensor: Tensor) -> Tensor:
        """A tensor of equal values, shape and strides in host memory, once `wait` returns."""
        if tensor.device.type == "cpu":  # offloaded, or all there is
            target = self._memory(tensor, pinned=False)
            return target.copy_(tensor)
        target = self._memory(tensor, pinned=True)
        # Here and not once in `begin`: DeepSpeed makes some of the tensors while it saves.
        self.stream.wait_stream(self.api.current_stream())
        with self.api.stream(self.stream):
            target.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.stream)  # a temporary tensor's memory is not used again before
        return target

    def _memory(self, tensor: Tensor, pinned: bool) -> Tensor:
        if not self.reuse:
            return torch.empty_like(tensor, device="cpu", pin_memory=pinned)
        number, self._used = self._used, self._used + 1
        form = tensor.shape, tensor.dtype, tensor.stride(), pinned
        if number == len(self._kept) or self._kept[number][0] != form:
            memory = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
            self._kept[number : number + 1] = [(form, memory)]
        return self._kept[number][1]

    def end(self) -> None:
        """After the last copy of a snapshot has been asked for."""
        self.done.record(self.stream)

    def hold(self) -> None:
        """Makes what the device does from here on wait for the copies: it overwrites their sources."""
        self.done.wait(self.api.current_stream())

    def wait(self) -> None:
        """Returns when the copies are whole."""
        self.done.synchronize()
