"""One decoder layer, and how it is run: plainly or under activation checkpointing.

Shapes: B batch, T tokens, D hidden, E experts.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.attention import GroupedQueryAttention, MultiHeadLatentAttention
from model.checkpointing import recomputed
from model.config.execution import ExecutionConfig
from model.config.model import ModelConfig
from model.context import AttentionContext
from model.layers import feed_forward, layer_norm, maybe_compiled, multiply_in_fp8
from model.loop_trace import LoopTrace
from model.moe import MoE

AUX_TERMS = ("balance", "router_z")


class LayerOutput(NamedTuple):
    """A layer's result."""

    hidden: Tensor  # (B, T, D)
    aux: Tensor | None = None  # (2,) fp32, AUX_TERMS summed over the rows
    load: Tensor | None = None  # (E,) int64 tokens routed to each expert
    kept: tuple[Tensor, ...] | None = None  # see attention.AttentionOutput
    trace: LoopTrace | None = None  # from the attention layer's own Latent Reasoning Unit


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward layer, dense or mixture of experts."""

    def __init__(
        self, config: ModelConfig, layer: int, moe_class: type[MoE], execution: ExecutionConfig
    ) -> None:
        super().__init__()
        attention = MultiHeadLatentAttention if config.use_mla else GroupedQueryAttention
        self.input_layernorm = layer_norm(config)
        self.self_attn = attention(config, layer, execution)
        self.post_attention_layernorm = layer_norm(config)
        self.compile_dense = execution.compile
        self.mlp: nn.Module = (
            moe_class(config, execution)
            if config.is_moe_layer(layer)
            else feed_forward(config, config.intermediate_size)
        )
        if execution.precision == "fp8":
            multiply_in_fp8(self.self_attn)
            multiply_in_fp8(getattr(self.mlp, "shared_experts", self.mlp))

        r = config.recurrence
        looped = r.placement == "block" and r.range_of(layer, config.num_hidden_layers) is not None
        self.sandwich = r.sandwich_norm and looped
        if self.sandwich:  # CogView, arXiv 2105.13290, section 2.4
            self.attention_output_layernorm = layer_norm(config)
            self.mlp_output_layernorm = layer_norm(config)

    def forward(self, x: Tensor, context: AttentionContext) -> LayerOutput:
        """x (B, T, D) -> the layer's output."""
        compiled = self.compile_dense and context.cache is None  # with a cache, lengths grow
        attention = maybe_compiled(self.self_attn, compiled, self.input_layernorm(x), context)
        x = x + (self.attention_output_layernorm(attention.out) if self.sandwich else attention.out)
        normed, statistics = self.post_attention_layernorm(x), None
        if isinstance(self.mlp, MoE):
            out, statistics = self.mlp(normed, context.token_mask, context.statistics, context.row_weights)
        else:
            out = maybe_compiled(self.mlp, self.compile_dense, normed)
        x = x + (self.mlp_output_layernorm(out) if self.sandwich else out)
        aux = None if statistics is None else torch.stack((statistics.balance, statistics.router_z))
        load = None if statistics is None else statistics.load
        return LayerOutput(x, aux, load, attention.kept, attention.trace)

    def count(self, load: Tensor) -> None:
        """Adds the load of a forward pass to the experts' own count."""
        if isinstance(self.mlp, MoE):
            self.mlp.load += load


def run_layer(module: Any, execution: ExecutionConfig, *inputs: Any) -> LayerOutput:
    """Runs a DecoderLayer or an MTPModule, under activation checkpointing if asked for.

    The caller counts the load, outside the part that activation checkpointing runs twice.
    """
    if execution.checkpointing in ("none", "iteration") or not torch.is_grad_enabled():
        out = module(*inputs)
    else:
        out = recomputed(execution.checkpointing, module, *inputs)
    assert isinstance(out, LayerOutput)
    return out
