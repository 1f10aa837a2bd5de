"""One decoder layer, and how it is run: plainly or under activation checkpointing.

Shapes: B batch, T tokens, D hidden, E experts.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from .attention import GroupedQueryAttention, MultiHeadLatentAttention
from .attention_backends import AttentionContext
from .config import ModelConfig
from .execution import ExecutionConfig
from .layers import RMSNorm, call, feed_forward
from .moe import MoE

AUX_TERMS = ("balance", "router_z")


class LayerOutput(NamedTuple):
    """A layer's result."""

    hidden: Tensor  # (B, T, D)
    aux: Tensor | None = None  # (2,) fp32, AUX_TERMS summed over the rows
    load: Tensor | None = None  # (E,) int64 tokens given to each expert


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward layer, dense or mixture of experts."""

    def __init__(
        self, config: ModelConfig, layer: int, moe_class: type[MoE], execution: ExecutionConfig
    ) -> None:
        super().__init__()
        D, eps, affine = config.hidden_size, config.rms_norm_eps, config.rms_norm_affine
        attention = MultiHeadLatentAttention if config.use_mla else GroupedQueryAttention
        self.input_layernorm = RMSNorm(D, eps, affine)
        self.self_attn = attention(config, layer)
        self.post_attention_layernorm = RMSNorm(D, eps, affine)
        self.compile_dense = execution.compile
        self.mlp: nn.Module = (
            moe_class(config, execution) if config.is_moe_layer(layer) else feed_forward(config)
        )

    def forward(self, x: Tensor, context: AttentionContext) -> LayerOutput:
        """x (B, T, D) -> the layer's output."""
        x = x + call(self.self_attn, self.compile_dense, self.input_layernorm(x), context)
        normed = self.post_attention_layernorm(x)
        if not isinstance(self.mlp, MoE):
            return LayerOutput(x + call(self.mlp, self.compile_dense, normed))
        out, statistics = self.mlp(normed, context.token_mask, context.statistics)
        if statistics is None:
            return LayerOutput(x + out)
        aux = torch.stack((statistics.balance, statistics.router_z))
        return LayerOutput(x + out, aux, statistics.load)

    def count(self, load: Tensor) -> None:
        """Adds a forward pass's load to the experts' own count."""
        if isinstance(self.mlp, MoE):
            self.mlp.load += load


def run_layer(module: Any, execution: ExecutionConfig, *inputs: Any) -> tuple[Tensor, Tensor | float]:
    """Runs a DecoderLayer or an MTPModule.

    The load is counted here, outside of what activation checkpointing runs a second time.

    Returns:
        (B, T, D) hidden states and the (2,) auxiliary losses, 0 where there are none.
    """
    if execution.checkpointing == "none" or not torch.is_grad_enabled():
        out = module(*inputs)
    else:
        contexts = functools.partial(create_selective_checkpoint_contexts, _SAVED[execution.checkpointing])
        out = checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    if module.training and out.load is not None:
        module.count(out.load)
    return out.hidden, 0.0 if out.aux is None else out.aux


# Operations whose results are kept. A router that chose again could choose otherwise, by rounding.
_CHOICE = [torch.ops.aten.topk.default]
_SAVED: dict[str, list[Any]] = {
    "block": _CHOICE,
    "selective": [
        *_CHOICE,
        torch.ops.aten.mm.default,
        torch.ops.aten._grouped_mm.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    ],
}
