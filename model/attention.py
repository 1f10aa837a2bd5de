"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; V3, arXiv 2412.19437, eq. 1-11)
and the plain grouped-query attention that it is compared to (arXiv 2305.13245).

Shapes: B batch, T query tokens, S key tokens, D hidden, H heads, G key-value heads, C KV latent,
N no-position width, R rotary width, V value width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.backends.attention import attend, sdpa
from model.config.execution import DOCUMENT_BACKENDS, ExecutionConfig
from model.config.model import ModelConfig
from model.context import AttentionContext, causal_context
from model.layers import (
    Linear,
    RMSNorm,
    SharedKeyNorm,
    at_least_fp32,
    attention_scale,
    rotate,
    upcasts,
    whole_weight,
)
from model.loop_trace import LoopTrace
from model.recurrence import LatentRefinement

# The reference uses its default for the latents' norms, whatever rms_norm_eps says.
LATENT_NORM_EPS = 1e-6
# Over normed keys the absorbed form holds the scores of all queries at once, so it takes no more than these.
SCORED_QUERIES = 128


class AttentionOutput(NamedTuple):
    """An attention layer's result."""

    out: Tensor  # (B, T, D)
    kept: tuple[Tensor, ...] | None = None  # keys and values for the next loop step; see cache.kept_keys
    trace: LoopTrace | None = None  # of the layer's own Latent Reasoning Unit


def refinement(
    config: ModelConfig, layer: int, width: int, query_width: int, execution: ExecutionConfig | None
) -> LatentRefinement:
    recompute = execution is not None and execution.checkpointing == "iteration"
    return LatentRefinement(config, layer, width, query_width, recompute)


def refined_placement(config: ModelConfig, layer: int) -> str | None:
    """kv or post_attention if this layer has its own Latent Reasoning Unit."""
    r = config.recurrence
    inside = r.token_local and r.range_of(layer, config.num_hidden_layers) is not None
    return r.placement if inside else None


class MultiHeadLatentAttention(nn.Module):
    """Attention whose keys and values come from one C-wide latent per token.

    Keys and values are expanded per head, or, where cheaper, the expansion is absorbed into query and
    output, so that decoding reads C + R numbers per cached token; with qk_norm C + R + H.
    """

    def __init__(self, config: ModelConfig, layer: int = 0, execution: ExecutionConfig | None = None) -> None:
        super().__init__()
        self.config, self.layer, self.scale = config, layer, attention_scale(config)
        D, H = config.hidden_size, config.num_attention_heads
        self.placement = refined_placement(config, layer)
        self.key_source = config.recurrence.key_source if self.placement == "kv" else "hidden"
        C, R = config.kv_lora_rank, config.qk_rope_head_dim
        if config.q_lora_rank is None:
            self.q_proj = Linear(D, H * config.qk_head_dim, config.qkv_bias)
        else:
            self.q_a_proj = Linear(D, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS, config.rms_norm_affine)
            self.q_b_proj = Linear(config.q_lora_rank, H * config.qk_head_dim, bias=False)
        rotated = R if self.key_source != "latent" else 0
        self.kv_a_proj_with_mqa = Linear(D, C + rotated, config.qkv_bias)
        self.kv_a_layernorm: nn.Module = nn.Identity()
        if config.latent_norm:
            self.kv_a_layernorm = RMSNorm(C, LATENT_NORM_EPS, config.rms_norm_affine)
        self.kv_b_proj = Linear(
            config.kv_lora_rank, H * (config.qk_nope_head_dim + config.v_head_dim), bias=False
        )
        self.o_proj = Linear(H * config.v_head_dim, D, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.qk_head_dim, config.rms_norm_eps, config.rms_norm_affine)
            self.k_norm = SharedKeyNorm(config.qk_head_dim, config.rms_norm_eps, config.rms_norm_affine)
        if self.placement is not None:
            width = C if self.placement == "kv" else D
            self.reasoning = refinement(config, layer, width, H * config.qk_head_dim, execution)
        if self.key_source != "hidden":
            self.k_latent_proj = Linear(C, R, bias=False, zero=self.key_source == "hidden_plus_latent")

    def forward(self, x: Tensor, context: AttentionContext | None = None) -> AttentionOutput:
        """x (B, T, D) -> the layer's output; without a context see context.causal_context."""
        c = self.config
        context = causal_context(c, x) if context is None else context
        assert context.rotation is not None
        query = (
            self.q_proj(x) if c.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        )
        heads = query.unflatten(-1, (c.num_attention_heads, c.qk_head_dim))
        if c.qk_norm:
            heads = self.q_norm(heads)
        q_nope, q_rope = heads.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        latent, k_rope, trace = self._latent(x, query, context)
        up = None
        inverse_rms: list[Tensor] = []
        if c.qk_norm:
            up = self._up(latent)
            q_nope, k_rope, *inverse_rms = self.k_norm(q_nope, up[0], k_rope)
        q_rope, k_rope = rotate(q_rope, context.rotation), rotate(k_rope, context.rotation)
        parts = (latent, k_rope, *inverse_rms)
        attended, kept = self._attend(q_nope, q_rope, parts, up, context)
        out = self.o_proj(attended.flatten(2))
        if self.placement == "post_attention":
            out, trace = self.reasoning(out, query, context)
        return AttentionOutput(out, kept, trace)

    def _latent(
        self, x: Tensor, query: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Tensor, LoopTrace | None]:
        """x (B, T, D) and queries (B, T, H Q) -> latent (B, T, C), the shared key before rotation (B, T, R).

        k_rope_source: `hidden` is DeepSeek's; `latent` forms the key from the refined latent;
        `hidden_plus_latent` adds what the refinement changed, through a projection that starts at 0.
        """
        down, C = self.kv_a_proj_with_mqa(x), self.config.kv_lora_rank
        latent, k_rope = self.kv_a_layernorm(down[..., :C]), down[..., C:]
        if self.placement != "kv":
            return latent, k_rope, None
        refined, trace = self.reasoning(latent, query, context)
        if self.key_source == "latent":
            k_rope = self.k_latent_proj(refined)
        elif self.key_source == "hidden_plus_latent":
            k_rope = k_rope + self.k_latent_proj(refined - latent)
        return refined, k_rope, trace

    def _attend(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        parts: tuple[Tensor, ...],
        up: tuple[Tensor, Tensor] | None,
        context: AttentionContext,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Attention to these tokens and those remembered: (B, T, H, V), and what the next loop step keeps.

        Args:
            parts: these tokens' numbers in the cache, see ModelConfig.held_widths.
            up: what `_up` gave for them, if known.
        """
        held, kept = None, None
        if context.cache is not None or context.loop is not None:
            context.observe(self.layer, q_nope, q_rope)
            held, context, kept = context.remember(self.layer, torch.cat(parts, -1))
            parts, up = held.split(self.config.held_widths, -1), None
        # In the absorbed form backward would hold views of the whole weight, which ZeRO-3 could not free.
        decodes = context.cache is not None and not context.cache.differentiable
        if held is not None and decodes and self._absorbing_is_cheaper(q_nope.shape[1], held.shape[1]):
            return self._attend_absorbed(q_nope, q_rope, held, context.mask), kept
        by_head = context.backend not in DOCUMENT_BACKENDS
        key, value = self._keys_and_values(parts, up, by_head)
        return attend(_joined(q_nope, q_rope, by_head), key, value, context, self.scale), kept

    def _absorbing_is_cheaper(self, T: int, S: int) -> bool:
        """Compares how many multiplications a head takes in either form."""
        c = self.config
        if c.qk_norm and T > SCORED_QUERIES:
            return False
        per_head = c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)
        expanded = S * per_head + T * S * (c.qk_head_dim + c.v_head_dim)
        return T * per_head + T * S * (2 * c.kv_lora_rank + c.qk_rope_head_dim) < expanded

    def _up(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, S, C) -> unrotated parts of the keys (B, S, H, N) and values (B, S, H, V)."""
        c = self.config
        heads = self.kv_b_proj(latent).unflatten(-1, (c.num_attention_heads, -1))
        k_nope, value = heads.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        return k_nope, value

    def keys_and_values(self, held: Tensor) -> tuple[Tensor, Tensor]:
        """Every head's keys (B, S, H, N+R) and values (B, S, H, V) from what is cached, (B, S, W).

        With qk_norm the queries carry the learned scale of the keys' unrotated part.
        """
        return self._keys_and_values(held.split(self.config.held_widths, -1))

    def _keys_and_values(
        self, parts: tuple[Tensor, ...], up: tuple[Tensor, Tensor] | None = None, by_head: bool = True
    ) -> tuple[Tensor, Tensor]:
        """parts: [latent, k_rope] or [latent, k_rope, 1/rms]; up: what `_up` gave for this latent; by_head:
        see _joined.
        """
        latent, k_rope, *inverse_rms = parts
        k_nope, value = self._up(latent) if up is None else up
        k_rope = k_rope[:, :, None].expand(-1, -1, self.config.num_attention_heads, -1)
        for factor in inverse_rms:
            k_nope, k_rope = k_nope * factor[..., None], k_rope * factor[..., None]
        return _joined(k_nope, k_rope, by_head), value

    def _attend_absorbed(self, q_nope: Tensor, q_rope: Tensor, held: Tensor, mask: Tensor | None) -> Tensor:
        """Attention over the cached latents themselves: held (B, S, W) -> (B, T, H, V).

        All H*T queries of a row share one key, [latent | k_rope], and one value, the latent. With qk_norm a
        head's products with the key are also multiplied by its 1/rms.
        """
        c, dtype = self.config, q_nope.dtype
        H, C = c.num_attention_heads, c.kv_lora_rank
        B, T = q_nope.shape[:2]
        expand = whole_weight(self.kv_b_proj).view(H, -1, C)
        if upcasts(held):
            expand, q_nope, q_rope, held = expand.float(), q_nope.float(), q_rope.float(), held.float()
        w_key, w_value = expand.split([c.qk_nope_head_dim, c.v_head_dim], 1)
        q_latent = q_nope.permute(2, 0, 1, 3).flatten(1, 2) @ w_key  # (H, B*T, C)
        query = torch.cat((q_latent.view(H, B, T, C), q_rope.permute(2, 0, 1, 3)), -1)
        query = query.permute(1, 0, 2, 3).reshape(B, H * T, -1)
        if mask is None and T > 1:
            mask = torch.ones(1, 1, T, T, dtype=torch.bool, device=held.device).tril()
        if c.qk_norm:
            key, inverse_rms = held.split([C + c.qk_rope_head_dim, H], -1)
            attended = _attend_shared_key(query, key, inverse_rms, mask, self.scale)[..., :C]
        else:
            if mask is not None:
                mask = mask.expand(-1, H, -1, -1).reshape(mask.shape[0], 1, H * T, -1)
            shared = held[:, :, None]
            attended = sdpa(query[:, :, None], shared, shared, mask, False, self.scale)[:, :, 0, :C]
        per_head = attended.view(B, H, T, C).transpose(0, 1).reshape(H, B * T, C)
        out = per_head @ w_value.transpose(1, 2)  # (H, B*T, V)
        return out.view(H, B, T, -1).permute(1, 2, 0, 3).to(dtype)


def _attend_shared_key(
    query: Tensor, key: Tensor, factor: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Attention whose scores are multiplied by a factor of key and head, which no fused kernel takes.

    Args:
        query: (B, H*T, K).
        key: (B, S, K), also the value.
        factor: (B, S, H).
        mask: (B or 1, 1, T, S) booleans, True: may attend; None: everything.

    Returns:
        (B, H*T, K).
    """
    H = factor.shape[-1]
    scores = at_least_fp32(query @ key.mT).unflatten(1, (H, -1))
    scores = scores * (factor.mT[:, :, None] * scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(key.dtype).flatten(1, 2) @ key


def _joined(nope: Tensor, rope: Tensor, by_head: bool) -> Tensor:
    """(B, T, H, N) and (B, T, H, R) -> (B, T, H, N+R), laid out as the attention backend reads it.

    by_head: as (B, H, T, N+R); else as (B, T, H, N+R), where all rows are one without a copy.
    """
    if not by_head:
        return torch.cat((nope, rope), -1)
    return torch.cat((nope.transpose(1, 2), rope.transpose(1, 2)), -1).transpose(1, 2)


class GroupedQueryAttention(nn.Module):
    """Plain attention with fewer key-value heads than query heads.

    The whole width of a head is rotated, unless positions are learned.
    """

    def __init__(self, config: ModelConfig, layer: int = 0, execution: ExecutionConfig | None = None) -> None:
        super().__init__()
        self.config, self.layer, self.scale = config, layer, attention_scale(config)
        self.placement = refined_placement(config, layer)
        D, H, G, width = (
            config.hidden_size,
            config.num_attention_heads,
            config.kv_heads,
            config.plain_head_dim,
        )
        biased = config.use_bias or config.qkv_bias
        self.q_proj = Linear(D, H * width, biased)
        self.k_proj = Linear(D, G * width, biased)
        self.v_proj = Linear(D, G * width, biased)
        self.o_proj = Linear(H * width, D, config.use_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(width, config.rms_norm_eps, config.rms_norm_affine)
            self.k_norm = RMSNorm(width, config.rms_norm_eps, config.rms_norm_affine)
        if self.placement is not None:
            self.reasoning = refinement(config, layer, D, H * width, execution)

    def forward(self, x: Tensor, context: AttentionContext | None = None) -> AttentionOutput:
        """x (B, T, D) -> the layer's output; without a context see context.causal_context."""
        width, kept, trace = self.config.plain_head_dim, None, None
        context = causal_context(self.config, x) if context is None else context
        flat = self.q_proj(x)
        query, key, value = (y.unflatten(-1, (-1, width)) for y in (flat, self.k_proj(x), self.v_proj(x)))
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        if context.rotation is not None:
            query, key = rotate(query, context.rotation), rotate(key, context.rotation)
        if context.cache is not None or context.loop is not None:
            context.observe(self.layer, query)
            both = torch.cat((key, value), 2).flatten(2)
            held, context, kept = context.remember(self.layer, both)
            key, value = self.keys_and_values(held)
        out = self.o_proj(attend(query, key, value, context, self.scale).flatten(2))
        if self.placement is not None:
            out, trace = self.reasoning(out, flat, context)
        return AttentionOutput(out, kept, trace)

    def keys_and_values(self, held: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, S, G, width) from what is cached, (B, S, W)."""
        keys, values = held.unflatten(-1, (-1, self.config.plain_head_dim)).chunk(2, 2)
        return keys, values
