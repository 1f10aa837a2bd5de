"""The projection of hidden states to the vocabulary.

Shapes: B batch, T tokens, D hidden, V vocabulary.
"""

import torch
from torch import Tensor, nn

from model.config.model import ModelConfig
from model.layers import linear
from model.losses import chunked_cross_entropy


class LMHead(nn.Module):
    """Projection to the vocabulary; it also forms the loss, see losses.py for why.

    When tied, it has no parameters, so checkpoints, optimizers and counts see the matrix once.
    """

    def __init__(self, config: ModelConfig, embedding: nn.Embedding) -> None:
        super().__init__()
        self.tied: tuple[nn.Embedding, ...] = ()  # in a tuple, where torch does not look for submodules
        if config.tie_word_embeddings:
            self.tied = (embedding,)
        else:
            self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, hidden: Tensor, targets: Tensor | None = None, share: Tensor | None = None) -> Tensor:
        """hidden (B, T, D) -> logits (B, T, V), or with targets (B, T) their summed cross-entropy.

        share: (B, T) factor on each target's loss; None: 1.
        """
        weight = self.tied[0].weight if self.tied else self.weight
        if targets is None:
            return linear(hidden, weight)
        share = None if share is None else share.flatten()
        return chunked_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten(), share)
