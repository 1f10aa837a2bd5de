"""The KV cache.

Shapes: B batch, T new tokens, S cached tokens, C latent width, R rotary width, W numbers per token.
"""

import torch
from torch import Tensor


class LatentCache:
    """Keeps, per token and slot, the C + R numbers [normed KV latent | rotated shared key].

    Plain attention keeps its rotated keys and its values instead. A slot is (layer, loop step): a looped
    layer keeps every step's own, so decoding is exact.
    """

    def __init__(self, limited: bool = True) -> None:
        self.limited = limited  # false: the caller sees to max_position_embeddings himself
        self.length = 0  # tokens held, the same for every slot between two forward passes
        self._slots: dict[tuple[int, int], Tensor] = {}

    def append(self, layer: int, step: int, latent: Tensor) -> Tensor:
        """Adds latent (B, T, W) after the tokens held and returns all of them, (B, S, W)."""
        slot, total = (layer, step), self.length + latent.shape[1]
        held = self._slots.get(slot)
        if held is None or held.shape[1] < total:
            grown = latent.new_empty(latent.shape[0], max(total, 2 * self.length), latent.shape[2])
            if held is not None:
                grown[:, : self.length] = held[:, : self.length]
            elif self.length:
                raise ValueError(
                    f"loop step {step + 1} of layer {layer} has no cached latents for the first "
                    f"{self.length} tokens: the number of loop steps must not grow while a cache is in use"
                )
            self._slots[slot] = held = grown
        held[:, self.length : total] = latent
        return held[:, :total]

    def advance(self, num_tokens: int) -> None:
        """Called once at the end of a forward pass over num_tokens new tokens."""
        self.length += num_tokens

    def crop(self, num_tokens: int) -> None:
        """Forgets the last num_tokens tokens."""
        assert 0 <= num_tokens <= self.length
        self.length -= num_tokens

    def numel(self) -> int:
        """Numbers held for the tokens seen (spare capacity not counted)."""
        return sum(s[:, : self.length].numel() for s in self._slots.values())


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
