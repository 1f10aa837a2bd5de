"""What all layers of one forward pass share, who may attend to whom, and what a loop remembers.

Shapes: B batch, T query tokens, S key tokens, H query heads, R rotary width, W numbers per cached token.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from model.backends.blockwise import BlockwiseMask, blockwise_mask
from model.cache import LatentCache, full_mask, kept_keys, slot_of
from model.config.execution import ExecutionConfig, attention_backend, require_fp8
from model.config.model import ModelConfig
from model.config.recurrence import RecurrenceConfig
from model.layers import rotations


@dataclass
class AttentionContext:
    """What every attention layer of one forward pass shares."""

    rotation: Tensor | None = None  # (B or 1, T, R/2) complex, see layers.rotations; None: learned positions
    positions: Tensor | None = None  # (B or 1, T) int64, where they are learned
    backend: str = "sdpa"  # see execution.attention_backend
    mask: Tensor | None = None  # (B or 1, 1, T, S) booleans, True: may attend; None: plain causal
    blockwise_mask: BlockwiseMask | None = None  # the mask in blockwise attention's form
    flex_mask: Any = None  # the mask in flex_attention's form
    boundaries: Tensor | None = None  # (n,) int32, starts of the documents in the B*T tokens of all rows
    segment: Tensor | None = None  # (B or 1, S), see segments; None: one document per row, without padding
    token_mask: Tensor | None = None  # (B, T) booleans, False: no part of statistics; None: all are real
    row_weights: Tensor | None = None  # (B,) of the rows in the experts' losses; None: 1
    cache: LatentCache | None = None
    recurrence: RecurrenceConfig = RecurrenceConfig()  # the model's, with the halting of this pass
    num_steps: int = 1  # of every loop
    depths: Tensor | None = None  # (B,) int64, the steps that each row takes: the last of them; None: all
    backprop_steps: int | None = None  # in training, gradients flow through this many last steps; None: all
    loop: "LoopStep | None" = None  # inside a looped layer
    statistics: bool = False  # whether there are targets: experts report balance and load
    states: list[Tensor] | None = None  # collects the output (B, T, D) of every layer run, in order

    def own_step(self, step: int) -> int | Tensor:
        """The number of a loop step: of each row, (B, 1, 1), if their depths differ.

        A row that takes fewer steps starts later, so that all rows take their last step together.
        """
        if self.depths is None:
            return step
        return (step - self.num_steps + self.depths).clamp(min=0)[:, None, None]

    def observe(self, layer: int, *query: Tensor) -> None:
        """Gives a layer's rotated query, in parts (B, T, H, width), to a cache that collects queries."""
        if self.cache is None or self.cache.queries is None:
            return
        first = last = 0
        if self.loop is not None:
            config, last = self.loop.config, slot_of(self.loop.config, self.loop.step)
            first = 0 if config.cache == "parallel" else last
        for slot in range(first, last + 1):  # the slots that `remember` returns
            self.cache.queries.setdefault((layer, slot), []).append(torch.cat(query, -1))

    def remember(self, layer: int, new: Tensor) -> "Remembered":
        """new (B, T, W), keys and values of a layer's tokens -> everything they may attend to."""
        if self.loop is None:
            return Remembered(new if self.cache is None else self.cache.append((layer, 0), new), self, None)
        config, kept = self.loop.config, None
        slots: tuple[Tensor, ...] = (new,)
        first = slot_of(config, self.loop.step)
        if config.carries_keys:
            own = self.own_step(self.loop.step)
            slots = kept = kept_keys(config, self.loop.kept.get(layer), new, own, self.loop.running)
            first = 0 if config.cache == "parallel" else first
        if self.cache is not None:
            slots = tuple(self.cache.append((layer, first + i), s) for i, s in enumerate(slots))
        if len(slots) == 1:
            return Remembered(slots[0], self, kept)
        assert self.mask is not None
        tiled = dataclasses.replace(self, mask=self.mask.repeat(1, 1, 1, len(slots)))
        return Remembered(torch.cat(slots, 1), tiled, kept)


class LoopStep(NamedTuple):
    """The loop step that a looped layer runs in."""

    config: RecurrenceConfig
    step: int
    running: Tensor | None  # (B, T), False: has halted; None: all run
    kept: dict[int, tuple[Tensor, ...]]  # what the previous step left, by layer; see cache.kept_keys


class Remembered(NamedTuple):
    """Keys and values to attend to."""

    held: Tensor  # (B, S, W); for several steps side by side (B, steps S, W)
    context: AttentionContext  # with a mask that fits them
    kept: tuple[Tensor, ...] | None  # for the next loop step


def build_context(
    config: ModelConfig,
    execution: ExecutionConfig,
    dtype: torch.dtype,
    tokens: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cache: LatentCache | None = None,
) -> AttentionContext:
    """The context of a forward pass over tokens (B, T) by a model in `dtype`; see ZeroModel.forward.

    Raises:
        ValueError: the attention backend cannot run here, or the mask has another shape.
    """
    past = cache.length if cache is not None else 0
    repeats = config.positions_per_token
    if repeats > 1:
        tokens = tokens.repeat_interleave(repeats, 1)
        if attention_mask is not None:
            attention_mask = attention_mask.repeat_interleave(repeats, 1)
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens * repeats
        if position_ids is not None:
            offsets = torch.arange(repeats, device=tokens.device)
            position_ids = (position_ids[..., None] * repeats + offsets).flatten(1)
    B, S = len(tokens), past + tokens.shape[1]
    context = AttentionContext(cache=cache, recurrence=config.recurrence)
    if attention_mask is not None or cu_seqlens is not None:
        real = full_mask(attention_mask, B, S, tokens.device)
        context.segment = segments(real, cu_seqlens)
        context.token_mask = None if attention_mask is None else real[:, past:]
        position_ids = _positions(real, cu_seqlens)[:, past:] if position_ids is None else position_ids
    elif position_ids is None:
        position_ids = torch.arange(past, S, device=tokens.device)[None]
    if config.learned_positions:
        context.positions = position_ids
    else:
        context.rotation = rotations(position_ids, config)
    if execution.precision == "fp8":
        require_fp8(tokens.device.type, dtype)
    backend = attention_backend(execution.attention, tokens.device.type, dtype)
    _choose_backend(context, backend, config.recurrence.cache == "parallel", tokens, cu_seqlens)
    return context


def causal_context(config: ModelConfig, x: Tensor) -> AttentionContext:
    """For a layer by itself: every row of x (B, T, D) is one document, from position 0, without padding."""
    length = x.shape[1] // config.positions_per_token
    tokens = torch.zeros(len(x), length, dtype=torch.int64, device=x.device)
    context = build_context(config, ExecutionConfig(), x.dtype, tokens)
    context.num_steps, context.backprop_steps = config.recurrence.num_steps, config.recurrence.backprop_steps
    return context


def _choose_backend(
    context: AttentionContext, backend: str, parallel_cache: bool, tokens: Tensor, cu_seqlens: Tensor | None
) -> None:
    """Fills in what the attention backend needs.

    flex takes whole rows; varlen and flash_attn take whole rows whose padding, if any, is a segment of its
    own; everything else goes through sdpa.
    """
    B, T = tokens.shape
    past = context.cache.length if context.cache is not None else 0
    segment = context.segment
    if parallel_cache:  # the keys of several steps need a mask of their own
        context.mask = visible_keys(tokens.new_zeros(1, past + T) if segment is None else segment, T)
        return
    if backend == "flex" and tokens.device.type == "cpu" and torch.is_grad_enabled():
        raise ValueError(
            "execution.attention=flex has no gradients on a CPU; use torch.no_grad() or attention=sdpa"
        )
    if backend == "flex" and not past:
        segment = tokens.new_zeros(B, T) if segment is None else segment
        context.backend, context.flex_mask = backend, _flex_mask(segment)
    elif (
        backend in ("varlen", "flash_attn")
        and not past
        and (context.token_mask is None or cu_seqlens is not None)
    ):
        context.backend, context.boundaries = backend, _row_boundaries(B, T, cu_seqlens, tokens.device)
    elif backend == "blockwise" and not past:
        context.backend = backend
        if segment is not None:
            context.mask = visible_keys(segment, T)
            context.blockwise_mask = blockwise_mask(context.mask)
    elif segment is not None:
        context.mask = visible_keys(segment, T)
    elif past and T > 1:
        context.mask = visible_keys(tokens.new_zeros(1, past + T), T)


def _positions(real: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(B, S) positions: padding is not counted (Hugging Face's rule), documents start at 0."""
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    if cu_seqlens is None:
        return positions
    column = torch.arange(real.shape[1], device=real.device).expand_as(real).contiguous()
    document = torch.searchsorted(cu_seqlens, column, right=True) - 1
    return positions - positions.gather(1, cu_seqlens.long().gather(1, document))


def segments(real: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(B, S) numbers; a query sees the keys of the same number up to its own position.

    Documents count from 0. Every padded token has its own negative number and sees only itself: a query
    without any key would turn into NaN.

    Args:
        real: (B, S) booleans, False under padding.
        cu_seqlens: (B, n) starts of the documents of each row, padded with S; None: one document.
    """
    column = torch.arange(real.shape[1], device=real.device).expand_as(real).contiguous()
    document = (
        torch.zeros_like(column)
        if cu_seqlens is None
        else torch.searchsorted(cu_seqlens, column, right=True) - 1
    )
    return torch.where(real, document, -1 - column)


def visible_keys(segment: Tensor, query_length: int) -> Tensor:
    """segments (B, S) -> (B, 1, T, S) booleans for the last T = query_length tokens."""
    column = torch.arange(segment.shape[1], device=segment.device)
    first = segment.shape[1] - query_length
    causal = column <= column[first:, None]
    return ((segment[:, first:, None] == segment[:, None, :]) & causal)[:, None]


def _flex_mask(segment: Tensor) -> Any:
    """The same rule for whole rows, in flex_attention's form."""

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (segment[b, q] == segment[b, k]) & (k <= q)

    B, S = segment.shape
    return create_block_mask(visible, B, None, S, S, device=segment.device)


def _row_boundaries(B: int, T: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """Starts of all documents in the flattened B*T tokens, then the end; empty documents are allowed."""
    rows = torch.arange(B, device=device, dtype=torch.int32)[:, None] * T
    starts = rows if cu_seqlens is None else rows + cu_seqlens.int()
    return F.pad(starts.flatten(), (0, 1), value=B * T)
