"""Activation checkpointing in which a router never chooses twice."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

# Operations whose results are kept. A router that chose again could choose differently, by rounding.
_CHOICE = (torch.ops.aten.topk.default,)
_SAVED: dict[str, tuple[Any, ...]] = {
    "block": _CHOICE,
    "iteration": _CHOICE,
    "selective": (
        *_CHOICE,
        torch.ops.aten.mm.default,
        torch.ops.aten._grouped_mm.default,
        torch.ops.aten._scaled_mm_v2.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    ),
}


class _Record(TorchDispatchMode):
    """Keeps the results of some operations.

    torch's selective checkpointing requires the recomputation to run exactly the same operations. Under
    ZeRO-3 it does not: weights that were still gathered in the forward pass are gathered again.
    """

    def __init__(self, operations: tuple[Any, ...]) -> None:
        super().__init__()
        self.operations, self.results = operations, list[Any]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in self.operations:
            self.results.append(out)
        return out


class _Replay(TorchDispatchMode):
    """Returns the recorded results, in order, instead of computing them again."""

    def __init__(self, record: _Record) -> None:
        super().__init__()
        self.record, self.used = record, 0

    def __enter__(self) -> Any:
        self.used = 0
        return super().__enter__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in self.record.operations:
            return func(*args, **(kwargs or {}))
        self.used += 1
        return self.record.results[self.used - 1]


def recomputed(policy: str, function: Callable[..., Any], *inputs: Any) -> Any:
    """function(*inputs); backward recomputes what `policy` does not keep."""

    def contexts() -> tuple[_Record, _Replay]:
        record = _Record(_SAVED[policy])
        return record, _Replay(record)

    # Keeps the random state, so that LoRA's dropout drops the same entries again.
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=True, context_fn=contexts)
