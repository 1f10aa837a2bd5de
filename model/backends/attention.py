"""Softmax attention over expanded heads, behind one switch.

Shapes: B batch, T query tokens, S key tokens, H query heads, G key-value heads, K key width, V value width.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from model.backends.blockwise import BlockwiseAttention
from model.context import AttentionContext
from model.layers import product_dtype, upcasts


def attend(query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, scale: float) -> Tensor:
    """query (B, T, H, K), key (B, S, G, K), value (B, S, G, V) -> (B, T, H, V); H a multiple of G."""
    return _BACKENDS[context.backend](query, key, value, context, scale)


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """torch's fused attention on (B, T, H, K), (B, S, G, K), (B, S, G, V) -> (B, T, H, V)."""
    dtype = query.dtype
    if upcasts(query):
        query, key, value = query.float(), key.float(), value.float()
    width = value.shape[-1]
    if query.device.type == "cpu":  # the fused kernel needs equal widths
        value = _widened(value, query.shape[-1])
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return out[..., :width].transpose(1, 2).to(dtype)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, scale: float) -> Tensor:
    causal = context.mask is None and query.shape[1] > 1  # a single token sees the whole cache
    return sdpa(query, key, value, context.mask, causal, scale)


def _blockwise(query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, scale: float) -> Tensor:
    original, dtype = query.dtype, product_dtype(query)
    H, group = query.shape[2], query.shape[2] // key.shape[2]
    if group > 1:
        key, value = key.repeat_interleave(group, 2), value.repeat_interleave(group, 2)
    query, key, value = (x.transpose(1, 2).flatten(0, 1).to(dtype) for x in (query, key, value))
    out = BlockwiseAttention.apply(query, key, value, context.blockwise_mask, scale)
    return out.unflatten(0, (-1, H)).transpose(1, 2).to(original)


def _flex(query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, scale: float) -> Tensor:
    return _flex_function(query.device.type)(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        block_mask=context.flex_mask,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    ).transpose(1, 2)


@functools.cache
def _flex_function(device: str) -> Any:
    """Only the compiled function is fused; on a CPU, compiling takes minutes and saves little."""
    return flex_attention if device == "cpu" else torch.compile(flex_attention)


def _varlen(query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    T, width, bounds = query.shape[1], value.shape[-1], context.boundaries
    assert bounds is not None
    out = varlen_attn(
        query.flatten(0, 1),
        key.flatten(0, 1),
        _widened(value, query.shape[-1]).flatten(0, 1),
        bounds,
        bounds,
        T,
        T,
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=query.shape[2] != key.shape[2],
    )
    assert isinstance(out, Tensor)
    return out.unflatten(0, (-1, T))[..., :width]


def _flash_attn(query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, scale: float) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    T, width, bounds = query.shape[1], value.shape[-1], context.boundaries
    out = flash_attn_varlen_func(
        query.flatten(0, 1),
        key.flatten(0, 1),
        _widened(value, query.shape[-1]).flatten(0, 1),
        bounds,
        bounds,
        T,
        T,
        softmax_scale=scale,
        causal=True,
    )
    return out.unflatten(0, (-1, T))[..., :width]


def _widened(value: Tensor, width: int) -> Tensor:
    """Pads with zero columns up to `width`; they change nothing and the caller cuts them off."""
    return F.pad(value, (0, max(width - value.shape[-1], 0)))


_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, AttentionContext, float], Tensor]] = {
    "sdpa": _sdpa,
    "blockwise": _blockwise,
    "flex": _flex,
    "varlen": _varlen,
    "flash_attn": _flash_attn,
}
