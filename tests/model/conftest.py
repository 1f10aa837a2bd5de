"""Small models of every kind, with weights large enough to expose mistakes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from model import ModelConfig, ZeroModel
from model.config.execution import ExecutionConfig

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "num_attention_heads": 3,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 7,
    "intermediate_size": 40,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 9,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 1.3}
BLOCK = {"placement": "block", "ranges": [[1, 1]], "num_steps": 3}

VARIANTS: dict[str, dict[str, Any]] = {
    "deepseek": {},
    "q_lora": {"q_lora_rank": 12},
    "groups": {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    "no_shared_expert": {"n_shared_experts": 0, "norm_topk_prob": False},
    "dense": {"first_k_dense_replace": 3},
    "wide_values": {"v_head_dim": 16},
    "yarn": {"rope_scaling": YARN},
    "grouped_query": {"use_mla": False, "num_attention_heads": 4, "num_key_value_heads": 2},
    "plain": {
        "use_mla": False,
        "use_moe": False,
        "qk_norm": True,
        "rms_norm_affine": False,
        "hidden_act": "relu2",
        "head_dim": 10,
    },
    "gpt2": {
        "use_mla": False,
        "use_moe": False,
        "hidden_act": "gelu",
        "norm": "layer_norm",
        "use_bias": True,
        "position_embedding": "learned",
        "tie_word_embeddings": True,
        "head_dim": 7,
    },
    "llama": {
        "use_mla": False,
        "use_moe": False,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_scaling": {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "qwen2": {
        "use_mla": False,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "qkv_bias": True,
        "tie_word_embeddings": True,
    },
    "converted": {
        "use_moe": False,
        "qkv_bias": True,
        "tie_word_embeddings": True,
        "latent_norm": False,
        "qk_rope_head_dim": 6,
        "rope_pairs": [0, 0, 2],
        "rope_pairs_dim": 8,
        "rope_scaling": {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "loop_retrofit": {
        "recurrence": {
            "placement": "block",
            "ranges": [[1, 1]],
            "num_steps": 3,
            "injection": "none",
            "update": "retrofit",
            "state_norm": False,
            "output_norm": False,
        }
    },
    "normed": {"qk_norm": True, "q_lora_rank": 12, "rope_scaling": YARN},
    "normed_without_scales": {"qk_norm": True, "rms_norm_affine": False, "hidden_act": "relu2"},
    "refined_keys": {
        "qkv_bias": True,
        "recurrence": {"placement": "kv", "ranges": [[0, 1]], "num_steps": 2, "k_rope_source": "latent"},
    },
    "latent_dense": {"use_moe": False},
    "multi_token": {"num_nextn_predict_layers": 2},
    "embedding_mixing": {"embedding_mixing": 4},
    "pause": {"num_pause_tokens": 2},
    "memory": {"num_memory_tokens": 2, "segment_length": 5, "use_moe": False},
    "loop": {"recurrence": BLOCK},
    "loop_concat_simple": {"recurrence": {**BLOCK, "injection": "concat", "update": "simple"}},
    "loop_tied": {
        "use_moe": False,
        "recurrence": {
            "placement": "block",
            "num_steps": 2,
            "injection": "none",
            "update": "simple",
            "state_norm": False,
        },
    },
    "loop_everything": {"first_k_dense_replace": 0, "recurrence": {"placement": "block", "num_steps": 2}},
}


@pytest.fixture
def build() -> Callable[..., ZeroModel]:
    def make(
        variant: str = "deepseek", seed: int = 0, execution: dict[str, Any] | None = None, **overrides: Any
    ) -> ZeroModel:
        config = ModelConfig.from_dict({**SMALL, **VARIANTS[variant], **overrides})
        model = ZeroModel(config, seed=seed, execution=ExecutionConfig(**(execution or {}))).eval()
        generator = torch.Generator().manual_seed(seed)
        for layer in model.moe_layers():  # a balancing bias that changes choices
            bias = layer.gate.e_score_correction_bias
            bias.copy_(0.1 * torch.randn(bias.shape, generator=generator))
        with torch.no_grad():
            for name, parameter in model.named_parameters():  # what starts at 0 or 1 shows no mistake
                if name.endswith("_proj.bias"):
                    parameter.normal_(0, 0.3, generator=generator)
                if name.endswith(("q_norm.weight", "k_norm.weight")):
                    parameter.uniform_(0.5, 1.5, generator=generator)
        return model

    return make


@pytest.fixture(params=sorted(VARIANTS))
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, 61, (3, 17), generator=torch.Generator().manual_seed(1))


def check_documents_are_apart(
    model: ZeroModel, tokens: torch.Tensor, starts: torch.Tensor, tolerance: float
) -> None:
    """Asserts that every document in the packed rows has the same logits as it has alone."""
    packed = model(tokens, cu_seqlens=starts).logits
    for row, row_starts in enumerate(starts.tolist()):
        for first, last in zip(row_starts, row_starts[1:], strict=False):
            if first < last:
                alone = model(tokens[row : row + 1, first:last]).logits[0]
                torch.testing.assert_close(packed[row, first:last], alone, rtol=0, atol=tolerance)
