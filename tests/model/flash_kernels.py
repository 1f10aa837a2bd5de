"""Plain kernels in place of those of a GPU: the same operators, arguments, checks and results, on a CPU.

Written from the kernels' contract (flash_api.cpp of torch, flash_attn_interface.py of flash-attn 2.8,
interface.py of flash-attn-4): each document is computed by itself. Rows beyond `max_q` stay NaN, because no
block of a kernel is launched for them.
"""

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import _registry


@dataclass
class Call:
    """What a kernel was given."""

    kernel: str
    boundaries: list[int]
    longest: int
    widths: tuple[int, int]


@dataclass
class Kernels:
    """The kernels by their names, and every call."""

    calls: list[Call] = field(default_factory=list)
    active: str = "torch"

    def check(
        self, query: Tensor, key: Tensor, value: Tensor, bounds: tuple[Tensor, Tensor], longest: int
    ) -> None:
        """What flash_api.cpp checks, but for device and 16 bits, and what it relies on."""
        (N, H, K), (S, G, V) = query.shape, value.shape
        assert key.shape == (S, G, K)
        assert N == S
        assert H % G == 0
        assert query.dtype == key.dtype == value.dtype
        assert all(width % 8 == 0 and 8 <= width <= 256 for width in (K, V))
        assert K == V or self.active == "FA4"
        assert all(x.stride(-1) == 1 for x in (query, key, value))
        for bound in bounds:
            assert bound.dtype == torch.int32
            assert bound.dim() == 1
            assert bound.is_contiguous()
            assert bound[0] == 0
            assert bound[-1] == N
            assert (bound.diff() >= 0).all()
        assert type(longest) is int
        self.calls.append(Call(self.active, bounds[0].tolist(), longest, (K, V)))


def _documents(bounds: Tensor, longest: int) -> list[slice]:
    """The rows that blocks are launched for."""
    ends = bounds.tolist()
    return [slice(a, min(b, a + longest)) for a, b in zip(ends, ends[1:], strict=False) if a < b]


def _scores(query: Tensor, key: Tensor, rows: slice, scale: float) -> Tensor:
    """(H, n, n) fp32 of one document, -inf above the diagonal."""
    keys = key[rows].float().repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = torch.einsum("qhk,shk->hqs", query[rows].float(), keys) * scale
    n = scores.shape[-1]
    return scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))


def plain(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(N, H, K), (N, G, K), (N, G, V) -> causal attention within documents (N, H, V), log-sum-exps (H, N)."""
    group = query.shape[1] // key.shape[1]
    out = query.new_full((*query.shape[:2], value.shape[-1]), float("nan"))
    sums = query.new_full((query.shape[1], len(query)), float("nan"), dtype=torch.float32)
    for rows in _documents(bounds, longest):
        scores = _scores(query, key, rows, scale)
        values = value[rows].float().repeat_interleave(group, 1)
        out[rows] = torch.einsum("hqs,shv->qhv", scores.softmax(-1), values).to(out.dtype)
        sums[:, rows] = scores.logsumexp(-1)
    return out, sums


def plain_backward(
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    sums: Tensor,
    bounds: Tensor,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from the stored output and log-sum-exps (FlashAttention-2, arXiv 2307.08691, algorithm 2)."""
    query, key, value = inputs
    H, G = query.shape[1], key.shape[1]
    grads = [torch.full_like(x, float("nan")) for x in inputs]
    for rows in _documents(bounds, longest):
        weights = (_scores(query, key, rows, scale) - sums[:, rows, None]).exp()
        keys, values = (x[rows].float().repeat_interleave(H // G, 1) for x in (key, value))
        upstream = grad[rows].float()
        mean = (upstream * out[rows].float()).sum(-1).T[:, :, None]
        scores = weights * (torch.einsum("qhv,shv->hqs", upstream, values) - mean) * scale
        of_keys = torch.einsum("hqs,qhk->shk", scores, query[rows].float())
        of_values = torch.einsum("hqs,qhv->shv", weights, upstream)
        grads[0][rows] = torch.einsum("hqs,shk->qhk", scores, keys).to(query.dtype)
        grads[1][rows] = of_keys.unflatten(1, (G, -1)).sum(2).to(key.dtype)
        grads[2][rows] = of_values.unflatten(1, (G, -1)).sum(2).to(value.dtype)
    return grads[0], grads[1], grads[2]


def install(monkeypatch: pytest.MonkeyPatch) -> tuple[Kernels, Callable[[], None]]:
    """Puts the plain kernels in place of torch's, of flash-attn 2 and of flash-attn-4; returns how to undo
    what monkeypatch does not.
    """
    kernels = Kernels()

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bounds_q: Tensor,
        bounds_k: Tensor,
        max_q: int,
        max_k: int,
        dropout: float,
        causal: bool,
        return_debug_mask: bool,
        *,
        scale: float,
        window_size_left: int,
        window_size_right: int,
        **others: Any,
    ) -> tuple[Tensor, ...]:
        assert causal
        assert (window_size_left, window_size_right) == (-1, 0)
        assert dropout == 0
        assert max_q == max_k
        assert all(other is None for other in others.values())
        kernels.check(query, key, value, (bounds_q, bounds_k), max_q)
        state = torch.zeros(2, dtype=torch.uint64)
        return (*plain(query, key, value, bounds_q, max_q, scale), state, state[:1], query.new_empty(0))

    def backward(
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        sums: Tensor,
        bounds_q: Tensor,
        bounds_k: Tensor,
        max_q: int,
        max_k: int,
        dropout: float,
        causal: bool,
        state: Tensor,
        unused: Tensor,
        *,
        scale: float,
        window_size_left: int,
        window_size_right: int,
    ) -> tuple[Tensor, ...]:
        assert grad.stride(-1) == out.stride(-1) == 1
        assert grad.shape == out.shape
        assert sums.dtype == torch.float32
        assert sums.shape == (query.shape[1], len(query))
        return plain_backward(grad, (query, key, value), out, sums, bounds_q, max_q, scale)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> Tensor:
        assert causal
        assert softmax_scale is not None
        assert dropout_p == 0
        assert max_seqlen_q == max_seqlen_k
        kernels.active = "flash_attn"
        kernels.check(q, k, v, (cu_seqlens_q, cu_seqlens_k), max_seqlen_q)
        return plain(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale)[0]

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)

    class Handle:
        def __init__(self) -> None:
            kernels.active = "FA4"

        def remove(self) -> None:
            kernels.active = "torch"

    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA4", Handle)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    return kernels, library._destroy
