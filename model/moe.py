"""Mixture of experts with loss-free balancing (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

Shapes: N tokens (batch and time flattened), D hidden, E experts, K experts per token, F expert width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backends.experts import expert_products
from model.config.execution import ExecutionConfig, expert_backend
from model.config.model import ModelConfig
from model.dispatch import Dispatch, Permute, ToRows, ToTokens, dispatch
from model.layers import (
    FeedForward,
    at_least_fp32,
    feed_forward,
    few_rows,
    linear,
    maybe_compiled,
    product_dtype,
)


class Routing(NamedTuple):
    """What the router decided."""

    weights: Tensor  # (N, K) fp32
    chosen: Tensor  # (N, K) expert numbers
    scores: Tensor  # (N, E) fp32 affinities
    logits: Tensor  # (N, E) fp32


class MoEStatistics(NamedTuple):
    """What a layer reports besides its output, summed over the B rows (losses) or the tokens (load)."""

    balance: Tensor  # sequence-wise balance loss
    router_z: Tensor  # squared log-sum-exp of the router's logits, averaged over each row's tokens
    load: Tensor  # (E,) int64, tokens routed to each expert


class Router(nn.Module):
    """Sigmoid affinities in fp32; the balancing bias affects the choice, never the weights."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x: Tensor) -> Routing:
        """x (N, D) -> the chosen experts and their weights (eq. 12-16)."""
        c = self.config
        logits = linear(at_least_fp32(x), at_least_fp32(self.weight))
        scores = logits.sigmoid()
        biased = scores.detach() + self.e_score_correction_bias.float()
        if c.n_group > 1:
            biased = biased.masked_fill(self._outside_kept_groups(biased), float("-inf"))
        chosen = biased.topk(c.num_experts_per_tok, dim=-1, sorted=False).indices
        weights = scores.gather(-1, chosen)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(weights * c.routed_scaling_factor, chosen, scores, logits)

    def _outside_kept_groups(self, biased: Tensor) -> Tensor:
        """biased (N, E) -> (N, E) booleans: outside the topk_group groups whose best two score highest."""
        c = self.config
        grouped = biased.unflatten(-1, (c.n_group, -1))
        kept = grouped.topk(2, dim=-1).values.sum(-1).topk(c.topk_group, dim=-1).indices
        outside = torch.ones(grouped.shape[:2], dtype=torch.bool, device=biased.device)
        outside.scatter_(1, kept, False)
        return outside.repeat_interleave(grouped.shape[-1], dim=1)


class Experts(nn.Module):
    """Stacked experts, in DeepSpeed's names.

    SwiGLU: w1 is the gate, w3 the up and w2 the down projection. Squared ReLU: w1 is up, w2 down; no w3.
    """

    w3: Tensor

    def __init__(self, config: ModelConfig, expert_ids: range, execution: ExecutionConfig) -> None:
        super().__init__()
        self.expert_ids, self.execution = expert_ids, execution  # global numbers of the experts held here
        self.backend = "fp8" if execution.precision == "fp8" else execution.experts
        E, D, width = len(expert_ids), config.hidden_size, config.moe_intermediate_size
        self.widths, self.gated = (D, width), config.hidden_act == "silu"
        self.w1 = nn.Parameter(torch.empty(E, width, D))
        self.w2 = nn.Parameter(torch.empty(E, D, width))
        if self.gated:
            self.w3 = nn.Parameter(torch.empty(E, width, D))

    def forward(self, x: Tensor, counts: Tensor, weights: Tensor | None = None) -> Tensor:
        """x (rows sorted by expert, D) and the rows of each expert (E,) -> (rows, D).

        weights: (rows,) fp32 factors on the rows of the result; None: 1.

        Experts without rows still take part, so that every weight always has a gradient.
        """
        backend = expert_backend(self.backend, x.device.type, x.dtype, self.widths)
        if few_rows(x) and len(x) and weights is None and backend != "fp8":
            return self._decode(x, counts)
        products, dtype = expert_products(backend, counts), x.dtype if backend == "fp8" else product_dtype(x)
        w3 = self.w3 if self.gated else None
        return FeedForward.apply(x, self.w1, w3, self.w2, weights, products, dtype)

    def _decode(self, x: Tensor, counts: Tensor) -> Tensor:
        """As forward, for few rows without gradients: rows become columns, idle experts cost nothing."""
        dtype, outputs = product_dtype(x), []
        for expert, columns in enumerate(x.to(dtype).T.split(counts.tolist(), 1)):
            if columns.shape[1]:
                hidden = self.w1[expert].to(dtype) @ columns
                if self.gated:
                    hidden = F.silu(hidden) * (self.w3[expert].to(dtype) @ columns)
                else:
                    hidden = F.relu(hidden).square()
                outputs.append(self.w2[expert].to(dtype) @ hidden)
        return torch.cat(outputs, 1).T.to(x.dtype)


def folds_weights(x: Tensor) -> bool:
    """Whether experts multiply by the router's weights themselves, which saves passes over their results.

    Not on a CPU, where the results would be rounded differently than before.
    """
    return x.device.type != "cpu"


class MoE(nn.Module):
    """Routed experts plus shared ones that see every token. All experts are held and computed here."""

    load: Tensor

    def __init__(self, config: ModelConfig, execution: ExecutionConfig) -> None:
        super().__init__()
        self.config, self.execution = config, execution
        self.gate = Router(config)
        self.experts = self.build_experts()
        if config.n_shared_experts:
            width = config.n_shared_experts * config.moe_intermediate_size
            self.shared_experts = feed_forward(config, width)
        # Tokens routed to each expert in training since the last bias update, summed over loop steps.
        self.register_buffer(
            "load", torch.zeros(config.n_routed_experts, dtype=torch.int64), persistent=False
        )

    def build_experts(self) -> Experts:
        return Experts(self.config, range(self.config.n_routed_experts), self.execution)

    def run_experts(
        self, tokens: Tensor, weights: Tensor | None, to: Dispatch, meanwhile: Callable[[], Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """Each token through its experts. Expert parallelism overrides this.

        Args:
            tokens: (N, D).
            weights: (N*K,) sorted by expert, factors on the result; None: 1.
            meanwhile: what does not depend on the experts, to run while rows travel.

        Returns:
            (N*K, D) sorted by expert, and what `meanwhile` returned.
        """
        rows = self.experts(ToRows.apply(tokens, to.order, to.back), to.counts, weights)
        return rows, meanwhile()

    def forward(
        self,
        x: Tensor,
        token_mask: Tensor | None = None,
        statistics: bool = True,
        row_weights: Tensor | None = None,
    ) -> tuple[Tensor, MoEStatistics | None]:
        """Routes every token through its experts.

        Leaves `load` alone, because it runs twice under activation checkpointing; see decoder.run_layer.

        Args:
            x: (B, T, D).
            token_mask: (B, T), False for padding, which the statistics leave out.
            statistics: whether to form them.
            row_weights: (B,) of the rows in the two losses; None: 1.

        Returns:
            (B, T, D) and the statistics.
        """
        tokens = x.flatten(0, 1)
        routing = maybe_compiled(self.gate, self.execution.compile, tokens)
        to = dispatch(routing.chosen, self.config.n_routed_experts)

        def shared() -> Tensor | None:
            if not self.config.n_shared_experts:
                return None
            out: Tensor = maybe_compiled(self.shared_experts, self.execution.compile, tokens)
            return out

        if folds_weights(tokens):
            weights = Permute.apply(routing.weights.flatten(), to.order, to.back)
            rows, always = self.run_experts(tokens, weights, to, shared)
            out = ToTokens.apply(rows, to.order, to.back, self.config.num_experts_per_tok)
        else:
            rows, always = self.run_experts(tokens, None, to, shared)
            rows = Permute.apply(rows, to.back, to.order).unflatten(0, (len(tokens), -1))
            out = (rows * routing.weights[..., None].to(rows.dtype)).sum(1)
        out = out if always is None else out + always
        if not statistics:
            return out.view_as(x), None
        inputs = (routing, x.shape[0], token_mask, row_weights)
        return out.view_as(x), maybe_compiled(self._statistics, self.execution.compile, *inputs)

    def _statistics(
        self, routing: Routing, B: int, token_mask: Tensor | None, row_weights: Tensor | None
    ) -> MoEStatistics:
        """Balance loss (eq. 17-20 with alpha 1), router z-loss (ST-MoE eq. 5) and load of real tokens."""
        E, K = self.config.n_routed_experts, self.config.num_experts_per_tok
        scores = routing.scores
        real = scores.new_ones(B, len(scores) // B) if token_mask is None else token_mask.float()
        picked = torch.zeros_like(scores).scatter_(1, routing.chosen, 1.0).view(B, -1, E) * real[..., None]
        length = real.sum(1).clamp(min=1)[:, None]
        taken = picked.sum(1)
        share = (scores / (scores.sum(-1, keepdim=True) + 1e-20)).view(B, -1, E)
        share = torch.einsum("bte,bt->be", share, real)
        weight = 1.0 if row_weights is None else row_weights[:, None].to(length)
        balance = (taken * E / (K * length) * share / length * weight).sum()
        z = (routing.logits.logsumexp(-1).square().view(B, -1) * real / length * weight).sum()
        return MoEStatistics(balance, z, taken.sum(0).round().long())

    @torch.no_grad()
    def update_bias(self, load: Tensor) -> None:
        """Moves the balancing bias one step towards underloaded experts; load (E,) is the global load.

        The bias is re-centred, so that it cannot drift.
        """
        bias = self.gate.e_score_correction_bias
        load = load.double()
        bias += self.config.router_bias_update_rate * torch.sign(load.mean() - load).to(bias.dtype)
        bias -= bias.mean()
