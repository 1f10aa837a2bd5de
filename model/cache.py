"""The KV cache, and which keys and values a looped layer keeps.

Shapes: B batch, T new tokens, S cached tokens, W numbers per token.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from model.config.recurrence import RecurrenceConfig
from model.memory import MemoryState

Slot = tuple[int | str, int]  # (layer or name of a loop, loop step)


class LatentCache:
    """Keeps, per token and slot, the C + R numbers [normed KV latent | rotated shared key].

    Plain attention keeps its rotated keys and values instead. Loops keep whatever else they need of earlier
    tokens (states for position mixing, halting signals) in separate slots.

    Args:
        limited: whether the model enforces max_position_embeddings; False: the caller does.
        differentiable: never write in place, so that gradients flow back through the cache.
    """

    def __init__(self, limited: bool = True, differentiable: bool = False) -> None:
        self.limited, self.differentiable = limited, differentiable
        self.length = 0  # tokens held, the same for every slot between two forward passes
        self.memory: MemoryState | None = None  # for a Recurrent Memory Transformer, which needs nothing else
        # Rotated queries (B, T, H, width) of all passes so far, by the slot they read; None: not collected
        self.queries: dict[Slot, list[Tensor]] | None = None
        self._slots: dict[Slot, Tensor] = {}
        self._shared = 0  # first entries, which a branch holds too: they must not be overwritten

    def append(self, slot: Slot, values: Tensor) -> Tensor:
        """Appends values (B, T, W) to the tokens held and returns all of them, (B, S, W).

        Appending again before `advance` overwrites what this pass appended.
        """
        total = self.length + values.shape[1]
        held = self._slots.get(slot)
        if self.differentiable and (held is not None or not self.length):
            parts = (values,) if held is None else (_first(held, self.length), values)
            self._slots[slot] = joined = torch.cat(parts, 1)
            return joined
        if held is None or held.shape[1] < total:
            grown = values.new_empty(values.shape[0], max(total, 2 * self.length), values.shape[2])
            if held is not None:
                grown[:, : self.length] = held[:, : self.length]
            elif self.length:
                raise ValueError(
                    f"loop step {slot[1] + 1} of layer {slot[0]} has nothing cached for the first "
                    f"{self.length} tokens: the number of loop steps must not grow while a cache is in use"
                )
            self._slots[slot] = held = grown
        held[:, self.length : total] = values
        return held[:, :total]

    def repeat(self, source: Slot, target: Slot, num_tokens: int) -> None:
        """Copies the new tokens' entries from slot `source` to slot `target`, if the slots are in use."""
        held = self._slots.get(source)
        if held is not None and (target in self._slots or not self.length):
            self.append(target, held[:, self.length : self.length + num_tokens])

    def advance(self, num_tokens: int) -> None:
        """Called once, at the end of a forward pass over num_tokens new tokens."""
        self.length += num_tokens

    def crop(self, num_tokens: int) -> None:
        """Forgets the last num_tokens tokens."""
        assert 0 <= num_tokens <= self.length
        self.length -= num_tokens
        if self.length < self._shared:
            self._trim()

    def held(self, slot: Slot) -> Tensor:
        """What a slot holds for all tokens seen, (B, S, W)."""
        return _first(self._slots[slot], self.length)

    def branch(self) -> "LatentCache":
        """A cache of the same tokens that grows independently of this one; copies nothing."""
        self._trim()
        twin = copy.copy(self)
        twin._slots = dict(self._slots)
        return twin

    def adopt(self, branch: "LatentCache") -> None:
        """Takes over what a branch appended since the last `advance`."""
        self._slots = dict(branch._slots)

    def _trim(self) -> None:
        """Drops spare capacity, so that the next append copies instead of writing into shared tensors."""
        self._slots = {slot: _first(held, self.length) for slot, held in self._slots.items()}
        self._shared = self.length

    def keep(self, first: int, choose: Callable[[Slot, Tensor], Tensor]) -> None:
        """From `first` on keeps some entries, equally many in every slot, and forgets the others; in place.

        Keys keep the rotation by the position they were read at, which is no longer their index.

        Args:
            first: entries before it stay.
            choose: given a slot and what it holds from `first` on, (B, S, W), returns which entries to keep,
                (B, P, n) int64 counted from `first`: each of the P equal parts of the W numbers has its own.
        """
        assert self._shared <= first <= self.length  # entries that a branch shares are not overwritten
        kept = 0
        for slot, held in self._slots.items():
            later = held[:, first : self.length]
            chosen = choose(slot, later).transpose(1, 2)
            parts = later.unflatten(-1, (chosen.shape[2], -1))
            kept = chosen.shape[1]
            index = chosen[..., None].expand(-1, -1, -1, parts.shape[-1])
            held[:, first : first + kept] = parts.gather(1, index).flatten(2)
        self.length = first + kept

    def gathered(self, rows: Tensor, ends: Tensor, lengths: Tensor, room: int = 0) -> "LatentCache":
        """A cache of some of the rows, in any order and number, each right-aligned.

        Keys are rotated by their token's position, not by their index here, so they may be moved.

        Args:
            rows: (N,) int64, the row that each new row copies.
            ends: (N,) int64, the index after its last token.
            lengths: (N,) int64, how many entries before that to keep; left of them is padding.
            room: entries to reserve. A token has one, or with pauses one per position.
        """
        width = int(lengths.max())
        entries = (ends[:, None] - width + torch.arange(width, device=ends.device)).clamp(min=0)
        cache = LatentCache(self.limited)
        cache.length = width
        if self.memory is not None:
            cache.memory = type(self.memory)(*(part[rows] for part in self.memory))
        for slot, held in self._slots.items():
            cache._slots[slot] = kept = held.new_empty(len(rows), width + room, held.shape[2])
            kept[:, :width] = held[rows[:, None], entries]
        return cache

    @property
    def batch_size(self) -> int:
        """B; 0 as long as nothing is held."""
        held = self.memory if self.memory is not None else tuple(self._slots.values())
        return len(held[0]) if held else 0

    def rows(self, index: Tensor) -> "LatentCache":
        """A cache of some rows (n,) int64, in any order and number."""
        cache = copy.copy(self)
        if self.memory is not None:
            cache.memory = MemoryState(*(part[index] for part in self.memory))
        cache._slots = {slot: _first(held, self.length)[index] for slot, held in self._slots.items()}
        cache._shared = 0
        return cache

    def numel(self) -> int:
        """Numbers held for the tokens seen (spare capacity not counted)."""
        return sum(s[:, : self.length].numel() for s in self._slots.values())

    def nbytes(self) -> int:
        """Bytes of these numbers."""
        return sum(s[:, : self.length].nbytes for s in self._slots.values())


def _first(held: Tensor, count: int) -> Tensor:
    """The first `count` entries of (B, S, W); a slice of all entries would cost a copy in backward."""
    return held if held.shape[1] == count else held[:, :count]


def full_mask(attention_mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """(B, S) booleans, True where a token is real; checked against the number of tokens seen."""
    if attention_mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if attention_mask.shape != (batch, length):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, expected {(batch, length)}: "
            "it covers the cached tokens and the new ones"
        )
    return attention_mask.bool()


def kept_keys(
    config: RecurrenceConfig,
    previous: tuple[Tensor, ...] | None,
    new: Tensor,
    step: int | Tensor,
    running: Tensor | None,
) -> tuple[Tensor, ...]:
    """The keys and values that a looped layer lets a loop step attend to, for the tokens of this pass.

    For earlier tokens, the cache holds what their last step left. Decoding therefore equals a full pass
    exactly for `per_step` and `parallel` (all steps kept) and for `first`; for `ema`, `average`, `last` and
    for fewer virtual layers than steps it is an approximation: a full pass shows each step the merge so far.

    per_step: the step's own (LoopLlama's serial virtual layers) | parallel: those of all steps so far, side
    by side | first, last | average: mean over the steps so far | ema: m_n = decay m_(n-1) + (1 - decay) new.

    Args:
        previous: what this function returned for the step before; None at the first step.
        new: (B, T, W) keys and values, or latents, of this step.
        step: its number, from 0; of each row (B, 1, 1) if they start at different ones.
        running: (B, T) booleans; a halted token keeps those of its last step; None: all run.

    Returns:
        One (B, T, W) tensor, or one per step for `parallel`.
    """
    if previous is None:
        return (new,)
    last, own = previous[-1], new
    if config.cache == "first":
        new = last
    elif config.cache == "ema":
        new = config.ema_decay * last + (1 - config.ema_decay) * new
    elif config.cache == "average":
        new = last + (new - last) / (step + 1)
    if isinstance(step, Tensor):
        new = torch.where(step == 0, own, new)
    if running is not None:
        new = torch.where(running[..., None], new, last)
    if config.cache != "parallel":
        return (new,)
    if config.virtual_layers is not None and len(previous) == config.virtual_layers:
        return (*previous[:-1], new)
    return (*previous, new)


def slot_of(config: RecurrenceConfig, step: int) -> int:
    """Number of the slot that keeps a step's keys and values."""
    if config.cache not in ("per_step", "parallel"):
        return 0
    return step if config.virtual_layers is None else min(step, config.virtual_layers - 1)
