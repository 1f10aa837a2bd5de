"""A GPU that computes nothing: shapes, dtypes and devices are real, numbers are not.

Code that runs under `fake_gpu()` fails where tensors meet on different devices, and `Waits` lists each place
where the host would have to wait for the device. Neither needs a GPU. An exception during backward aborts
the process without a traceback; run backward outside fake_gpu(), on the CPU, to see it.
"""

import functools
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

ROOT = Path(__file__).parents[1]
ROOMS = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()} - {"tests"}
aten = torch.ops.aten
Model = TypeVar("Model", bound=nn.Module)


class _Device(_DummyBackendModule):
    """What activation checkpointing asks of a device: its random state, what it autocasts to."""

    def device(self, index: int) -> Any:
        return nullcontext()

    def get_rng_state(self) -> Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


@functools.cache
def device() -> torch.device:
    """The pretended GPU. Not "cuda", which needs a driver; this one has the guard that autograd needs."""
    _setup_privateuseone_for_python_backend("fakegpu", _Device())
    return torch.device("fakegpu:0")


class Waits(TorchDispatchMode):
    """Counts in `found` what makes the host wait for the device: (place, kind) -> times.

    A place is `room/.../file.py:function`, the innermost frame of this repository's rooms; "autograd" if
    there is none. Kinds: `item` (a value is read), `shape` (the number of results depends on values), `copy`
    (between host and device). A copy with non_blocking=True to the host, or from pinned memory, is no wait
    and is counted in `queued`: whoever reads it must wait for an event.

    Args:
        answer: what every value that is read turns out to be.
    """

    def __init__(self, answer: int = 1) -> None:
        super().__init__()
        self.answer = answer
        self.found, self.queued = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
        self._pinned: dict[int, Any] = {}  # storages, kept alive so that none is taken for another

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            if args[0].device == device():
                self.found[_place(), "item"] += 1
            return _as_number(args[0].dtype, self.answer)
        if func is aten.is_pinned.default:
            return self._is_pinned(args[0])
        if func in _SHAPED and args[0].device == device() and kwargs.get("output_size") is None:
            self.found[_place(), "shape"] += 1
            return _SHAPED[func](*args, **kwargs)
        if func in _INDEXING and args[0].device == device():
            args = (args[0], self._indices(args[1]), *args[2:])
        pinned = kwargs.pop("pin_memory", None) or func is aten._pin_memory.default
        out = args[0].clone() if func is aten._pin_memory.default else func(*args, **kwargs)
        if pinned:
            self._pinned[out.untyped_storage()._cdata] = out.untyped_storage()
        if func in _COPIES:
            source, target = (args[0], out) if func is aten._to_copy.default else (args[1], args[0])
            self._copied(source, target, kwargs.get("non_blocking", len(args) > 2 and args[2]))
        return out

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def _copied(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        if device() not in (source.device, target.device) or source.device == target.device:
            return
        # A new tensor of a non-blocking copy to the host is pinned by torch itself.
        queued = non_blocking and (source.device == device() or self._is_pinned(source))
        (self.queued if queued else self.found)[_place(), "copy"] += 1

    def _indices(self, indices: list[Tensor | None]) -> list[Tensor | None]:
        """The same with numbers instead of masks, as if these were True everywhere."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is not None and index.device != device():
                self.found[_place(), "copy"] += 1
                index = torch.empty_like(index, device=device())
            if index is None or index.dtype != torch.bool:
                found.append(index)
                continue
            self.found[_place(), "shape"] += 1
            found += [index.new_zeros(index.numel(), dtype=torch.int64) for _ in range(index.dim())]
        return found


_COPIES = (aten._to_copy.default, aten.copy_.default)
_INDEXING = (
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
)
# Operations whose results depend on values, and a result as good as any.
_SHAPED: dict[Any, Callable[..., Any]] = {
    aten.bincount.default: lambda x, weights=None, minlength=0: x.new_zeros(max(minlength, 1)),
    aten.nonzero.default: lambda x: x.new_zeros((x.numel(), x.dim()), dtype=torch.int64),
    aten.masked_select.default: lambda x, mask: x.new_zeros(x.numel()),
    aten.repeat_interleave.Tensor: lambda repeats, output_size=None: repeats.new_zeros(len(repeats)),
    aten._unique2.default: lambda x, *_, **__: (x.flatten(), torch.zeros_like(x), x.flatten()),
    aten.unique_consecutive.default: lambda x, *_, **__: (x.flatten(), torch.zeros_like(x), x.flatten()),
    aten.equal.default: lambda a, b: True,
}


def _as_number(dtype: torch.dtype, value: int) -> bool | int | float:
    if dtype == torch.bool:
        return bool(value)
    return float(value) if dtype.is_floating_point else value


def _place() -> str:
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if frame.name == "__torch_dispatch__":  # another recorder, such as activation checkpointing's
            continue
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ROOMS:
            return f"{path.relative_to(ROOT)}:{frame.name}"
    return "autograd"


@contextmanager
def fake_gpu(answer: int = 1) -> Iterator[Waits]:
    """Inside, tensors on `device()` can be used; backward runs in the same thread, so that it is recorded."""
    device()
    with (
        FakeTensorMode(allow_non_fake_inputs=False),
        Waits(answer) as waits,
        torch.autograd.set_multithreading_enabled(False),
    ):
        yield waits


def on_gpu(build: Callable[[], Model], dtype: torch.dtype = torch.bfloat16) -> Model:
    """What `build` makes, with its weights in `dtype` on the pretended GPU; call inside fake_gpu()."""
    with torch.device("meta"):
        model = build()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                value = torch.empty(parameter.shape, dtype=dtype, device=device())
                module._parameters[name] = nn.Parameter(value, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device())
    return model
