"""The parameters of latent thoughts, and those that only their distillation needs.

Shapes: B batch, c latents, D hidden, N documents, M latents, G key-value heads, W width of a head, P prj_dim.
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


class ProjectedKV(nn.Module):
    """One layer's maps of keys and values, which KaVa's loss compares after them (`use_projection`).

    KaVa's paper compares keys and values as they are; CODI projects the states that it compares, with a
    LayerNorm (use_prj, prj_dim), and this is the same for keys and values.

    Args:
        widths: numbers of all heads' keys, and of all heads' values.
        prj_dim: P; None: each its width.
        layernorm: whether a LayerNorm follows the student's maps.
        seed: of the fixed part, see _Projected.
    """

    def __init__(self, widths: tuple[int, int], prj_dim: int | None, layernorm: bool, seed: int) -> None:
        super().__init__()
        self.k_proj = _Projected(widths[0], prj_dim, layernorm, 2 * seed)
        self.v_proj = _Projected(widths[1], prj_dim, layernorm, 2 * seed + 1)

    def student(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """(N, M, G, W) each -> (N, M, 1, P) each."""
        return self.k_proj(keys.flatten(2)).unsqueeze(2), self.v_proj(values.flatten(2)).unsqueeze(2)

    def teacher(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The same shapes; nothing here is learned."""
        maps = self.k_proj.fixed, self.v_proj.fixed
        k, v = (fixed(x.flatten(2)).unsqueeze(2) for fixed, x in zip(maps, (keys, values), strict=True))
        return k, v


class _Projected(nn.Module):
    """x (..., width) -> LayerNorm(F x + A x + b), of which A and b are learned and start at 0.

    F is fixed: the identity or, for a smaller prj_dim, that many orthonormal rows, a function of the seed.
    The teacher's targets are F x. A learned map of the teacher's would have a trivial optimum, in which both
    sides are constant; with this one the targets stay what they are, the loss (without LayerNorm) starts
    where it is without maps, and weight decay pulls towards F instead of 0.
    """

    rows: Tensor | None

    def __init__(self, width: int, prj_dim: int | None, layernorm: bool, seed: int) -> None:
        super().__init__()
        out = width if prj_dim is None else prj_dim
        self.linear = Linear(width, out, zero=True)
        self.norm = nn.LayerNorm(out) if layernorm else nn.Identity()
        rows = None if out == width else orthonormal_rows(out, width, seed)
        self.register_buffer("rows", rows, persistent=False)  # known from the seed

    def fixed(self, x: Tensor) -> Tensor:
        return x if self.rows is None else x @ self.rows.T

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.fixed(x) + self.linear(x))
        return out


def orthonormal_rows(count: int, width: int, seed: int) -> Tensor:
    """(count, width) fp32, count <= width, a random subspace: in it, distances shrink by sqrt(count / width)
    on average.
    """
    drawn = torch.randn(width, count, generator=torch.Generator().manual_seed(seed), device="cpu")
    return torch.linalg.qr(drawn).Q.T.contiguous()
