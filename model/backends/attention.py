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
from model.backends.flash import Documents, flash_attn, flash_attn_4, varlen
from model.context import AttentionContext
from model.layers import product_dtype, upcasts

# (query, key, value, context, scale), see attend
Backend = Callable[[Tensor, Tensor, Tensor, AttentionContext, float], Tensor]


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
    elif mask is None and width != query.shape[-1]:  # so does a GPU's, which takes no mask
        query, key, value = (_widened(x, max(width, query.shape[-1])) for x in (query, key, value))
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


def _by_documents(function: Callable[[Tensor, Tensor, Tensor, Documents, float], Tensor]) -> Backend:
    def backend(query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, scale: float) -> Tensor:
        assert context.documents is not None
        return function(query, key, value, context.documents, scale)

    return backend


def _widened(x: Tensor, width: int) -> Tensor:
    """Pads with zero columns up to `width`: they add nothing to scores, and the caller cuts values' off."""
    return F.pad(x, (0, max(width - x.shape[-1], 0)))


_BACKENDS: dict[str, Backend] = {
    "sdpa": _sdpa,
    "blockwise": _blockwise,
    "flex": _flex,
    "varlen": _by_documents(varlen),
    "flash_attn": _by_documents(flash_attn),
    "flash_attn_4": _by_documents(flash_attn_4),
}
