"""Named sets of sizes."""

from typing import Any


def _nanodeepseek(layers: int, width: int, heads: int, experts: int) -> dict[str, Any]:
    """Layer, width, head and expert counts of nanoDeepSeek, with SwiGLU experts of equally many weights.

    Its two matrices of width 4D become three of width 8/3 D. A head is split 3:1 into an unrotated and a
    rotated part, and the latent is D/2 wide.
    """
    head = width // heads
    return {
        "vocab_size": 50304,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "kv_lora_rank": width // 2,
        "qk_nope_head_dim": head * 3 // 4,
        "qk_rope_head_dim": head // 4,
        "v_head_dim": head,
        "intermediate_size": width * 8 // 3,
        "first_k_dense_replace": 0,
        "moe_intermediate_size": width * 8 // 3,
        "n_routed_experts": experts,
        "num_experts_per_tok": 2,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "small": _nanodeepseek(layers=6, width=384, heads=4, experts=4),
    "base": _nanodeepseek(layers=12, width=768, heads=6, experts=8),
    "large": _nanodeepseek(layers=24, width=1536, heads=12, experts=8),
    # A looped model that a laptop trains in minutes: 1 prelude, 1 core x 4, 1 coda layer.
    "nano": {
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "intermediate_size": 384,
        "moe_intermediate_size": 128,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "recurrence": {
            "placement": "block",
            "ranges": [[1, 1]],
            "num_steps": 4,
        },
    },
}
# What a preset adds with use_mla=false.
PLAIN_ATTENTION: dict[str, dict[str, Any]] = {"large": {"num_key_value_heads": 6}}
