"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; V3, arXiv 2412.19437, eq. 1-11)
and the plain grouped-query attention that it is compared to (arXiv 2305.13245).

Shapes: B batch, T query tokens, S key tokens, D hidden, H heads, G key-value heads, C KV latent,
N no-position width, R rotary width, V value width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.backends.attention import attend, sdpa
from model.config.execution import ExecutionConfig
from model.config.model import ModelConfig
from model.context import AttentionContext
from model.layers import Linear, RMSNorm, attention_scale, rotate, upcasts, whole_weight
from model.loop_trace import LoopTrace
from model.recurrence import LatentRefinement

# The reference uses its default for the latents' norms, whatever rms_norm_eps says.
LATENT_NORM_EPS = 1e-6


class AttentionOutput(NamedTuple):
    """An attention layer's result."""

    out: Tensor  # (B, T, D)
    kept: tuple[Tensor, ...] | None = None  # keys and values for the next loop step; see cache.kept_keys
    trace: LoopTrace | None = None  # of the layer's own Latent Reasoning Unit


def refinement(
    config: ModelConfig, layer: int, width: int, query_width: int, execution: ExecutionConfig
) -> LatentRefinement:
    return LatentRefinement(config, layer, width, query_width, execution.checkpointing == "iteration")


def refined_placement(config: ModelConfig, layer: int) -> str | None:
    """kv or post_attention if this layer has its own Latent Reasoning Unit."""
    r = config.recurrence
    inside = r.token_local and r.range_of(layer, config.num_hidden_layers) is not None
    return r.placement if inside else None


class MultiHeadLatentAttention(nn.Module):
    """Attention whose keys and values come from one C-wide latent per token.

    Keys and values are expanded per head, or, where cheaper, the expansion is absorbed into query and
    output, so that decoding reads C + R numbers per cached token.
    """

    def __init__(self, config: ModelConfig, layer: int, execution: ExecutionConfig) -> None:
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
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, H * config.qk_head_dim, bias=False)
        rotated = R if self.key_source != "latent" else 0
        self.kv_a_proj_with_mqa = Linear(D, C + rotated, config.qkv_bias)
        self.kv_a_layernorm = RMSNorm(C, LATENT_NORM_EPS) if config.latent_norm else nn.Identity()
        self.kv_b_proj = Linear(
            config.kv_lora_rank, H * (config.qk_nope_head_dim + config.v_head_dim), bias=False
        )
        self.o_proj = Linear(H * config.v_head_dim, D, bias=False)
        if self.placement is not None:
            width = C if self.placement == "kv" else D
            self.reasoning = refinement(config, layer, width, H * config.qk_head_dim, execution)
        if self.key_source != "hidden":
            self.k_latent_proj = Linear(C, R, bias=False, zero=self.key_source == "hidden_plus_latent")

    def forward(self, x: Tensor, context: AttentionContext) -> AttentionOutput:
        """x (B, T, D) -> the layer's output."""
        c = self.config
        assert context.rotation is not None
        query = (
            self.q_proj(x) if c.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        )
        heads = query.unflatten(-1, (c.num_attention_heads, c.qk_head_dim))
        q_nope, q_rope = heads.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        q_rope = rotate(q_rope, context.rotation)
        latent, k_rope, trace = self._latent(x, query, context)
        k_rope = rotate(k_rope, context.rotation)
        kept = None
        if context.cache is not None or context.loop is not None:
            context.observe(self.layer, q_nope, q_rope)
            held, context, kept = context.remember(self.layer, torch.cat((latent, k_rope), -1))
            latent, k_rope = held.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        # In the absorbed form backward would hold views of the whole weight, which ZeRO-3 could not free.
        decodes = context.cache is not None and not context.cache.differentiable
        if decodes and self._absorbing_is_cheaper(x.shape[1], held.shape[1]):
            attended = self._attend_absorbed(q_nope, q_rope, held, context.mask)
        else:
            attended = self._attend_expanded(q_nope, q_rope, latent, k_rope, context)
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

    def _absorbing_is_cheaper(self, T: int, S: int) -> bool:
        """Compares how many multiplications a head takes in either form."""
        c = self.config
        per_head = c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)
        expanded = S * per_head + T * S * (c.qk_head_dim + c.v_head_dim)
        return T * per_head + T * S * (2 * c.kv_lora_rank + c.qk_rope_head_dim) < expanded

    def _attend_expanded(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, context: AttentionContext
    ) -> Tensor:
        """Multi-head form: latent (B, S, C), k_rope (B, S, R) -> (B, T, H, V)."""
        c = self.config
        key_value = self.kv_b_proj(latent).unflatten(-1, (c.num_attention_heads, -1))
        k_nope, value = key_value.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        k_rope = k_rope[:, :, None].expand(-1, -1, c.num_attention_heads, -1)
        query, key = _joined(q_nope, q_rope), _joined(k_nope, k_rope)
        return attend(query, key, value, context, self.scale)

    def _attend_absorbed(self, q_nope: Tensor, q_rope: Tensor, held: Tensor, mask: Tensor | None) -> Tensor:
        """Attention over the cached latents themselves: held (B, S, C+R) -> (B, T, H, V).

        All H*T queries of a row share one key, [latent | k_rope], and one value, the latent.
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
        query = query.permute(1, 0, 2, 3).reshape(B, H * T, 1, -1)
        if mask is None and T > 1:
            mask = torch.ones(1, 1, T, T, dtype=torch.bool, device=held.device).tril()
        if mask is not None:
            mask = mask.expand(-1, H, -1, -1).reshape(mask.shape[0], 1, H * T, -1)
        key = held[:, :, None]
        attended = sdpa(query, key, key, mask, False, self.scale)[..., :C]  # (B, H*T, 1, C)
        per_head = attended.view(B, H, T, C).transpose(0, 1).reshape(H, B * T, C)
        out = per_head @ w_value.transpose(1, 2)  # (H, B*T, V)
        return out.view(H, B, T, -1).permute(1, 2, 0, 3).to(dtype)


def _joined(nope: Tensor, rope: Tensor) -> Tensor:
    """(B, T, H, N) and (B, T, H, R) -> (B, T, H, N+R), laid out as (B, H, T, N+R), as attention reads it."""
    return torch.cat((nope.transpose(1, 2), rope.transpose(1, 2)), -1).transpose(1, 2)


class GroupedQueryAttention(nn.Module):
    """Plain attention with fewer key-value heads than query heads.

    The whole width of a head is rotated, unless positions are learned.
    """

    def __init__(self, config: ModelConfig, layer: int, execution: ExecutionConfig) -> None:
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

    def forward(self, x: Tensor, context: AttentionContext) -> AttentionOutput:
        """x (B, T, D) -> the layer's output."""
        width, kept, trace = self.config.plain_head_dim, None, None
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
            key, value = held.unflatten(-1, (-1, width)).chunk(2, 2)
        out = self.o_proj(attend(query, key, value, context, self.scale).flatten(2))
        if self.placement is not None:
            out, trace = self.reasoning(out, flat, context)
        return AttentionOutput(out, kept, trace)
