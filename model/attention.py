"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; V3, arXiv 2412.19437, eq. 1-11).

Shapes: B batch, T query tokens, S key tokens, D hidden, H heads, C KV latent, N no-position width,
R rotary width, V value width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import LatentCache
from .config import ModelConfig
from .layers import RMSNorm, rotate


@dataclass
class AttentionContext:
    """What every attention layer of one forward pass shares."""

    cos: Tensor  # (B, T, R/2)
    sin: Tensor
    mask: Tensor | None  # (B or 1, 1, T, S) booleans, True: may attend; None: plain causal
    token_mask: Tensor | None  # (B, T) booleans, False: padding; None: every token is real
    cache: LatentCache | None = None
    step: int = 0  # loop step that is running, part of the cache slot


def visible_keys(real: Tensor, query_length: int, cu_seqlens: Tensor | None) -> Tensor:
    """(B, 1, T, S): a query sees real keys of its own document at or before its own place.

    Args:
        real: (B, S) booleans, False under padding.
        query_length: T, the last T of the S tokens.
        cu_seqlens: (B, n) starts of the documents of each row, padded with S; None: one document.
    """
    S = real.shape[1]
    place = torch.arange(S, device=real.device)
    queries = place[S - query_length :]
    mask = real[:, None, :] & (place <= queries[:, None])
    if cu_seqlens is not None:
        document = torch.searchsorted(cu_seqlens, place.expand(len(real), S).contiguous(), right=True)
        mask = mask & (document[:, S - query_length :, None] == document[:, None, :])
    # A padded query sees itself: a row without any key would turn into NaN.
    return (mask | (place == queries[:, None]))[:, None]


class MultiHeadLatentAttention(nn.Module):
    """Attention whose keys and values come from one C-wide latent per token.

    Without a filled cache keys and values are expanded per head; with one, the expansion is absorbed
    into query and output, so that decoding reads C + R numbers per cached token.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        D, H = config.hidden_size, config.num_attention_heads
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(D, H * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(D, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, H * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(D, config.kv_lora_rank + config.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, H * (config.qk_nope_head_dim + config.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(H * config.v_head_dim, D, bias=False)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        c = self.config
        query = (
            self.q_proj(x) if c.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        )
        query = query.unflatten(-1, (c.num_attention_heads, c.qk_head_dim))
        q_nope, q_rope = query.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        q_rope = rotate(q_rope, context.cos, context.sin)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        latent = torch.cat((self.kv_a_layernorm(latent), rotate(k_rope, context.cos, context.sin)), -1)
        absorb = False
        if context.cache is not None:
            absorb = context.cache.length > 0
            latent = context.cache.append(self.layer, context.step, latent)
        latent, k_rope = latent.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        attend = self._attend_absorbed if absorb else self._attend_expanded
        return self.o_proj(attend(q_nope, q_rope, latent, k_rope, context.mask).flatten(2))

    def _attend_expanded(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Multi-head form for training and prefill -> (B, T, H, V)."""
        c = self.config
        key_value = self.kv_b_proj(latent).unflatten(-1, (c.num_attention_heads, -1))
        k_nope, value = key_value.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        k_rope = k_rope[:, :, None].expand(-1, -1, c.num_attention_heads, -1)
        query = torch.cat((q_nope, q_rope), -1).transpose(1, 2)
        key = torch.cat((k_nope, k_rope), -1).transpose(1, 2)
        # The CPU's fused kernel wants equal widths; zero columns change nothing and are cut off again.
        spare = max(c.qk_head_dim - c.v_head_dim, 0)
        value = F.pad(value, (0, spare)).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=c.qk_head_dim**-0.5
        )
        return out[..., : c.v_head_dim].transpose(1, 2)

    def _attend_absorbed(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Decode form over the latents themselves -> (B, T, H, V); equal to the expanded form."""
        c = self.config
        expand = self.kv_b_proj.weight.view(c.num_attention_heads, -1, c.kv_lora_rank)
        w_key, w_value = expand.split([c.qk_nope_head_dim, c.v_head_dim], 1)
        q_latent = torch.einsum("bthn,hnc->bthc", q_nope, w_key)
        scores = torch.einsum("bthc,bsc->bhts", q_latent, latent)
        scores = (scores + torch.einsum("bthr,bsr->bhts", q_rope, k_rope)) * c.qk_head_dim**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        weights = scores.softmax(-1, dtype=torch.float32).to(latent.dtype)
        attended = torch.einsum("bhts,bsc->bthc", weights, latent)
        return torch.einsum("bthc,hvc->bthv", attended, w_value)
