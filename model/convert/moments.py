"""What attention layers see: the second moments of their inputs, and how far back they look.

Shapes: B batch, T tokens, D hidden, H heads, G key-value heads, d width of a head.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import GroupedQueryAttention
from model.convert.calibration import perplexity
from model.layers import rotate
from model.transformer import ZeroModel

ASSUMED_DISTANCES = 64  # without texts, attention is taken as uniform over this many last tokens


@dataclass(frozen=True)
class Moments:
    """Of one attention layer, in fp64."""

    inputs: Tensor  # (D+1, D+1), mean of [x; 1] [x; 1]^T over tokens (and loop steps)
    attended: Tensor  # the same, each token weighted by the attention that it receives
    distances: Tensor  # (T,), share of attention at each distance from the query; sums to 1


def attention_layers(model: ZeroModel) -> dict[str, GroupedQueryAttention]:
    """By their names, those of multi-token prediction included."""
    return {name: m for name, m in model.named_modules() if isinstance(m, GroupedQueryAttention)}


def assumed(model: ZeroModel) -> dict[str, Moments]:
    """Without texts: inputs whose components are independent and of one size."""
    inputs = torch.eye(model.config.hidden_size + 1, dtype=torch.float64)
    distances = torch.full((ASSUMED_DISTANCES,), 1 / ASSUMED_DISTANCES, dtype=torch.float64)
    return {name: Moments(inputs, inputs, distances) for name in attention_layers(model)}


def measured(model: ZeroModel, windows: Tensor) -> dict[str, Moments]:
    """From windows (n, T+1) of tokens, each read alone; a looped layer sees all its loop steps."""
    layers = attention_layers(model)
    sums = {name: _Sums(layer) for name, layer in layers.items()}
    handles = [layer.register_forward_pre_hook(sums[name]) for name, layer in layers.items()]
    try:
        perplexity(model, windows)  # also runs the modules of multi-token prediction
    finally:
        for handle in handles:
            handle.remove()
    return {name: found.moments() for name, found in sums.items()}


class _Sums:
    """A hook that adds up what a layer is given."""

    def __init__(self, layer: GroupedQueryAttention) -> None:
        D = layer.config.hidden_size
        self.inputs = torch.zeros(D + 1, D + 1, dtype=torch.float64)
        self.attended = torch.zeros_like(self.inputs)
        self.distances = torch.zeros(layer.config.max_position_embeddings, dtype=torch.float64)

    def __call__(self, layer: Any, given: tuple[Any, ...]) -> None:
        x, context = given
        rows = F.pad(x.flatten(0, 1).float(), (0, 1), value=1.0)
        weights = _attention(layer, x, context.rotation)
        self.inputs += rows.T @ rows
        self.attended += (rows.T * weights.sum(1).flatten()) @ rows
        # Without the first token, which takes what a head has no use for (attention sink, arXiv 2309.17453)
        # wherever it is.
        distance = (torch.arange(x.shape[1])[:, None] - torch.arange(1, x.shape[1])).clamp(min=0)
        self.distances.index_add_(0, distance.flatten(), weights[:, :, 1:].sum(0).flatten().double())

    def moments(self) -> Moments:
        """The last entry of a second moment is that of the 1, the total weight."""
        total = self.distances.sum().clamp(min=torch.finfo(torch.float64).tiny)
        return Moments(
            self.inputs / self.inputs[-1, -1], self.attended / self.attended[-1, -1], self.distances / total
        )


def _attention(layer: GroupedQueryAttention, x: Tensor, rotation: Tensor) -> Tensor:
    """x (B, T, D) -> (B, T, T), every query's attention, summed over heads."""
    c, T = layer.config, x.shape[1]
    query, key = (
        rotate(projected.unflatten(-1, (-1, c.plain_head_dim)), rotation).float()
        for projected in (layer.q_proj(x), layer.k_proj(x))
    )
    key = key.repeat_interleave(c.num_attention_heads // c.kv_heads, 2)
    scores = torch.einsum("bthd,bshd->bhts", query, key) * layer.scale
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    return scores.masked_fill_(later, -torch.inf).softmax(-1).sum(1)
