"""Mixing of neighbouring tokens without attention.

Shapes: B batch, T tokens, W width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cache import Slot
from model.context import AttentionContext


class CausalMixing(nn.Module):
    """Depthwise convolution over a token and the `taps` - 1 before it in its document; inputs are cached.

    Args:
        width: W.
        initial_std: standard deviation of the initial weights.
    """

    def __init__(self, width: int, taps: int, initial_std: float = 0.0) -> None:
        super().__init__()
        self.initial_std = initial_std
        self.weight = nn.Parameter(torch.zeros(taps, width))

    def forward(self, x: Tensor, context: AttentionContext, slot: Slot) -> Tensor:
        """x (B, T, W) -> (B, T, W)."""
        T, held = x.shape[1], x if context.cache is None else context.cache.append(slot, x)
        segment, out = context.segment, x * self.weight[0]
        for back, weight in enumerate(self.weight[1:].unbind(), start=1):
            shifted = F.pad(held, (0, 0, back, 0))[:, -T - back : -back]
            if segment is not None:
                before = F.pad(segment, (back, 0), value=torch.iinfo(segment.dtype).min)
                shifted = shifted * (before[:, -T - back : -back] == segment[:, -T:])[..., None]
            out = out + shifted * weight
        return out
