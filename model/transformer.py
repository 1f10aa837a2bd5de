"""The network: tokens -> hidden states -> logits or loss.

Shapes: B batch, T new tokens, S cached and new tokens, D hidden, V vocabulary.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AttentionContext, MultiHeadLatentAttention, visible_keys
from .cache import LatentCache, full_mask
from .config import ModelConfig
from .generate import generate
from .layers import RMSNorm, SwiGLU, rotary_tables
from .losses import IGNORE_INDEX, chunked_cross_entropy, total_loss
from .moe import Experts, MoE
from .recurrence import GATE_BIAS, LatentReasoningUnit


class ModelOutput(NamedTuple):
    """`logits` (B, T, V) when no targets are given; otherwise the loss of this batch and its terms.

    A named tuple, since ZeRO-3 looks for tensors in tuples and dicts only.
    """

    logits: Tensor | None = None
    loss: Tensor | None = None  # normalised by this batch's own counts
    loss_sums: dict[str, Tensor] | None = None  # one scalar per row of losses.LOSS_TABLE, not normalised


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward layer, dense or mixture of experts."""

    def __init__(self, config: ModelConfig, layer: int, moe_class: type[MoE]) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MultiHeadLatentAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_moe = config.is_moe_layer(layer)
        self.mlp: nn.Module = (
            moe_class(config) if self.is_moe else SwiGLU(config.hidden_size, config.intermediate_size)
        )

    def forward(self, x: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> (B, T, D) and the balance loss summed over rows."""
        x = x + self.self_attn(self.input_layernorm(x), context)
        normed = self.post_attention_layernorm(x)
        if self.is_moe:
            out, balance = self.mlp(normed, context.token_mask)
            return x + out, balance
        return x + self.mlp(normed), x.new_zeros((), dtype=torch.float32)


class LMHead(nn.Module):
    """Projection to the vocabulary, which also forms the loss: see losses.py for why."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """hidden (B, T, D) -> logits (B, T, V), or with targets (B, T) their summed cross-entropy."""
        if targets is None:
            return F.linear(hidden, self.weight)
        return chunked_cross_entropy(hidden.flatten(0, 1), self.weight, targets.flatten())


class Transformer(nn.Module):
    """Embedding, layers (some looped), final norm."""

    def __init__(self, config: ModelConfig, moe_class: type[MoE]) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, moe_class) for i in range(config.num_hidden_layers)
        )
        if config.recurrence.placement == "block":
            self.recurrence = LatentReasoningUnit(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: Tensor, context: AttentionContext, num_steps: int) -> tuple[Tensor, Tensor]:
        """tokens (B, T) -> normed hidden states (B, T, D) and the balance loss of all rows and layers."""
        x = self.embed_tokens(tokens)
        first, last = self._core_range()
        x, balance = self._run(range(first), x, context)
        if first < last:

            def core(state: Tensor, step: int) -> tuple[Tensor, Tensor]:
                context.step = step
                return self._run(range(first, last), state, context)

            x, core_balance = self.recurrence(x, core, num_steps)
            context.step = 0
            balance = balance + core_balance
        x, coda_balance = self._run(range(last, len(self.layers)), x, context)
        return self.norm(x), balance + coda_balance

    def _core_range(self) -> tuple[int, int]:
        first = self.config.recurrence.num_prelude_layers if self.config.num_core_layers else 0
        return first, first + self.config.num_core_layers

    def _run(self, layers: range, x: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        total = x.new_zeros((), dtype=torch.float32)
        for i in layers:
            x, balance = self.layers[i](x, context)
            total = total + balance
        return x, total


class ZeroModel(nn.Module):
    """The language model.

    Args:
        config: sizes and switches.
        moe_class: the mixture-of-experts layer; pretrain passes its expert-parallel one.
        seed: the initial weights are a function of (seed, parameter name, global expert number), so that
            they are the same however the model is spread over ranks.
    """

    def __init__(self, config: ModelConfig, moe_class: type[MoE] = MoE, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.model = Transformer(config, moe_class)
        self.lm_head = LMHead(config)
        if not self.lm_head.weight.is_meta:  # on the meta device there are shapes only
            initialize(self, seed)

    def forward(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        targets: Tensor | None = None,
        num_steps: int | None = None,
        cache: LatentCache | None = None,
    ) -> ModelOutput:
        """Runs the model.

        Args:
            tokens: (B, T) int64.
            attention_mask: (B, S), 1 or True where a token is real; S counts cached tokens too.
            position_ids: (B, T); default: counted from the start of each document, padding left out.
            cu_seqlens: (B, n) int32, starts of the documents packed into each row, 0 first, padded with T.
            targets: (B, T) int64, the token to predict at each place or losses.IGNORE_INDEX.
            num_steps: loop steps; default: the config's.
            cache: latents of earlier tokens; extended in place.

        Raises:
            ValueError: the row is longer than max_position_embeddings, or the arguments do not fit together.
        """
        context = self._context(tokens, attention_mask, position_ids, cu_seqlens, cache)
        steps = self.config.recurrence.num_steps if num_steps is None else num_steps
        if steps < 1:
            raise ValueError(f"num_steps={steps} must be at least 1")
        hidden, balance = self.model(tokens, context, steps)
        if cache is not None:
            cache.advance(tokens.shape[1])
        if targets is None:
            return ModelOutput(logits=self.lm_head(hidden))
        sums = {"cross_entropy": self.lm_head(hidden, targets), "balance": balance}
        counts = {"targets": int((targets != IGNORE_INDEX).sum()), "rows": len(tokens)}
        return ModelOutput(loss=total_loss(self.config, sums, counts), loss_sums=sums)

    def _context(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: LatentCache | None,
    ) -> AttentionContext:
        B, T = tokens.shape
        past = cache.length if cache is not None else 0
        S = past + T
        if self.config.max_position_embeddings < S:
            raise ValueError(
                f"{S} tokens exceed max_position_embeddings={self.config.max_position_embeddings}; "
                "shorten the input or train with a larger value"
            )
        if cu_seqlens is not None and past:
            raise ValueError("cu_seqlens describes whole rows and cannot be used with a filled cache")
        plain = attention_mask is None and cu_seqlens is None and past == 0
        real = full_mask(attention_mask, B, S, tokens.device)
        mask = None if plain else visible_keys(real, T, cu_seqlens)
        if position_ids is None:
            position_ids = _positions(real, cu_seqlens)[:, past:]
        cos, sin = rotary_tables(position_ids, self.config.qk_rope_head_dim, self.config.rope_theta)
        token_mask = None if attention_mask is None else real[:, past:]
        return AttentionContext(cos, sin, mask, token_mask, cache)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int = 64,
        attention_mask: Tensor | None = None,
        eos_token_id: int | None = None,
        stopping: Callable[[Tensor], Tensor] | None = None,
        num_steps: int | None = None,
    ) -> Tensor:
        """Greedy continuation of tokens (B, T) -> (B, T + n); see generate.generate."""
        return generate(self, tokens, max_new_tokens, attention_mask, eos_token_id, stopping, num_steps)

    def moe_layers(self) -> list[MoE]:
        return [m for m in self.modules() if isinstance(m, MoE)]

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes model.safetensors and config.json."""
        from .pretrained import save_weights

        save_weights(Path(directory), self.config, self.state_dict())


def _positions(real: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(B, S) positions: padding is not counted (Hugging Face's rule), documents start at 0."""
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    if cu_seqlens is None:
        return positions
    place = torch.arange(real.shape[1], device=real.device).expand_as(real).contiguous()
    document = torch.searchsorted(cu_seqlens, place, right=True) - 1
    return positions - positions.gather(1, cu_seqlens.long().gather(1, document))


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Normal weights of the config's standard deviation, each from a stream named after the parameter."""
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}"
            if isinstance(module, Experts):
                for row, expert in zip(parameter, module.expert_ids, strict=True):
                    _fill(row, model, f"{seed}:{full_name}:{expert}")
            elif name == "bias":
                parameter.fill_(GATE_BIAS)  # the recurrence gate has the only bias
            elif isinstance(module, RMSNorm):
                parameter.fill_(1.0)
            else:
                _fill(parameter, model, f"{seed}:{full_name}")


def _fill(parameter: Tensor, model: Any, stream: str) -> None:
    seed = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(parameter.shape, generator=generator) * model.config.initializer_range
    parameter.copy_(values)
