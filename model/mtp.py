"""Multi-token prediction by sequential modules (DeepSeek-V3, arXiv 2412.19437, section 2.2).

Shapes: B batch, T tokens, D hidden.
"""

import torch
from torch import Tensor, nn

from model.config.execution import ExecutionConfig
from model.config.model import ModelConfig
from model.context import AttentionContext
from model.decoder import DecoderLayer, LayerOutput
from model.layers import Linear, layer_norm
from model.losses import IGNORE_INDEX
from model.moe import MoE


class MTPModule(nn.Module):
    """Predicts one token further ahead than the states it gets; embedding and head are the model's."""

    def __init__(
        self, config: ModelConfig, layer: int, moe_class: type[MoE], execution: ExecutionConfig
    ) -> None:
        super().__init__()
        D = config.hidden_size
        self.enorm, self.hnorm = layer_norm(config), layer_norm(config)
        self.eh_proj = Linear(2 * D, D, bias=False)
        self.layer = DecoderLayer(config, layer, moe_class, execution)
        self.norm = layer_norm(config)

    def forward(self, hidden: Tensor, embedded: Tensor, context: AttentionContext) -> LayerOutput:
        """Eq. 21 and 22.

        Args:
            hidden: (B, T, D) normed states of the model, or of the previous module.
            embedded: (B, T, D) embeddings of the tokens that those states predict.

        Returns:
            (B, T, D) normed states that predict the tokens after those, and the layer's statistics.
        """
        joined = torch.cat((self.enorm(embedded), self.hnorm(hidden)), -1)
        out = self.layer(self.eh_proj(joined), context)
        return out._replace(hidden=self.norm(out.hidden))

    def count(self, load: Tensor) -> None:
        """See DecoderLayer.count."""
        self.layer.count(load)


def shifted(tokens: Tensor, targets: Tensor, segment: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """What the module that predicts `shift` tokens further ahead reads and predicts at each position.

    Args:
        tokens, targets: (B, T) of the model.
        segment: (B, T), equal numbers for the tokens of one document, see context.segments.

    Returns:
        (B, T) tokens to embed and (B, T) targets; IGNORE_INDEX where the document ends earlier.
    """
    beyond = segment.roll(-shift, 1) != segment
    beyond[:, -shift:] = True
    return tokens.roll(-shift, 1), targets.roll(-shift, 1).masked_fill(beyond, IGNORE_INDEX)
