"""Tokens to the rows of their experts, sorted by expert, and back.

Shapes: N tokens, D hidden, E experts, K experts per token.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Dispatch(NamedTuple):
    """Which row of the experts' input each token takes."""

    order: Tensor  # (N*K,) the number n*K + k of each row, sorted by expert
    back: Tensor  # (N*K,) its inverse: the row of each number
    counts: Tensor  # (E,) rows of each expert


def dispatch(chosen: Tensor, experts: int) -> Dispatch:
    """chosen (N, K), expert numbers within 0..experts-1."""
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    # Not bincount: on a GPU the host waits for the largest number in it.
    counts = flat.new_zeros(experts).scatter_add_(0, flat, torch.ones_like(flat))
    return Dispatch(order, inverse_permutation(order), counts)


def inverse_permutation(order: Tensor) -> Tensor:
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return back


class Permute(torch.autograd.Function):
    """Rows in another order: x[order]. Its gradient gathers too; indexing's would scatter and add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        """x (n, ...), order (n,) a permutation and back (n,) its inverse -> like x."""
        ctx.save_for_backward(back)
        return x[order]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return grads[0][back], None, None


class ToRows(torch.autograd.Function):
    """A copy of every token for each of its K experts, sorted by expert."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        """x (N, D), order and back (N*K,) -> (N*K, D)."""
        ctx.save_for_backward(back)
        ctx.K = len(order) // len(x)
        return x[order // ctx.K]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return grads[0][back].unflatten(0, (-1, ctx.K)).sum(1), None, None


class ToTokens(torch.autograd.Function):
    """Every token's sum over its K rows: one pass that gathers and adds in fp32, without a sorted copy."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor, K: int) -> Tensor:
        """rows (N*K, D) sorted by expert, order and back (N*K,) -> (N, D)."""
        ctx.save_for_backward(order)
        ctx.K = K
        starts = torch.arange(0, len(back), K, device=back.device)
        out: Tensor = torch.ops.aten._embedding_bag_forward_only(rows, back, starts)[0]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        return grads[0][order // ctx.K], None, None, None
