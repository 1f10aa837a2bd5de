"""Causal attention on a CPU: blocks of queries against the keys at or before them, by batched products.

Faster than torch's fused CPU kernel, which also computes what the mask hides, and as frugal: the weights are
formed again in backward. Shapes: B rows, N rows times heads, T tokens, K key width, V value width.
"""

from typing import Any

import torch
from torch import Tensor

QUERIES = 128  # queries a block; more compute hidden scores, fewer make small products


class BlockwiseAttention(torch.autograd.Function):
    """softmax(scale * query key^T + mask) value, each query seeing keys at or before its own place only."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """query, key (N, T, K), value (N, T, V) -> (N, T, V).

        mask: (B, 1, T, T) booleans, True where a query may look, of what is causal; None: everywhere.
        """
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        out = torch.empty_like(value)
        for start, end in _blocks(query):
            weights = _weights(query, key, mask, scale, start, end)
            torch.bmm(weights, value[:, :end], out=out[:, start:end])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, mask = ctx.saved_tensors
        scale, grad = ctx.scale, grads[0].contiguous()
        grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
        for start, end in _blocks(query):
            weights = _weights(query, key, mask, scale, start, end)
            rows = grad[:, start:end]
            grad_value[:, :end].baddbmm_(weights.transpose(1, 2), rows)
            grad_weights = rows @ value[:, :end].transpose(1, 2)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_query[:, start:end].baddbmm_(grad_scores, key[:, :end], beta=0, alpha=scale)
            grad_key[:, :end].baddbmm_(grad_scores.transpose(1, 2), query[:, start:end], alpha=scale)
        return grad_query, grad_key, grad_value, None, None


def _blocks(query: Tensor) -> list[tuple[int, int]]:
    T = query.shape[1]
    return [(start, min(start + QUERIES, T)) for start in range(0, T, QUERIES)]


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, scale: float, start: int, end: int) -> Tensor:
    """Attention weights (N, end - start, end) of the queries start..end."""
    N, rows = len(query), end - start
    scores = query.new_empty(N, rows, end)
    scores.baddbmm_(query[:, start:end], key[:, :end].transpose(1, 2), beta=0, alpha=scale)
    later = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu(1)
    scores[:, :, start:].masked_fill_(later, float("-inf"))
    if mask is not None:
        hidden = ~mask[:, :, start:end, :end]  # (B, 1, rows, end)
        scores.view(len(mask), -1, rows, end).masked_fill_(hidden, float("-inf"))
    return scores.softmax(-1)
