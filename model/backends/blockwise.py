"""Causal attention on a CPU: blocks of queries against the keys at or before them, by batched products.

Faster than torch's fused CPU kernel, which also computes masked scores, and uses as little memory: backward
recomputes the attention weights. Shapes: B rows, N rows times heads, T tokens, K key width, V value width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

QUERIES = 128  # queries per block; with more, more scores are masked away; with fewer, products get small


class BlockwiseMask(NamedTuple):
    """Which keys the queries see, where that is less than all keys up to their own."""

    mask: Tensor  # (B, 1, T, T) booleans, True: visible
    begins: list[int]  # for each block the first key that any of its queries sees


def blockwise_mask(mask: Tensor) -> BlockwiseMask:
    """From a causal mask (B, 1, T, T) in which every query sees some key."""
    first_key = mask[:, 0].byte().argmax(-1).amin(0)  # (T,)
    return BlockwiseMask(mask, [int(block.min()) for block in first_key.split(QUERIES)])


class BlockwiseAttention(torch.autograd.Function):
    """softmax(scale * query key^T + mask) value, where each query sees keys up to its own position."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: BlockwiseMask | None, scale: float
    ) -> Tensor:
        """query, key (N, T, K), value (N, T, V), N a multiple of B -> (N, T, V)."""
        ctx.save_for_backward(query, key, value)
        ctx.mask, ctx.scale = mask, scale
        out = torch.empty_like(value)
        for begin, start, end in _blocks(query, mask):
            weights = _weights(query, key, mask, scale, begin, start, end)
            out[:, start:end].baddbmm_(weights, value[:, begin:end], beta=0)  # bmm(out=) breaks a graph
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value = ctx.saved_tensors
        scale, grad = ctx.scale, grads[0].contiguous()
        grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
        for begin, start, end in _blocks(query, ctx.mask):
            weights = _weights(query, key, ctx.mask, scale, begin, start, end)
            rows = grad[:, start:end]
            grad_value[:, begin:end].baddbmm_(weights.transpose(1, 2), rows)
            grad_weights = rows @ value[:, begin:end].transpose(1, 2)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_query[:, start:end].baddbmm_(grad_scores, key[:, begin:end], beta=0, alpha=scale)
            grad_key[:, begin:end].baddbmm_(grad_scores.transpose(1, 2), query[:, start:end], alpha=scale)
        return grad_query, grad_key, grad_value, None, None


def _blocks(query: Tensor, mask: BlockwiseMask | None) -> list[tuple[int, int, int]]:
    """First key, first query and end of every block."""
    T = query.shape[1]
    starts = range(0, T, QUERIES)
    begins = [0] * len(starts) if mask is None else mask.begins
    return [(b, start, min(start + QUERIES, T)) for b, start in zip(begins, starts, strict=True)]


def _weights(
    query: Tensor, key: Tensor, mask: BlockwiseMask | None, scale: float, begin: int, start: int, end: int
) -> Tensor:
    """Attention weights (N, end - start, end - begin) of the queries start..end."""
    N, rows, keys = len(query), end - start, end - begin
    scores = query.new_empty(N, rows, keys)
    scores.baddbmm_(query[:, start:end], key[:, begin:end].transpose(1, 2), beta=0, alpha=scale)
    if mask is None:
        later = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu(1)
        scores[:, :, start - begin :].masked_fill_(later, float("-inf"))
    else:
        invisible = ~mask.mask[:, :, start:end, begin:end]  # causal too
        scores.view(len(invisible), -1, rows, keys).masked_fill_(invisible, float("-inf"))
    return scores.softmax(-1)
