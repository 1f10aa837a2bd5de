"""Activation checkpointing that never lets a router choose a second time."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

# Operations whose results are kept. A router that chose again could choose otherwise, by rounding.
_CHOICE = [torch.ops.aten.topk.default]
_SAVED: dict[str, list[Any]] = {
    "block": _CHOICE,
    "iteration": _CHOICE,
    "selective": [
        *_CHOICE,
        torch.ops.aten.mm.default,
        torch.ops.aten._grouped_mm.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    ],
}


def recomputed(policy: str, function: Callable[..., Any], *inputs: Any) -> Any:
    """function(*inputs), of which backward recomputes what `policy` does not keep."""
    contexts = functools.partial(create_selective_checkpoint_contexts, _SAVED[policy])
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
