"""Mixture of experts with loss-free balancing (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

Shapes: N tokens (batch and time flattened), D hidden, E experts, K experts per token, F expert width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .layers import SwiGLU


class Router(nn.Module):
    """Sigmoid affinities in fp32; the balancing bias takes part in the choice, never in the weights."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, D) -> weights (N, K), chosen experts (N, K), affinities (N, E), in fp32 (eq. 12-16)."""
        c = self.config
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        biased = scores.detach() + self.e_score_correction_bias.float()
        biased = biased.masked_fill(self._outside_kept_groups(biased), float("-inf"))
        chosen = biased.topk(c.num_experts_per_tok, dim=-1, sorted=False).indices
        weights = scores.gather(-1, chosen)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * c.routed_scaling_factor, chosen, scores

    def _outside_kept_groups(self, biased: Tensor) -> Tensor:
        """biased (N, E) -> (N, E) booleans: outside the topk_group groups whose best two score highest."""
        c = self.config
        if c.n_group == 1:
            return torch.zeros_like(biased, dtype=torch.bool)
        grouped = biased.unflatten(-1, (c.n_group, -1))
        kept = grouped.topk(2, dim=-1).values.sum(-1).topk(c.topk_group, dim=-1).indices
        outside = torch.ones(grouped.shape[:2], dtype=torch.bool, device=biased.device)
        outside.scatter_(1, kept, False)
        return outside.repeat_interleave(grouped.shape[-1], dim=1)


class Experts(nn.Module):
    """Stacked SwiGLU experts; w1 gates, w3 is the up and w2 the down projection (names DeepSpeed expects)."""

    def __init__(self, config: ModelConfig, expert_ids: range) -> None:
        super().__init__()
        self.expert_ids = expert_ids  # the global numbers of the experts held here
        E, D, width = len(expert_ids), config.hidden_size, config.moe_intermediate_size
        self.w1 = nn.Parameter(torch.empty(E, width, D))
        self.w2 = nn.Parameter(torch.empty(E, D, width))
        self.w3 = nn.Parameter(torch.empty(E, width, D))

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """x (rows sorted by expert, D) and the rows of each expert -> (rows, D).

        An expert without rows still takes part, so that every weight always has a gradient.
        """
        outputs = [
            F.linear(F.silu(F.linear(rows, w1)) * F.linear(rows, w3), w2)
            for rows, w1, w2, w3 in zip(
                x.split(counts), self.w1.unbind(), self.w2.unbind(), self.w3.unbind(), strict=True
            )
        ]
        return torch.cat(outputs)


class MoE(nn.Module):
    """Routed experts plus shared ones that see every token. All experts are held and computed here."""

    load: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = Router(config)
        self.experts = self.build_experts()
        if config.n_shared_experts:
            width = config.n_shared_experts * config.moe_intermediate_size
            self.shared_experts = SwiGLU(config.hidden_size, width)
        # Tokens each expert was given in training since the last bias update, summed over loop steps.
        self.register_buffer(
            "load", torch.zeros(config.n_routed_experts, dtype=torch.int64), persistent=False
        )

    def build_experts(self) -> Experts:
        return Experts(self.config, range(self.config.n_routed_experts))

    def run_experts(self, x: Tensor, counts: Tensor) -> Tensor:
        """x (N*K, D) sorted by expert, counts (E,) -> (N*K, D). Expert parallelism overrides this."""
        return self.experts(x, counts.tolist())

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, D), token_mask (B, T) -> output (B, T, D) and the summed balance loss of the B rows."""
        tokens = x.flatten(0, 1)
        weights, chosen, scores = self.gate(tokens)
        K = chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=self.config.n_routed_experts)
        rows = self.run_experts(tokens[order // K], counts)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        out = (rows[back].unflatten(0, (-1, K)) * weights[..., None].to(rows.dtype)).sum(1)
        if self.config.n_shared_experts:
            out = out + self.shared_experts(tokens)
        real = torch.ones(x.shape[:2], device=x.device) if token_mask is None else token_mask
        load, balance = self._balance(chosen, scores, real.float())
        if self.training:
            self.load += load
        return out.view_as(x), balance

    def _balance(self, chosen: Tensor, scores: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens per expert (E,) and the rows' summed sequence-wise balance loss (eq. 17-20, alpha = 1)."""
        B, T = real.shape
        E, K = self.config.n_routed_experts, self.config.num_experts_per_tok
        picked = F.one_hot(chosen, E).sum(1).view(B, T, E) * real[..., None]
        length = real.sum(1).clamp(min=1)[:, None]
        frequency = picked.sum(1) * E / (K * length)
        share = (scores / (scores.sum(-1, keepdim=True) + 1e-20)).view(B, T, E) * real[..., None]
        return picked.sum((0, 1)).long(), (frequency * share.sum(1) / length).sum()

    @torch.no_grad()
    def update_bias(self, load: Tensor) -> None:
        """Moves the balancing bias towards underloaded experts by one step; load (E,) is the global one.

        Re-centred, so that the bias cannot drift. Clears this layer's own count.
        """
        bias = self.gate.e_score_correction_bias
        load = load.double()
        bias += self.config.router_bias_update_rate * torch.sign(load.mean() - load).to(bias.dtype)
        bias -= bias.mean()
        self.load.zero_()
