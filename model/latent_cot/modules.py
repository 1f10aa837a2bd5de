"""The parameters of latent thoughts.

Shapes: B batch, c latents, D hidden.
"""

import torch
from torch import Tensor, nn

from model.config.model import ModelConfig
from model.layers import Linear


class Projection(nn.Sequential):
    """Hidden state -> latent: Linear-GELU-Linear-LayerNorm, as in CODI (arXiv 2502.21074) and PCCoT."""

    def __init__(self, width: int) -> None:
        super().__init__(Linear(width, width), nn.GELU(), Linear(width, width), nn.LayerNorm(width))


class LatentThoughts(nn.Module):
    """One learned embedding that all latents share, and the projection that feeds hidden states back.

    Positions tell the latents apart, so their number can change at test time.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, D = config.latent_cot, config.hidden_size
        if self.config.has_embedding:
            self.embedding = nn.Embedding(1, D)
        if self.config.projects:
            self.projection = Projection(D)

    def initial(self, ids: Tensor) -> Tensor:
        """Latents of iteration 0 for ids (B, c), int64, all 0 -> (B, c, D)."""
        out: Tensor = self.embedding(ids)
        return out

    def project(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, n, D) -> latents (B, n, D) of the positions after them."""
        return self.projection(hidden) if self.config.projects else hidden

    def feed_back(self, first: Tensor, ids: Tensor, hidden: Tensor) -> Tensor:
        """The next iteration's latents (B, c, D), from the hidden states (B, c, D) of this one.

        jacobi: z_1 stays, z_i = prj(h_(i-1)) (PCCoT, arXiv 2506.18582, section 3). lotus: E + h_i (LOTUS,
        arXiv 2606.31779).

        Args:
            first: (B, 1, D), the projected state at <bot>.
            ids: (B, c), all 0.
        """
        if self.config.feedback == "lotus":
            return self.initial(ids) + hidden
        return torch.cat((first, self.project(hidden[:, :-1])), 1)
