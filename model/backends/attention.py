"""Softmax attention over expanded heads behind one switch, and who may see whom.

Shapes: B batch, T query tokens, S key tokens, H query heads, G key-value heads, K key width, V value width.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from model.backends.blockwise import BlockwiseAttention, Hidden
from model.cache import LatentCache, kept_keys, slot_of
from model.config.recurrence import RecurrenceConfig
from model.layers import product_dtype, upcasts


@dataclass
class AttentionContext:
    """What every attention layer of one forward pass shares."""

    rotation: Tensor | None  # (B or 1, T, R/2) complex, see layers.rotations; None: positions are learned
    backend: str  # see execution.attention_backend
    mask: Tensor | None  # (B or 1, 1, T, S) booleans, True: may attend; None: plain causal
    token_mask: Tensor | None  # (B, T) booleans, False: padding; None: every token is real
    boundaries: Tensor | None = None  # (n,) int32, starts of the documents in the B*T tokens of all rows
    block_mask: Any = None  # flex_attention's form of the mask
    hidden: Hidden | None = None  # blockwise attention's; None: plain causal
    cache: LatentCache | None = None
    statistics: bool = False  # whether there are targets: experts report balance and load
    segment: Tensor | None = None  # (B or 1, S), see segments; None: one document without padding a row
    num_steps: int = 1  # of every loop
    loop: "LoopStep | None" = None  # inside a looped layer
    positions: Tensor | None = None  # (B or 1, T) int64, where they are learned
    states: list[Tensor] | None = None  # gets the output (B, T, D) of every run of a decoder layer, in order

    def observe(self, layer: int, *query: Tensor) -> None:
        """Hands a layer's rotated query, in parts (B, T, H, width), to a cache that collects them."""
        if self.cache is None or self.cache.queries is None:
            return
        first = last = 0
        if self.loop is not None:
            config, last = self.loop.config, slot_of(self.loop.config, self.loop.step)
            first = 0 if config.cache == "parallel" else last
        for slot in range(first, last + 1):  # those that `remember` shows
            self.cache.queries.setdefault((layer, slot), []).append(torch.cat(query, -1))

    def remember(self, layer: int, new: Tensor) -> "Remembered":
        """new (B, T, W), keys and values of a layer's tokens -> all that they may attend to."""
        if self.loop is None:
            return Remembered(new if self.cache is None else self.cache.append((layer, 0), new), self, None)
        config, kept = self.loop.config, None
        slots: tuple[Tensor, ...] = (new,)
        first = slot_of(config, self.loop.step)
        if config.carries_keys:
            slots = kept = kept_keys(
                config, self.loop.kept.get(layer), new, self.loop.step, self.loop.running
            )
            first = 0 if config.cache == "parallel" else first
        if self.cache is not None:
            slots = tuple(self.cache.append((layer, first + i), s) for i, s in enumerate(slots))
        if len(slots) == 1:
            return Remembered(slots[0], self, kept)
        assert self.mask is not None
        tiled = dataclasses.replace(self, mask=self.mask.repeat(1, 1, 1, len(slots)))
        return Remembered(torch.cat(slots, 1), tiled, kept)


class LoopStep(NamedTuple):
    """Where a looped layer stands."""

    config: RecurrenceConfig
    step: int
    running: Tensor | None  # (B, T), False: has halted; None: all run
    kept: dict[int, tuple[Tensor, ...]]  # what the step before left, by layer; see cache.kept_keys


class Remembered(NamedTuple):
    """Keys and values to attend to."""

    held: Tensor  # (B, S, W); of several steps side by side: (B, steps S, W)
    context: AttentionContext  # whose mask fits them
    kept: tuple[Tensor, ...] | None  # for the next loop step


def segments(real: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(B, S) numbers; a query sees the keys of its own number at or before its own place.

    Documents count from 0. Every padded token has a negative number of its own: nobody sees it but itself,
    for a query without any key would turn into NaN.

    Args:
        real: (B, S) booleans, False under padding.
        cu_seqlens: (B, n) starts of the documents of each row, padded with S; None: one document.
    """
    place = torch.arange(real.shape[1], device=real.device).expand_as(real).contiguous()
    document = (
        torch.zeros_like(place)
        if cu_seqlens is None
        else torch.searchsorted(cu_seqlens, place, right=True) - 1
    )
    return torch.where(real, document, -1 - place)


def visible_keys(segment: Tensor, query_length: int) -> Tensor:
    """segments (B, S) -> (B, 1, T, S) booleans for the last T = query_length tokens."""
    place = torch.arange(segment.shape[1], device=segment.device)
    first = segment.shape[1] - query_length
    causal = place <= place[first:, None]
    return ((segment[:, first:, None] == segment[:, None, :]) & causal)[:, None]


def flex_mask(segment: Tensor) -> Any:
    """The same rule for a whole row as flex_attention wants it."""

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (segment[b, q] == segment[b, k]) & (k <= q)

    B, S = segment.shape
    return create_block_mask(visible, B, None, S, S, device=segment.device)


def row_boundaries(B: int, T: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """Starts of all documents in the flattened B*T tokens, and the end; empty documents are allowed."""
    rows = torch.arange(B, device=device, dtype=torch.int32)[:, None] * T
    starts = rows if cu_seqlens is None else rows + cu_seqlens.int()
    return F.pad(starts.flatten(), (0, 1), value=B * T)


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
    if query.device.type == "cpu":  # its fused kernel wants equal widths
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
    causal = context.mask is None and query.shape[1] > 1  # one token sees all that is cached
    return sdpa(query, key, value, context.mask, causal, scale)


def _blockwise(query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, scale: float) -> Tensor:
    original, dtype = query.dtype, product_dtype(query)
    H, group = query.shape[2], query.shape[2] // key.shape[2]
    if group > 1:
        key, value = key.repeat_interleave(group, 2), value.repeat_interleave(group, 2)
    query, key, value = (x.transpose(1, 2).flatten(0, 1).to(dtype) for x in (query, key, value))
    out = BlockwiseAttention.apply(query, key, value, context.hidden, scale)
    return out.unflatten(0, (-1, H)).transpose(1, 2).to(original)


def _flex(query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, scale: float) -> Tensor:
    return _flex_function(query.device.type)(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        block_mask=context.block_mask,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    ).transpose(1, 2)


@functools.cache
def _flex_function(device: str) -> Any:
    """Only the compiled function is fused; on a CPU it would compile for minutes to save little."""
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
    """Zero columns up to `width`: they change nothing and are cut off again."""
    return F.pad(value, (0, max(width - value.shape[-1], 0)))


_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, AttentionContext, float], Tensor]] = {
    "sdpa": _sdpa,
    "blockwise": _blockwise,
    "flex": _flex,
    "varlen": _varlen,
    "flash_attn": _flash_attn,
}
