"""Counts against the built model, and helpful errors."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import ModelConfig, ZeroModel
from model.config.model import PRESETS
from model.config.unused import unused_keys
from model.counts import flops_per_token, num_parameters, training_flops_per_token

from .conftest import BLOCK, SMALL, VARIANTS


def test_parameter_counts_equal_the_built_model(build, variant):
    model = build(variant)
    config, parameters = model.config, sum(p.numel() for p in model.parameters())
    assert num_parameters(config) == parameters
    idle = config.n_routed_experts - config.num_experts_per_tok
    further = sum(p.numel() for p in model.model.mtp.parameters()) if config.num_nextn_predict_layers else 0
    layers = sum(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
    experts = [list(e.experts.parameters()) for e in model.moe_layers()[:layers]]
    unused = idle * sum(stacked[0].numel() for layer in experts for stacked in layer)
    assert num_parameters(config, active=True) == parameters - unused - further


# Torch counts 0 for fused CPU attention and grouped products: math attention, and experts in a loop.
@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - {"wide_values", "pause", "memory"}))
@pytest.mark.parametrize("steps", [1, 4])
def test_flops_equal_torchs_counter_to_one_percent(build, variant, steps):
    model, (B, T) = build(variant, execution={"experts": "loop", "attention": "sdpa"}), (2, 48)
    tokens = torch.ones(B, T, dtype=torch.long)
    # Full T x T attention by products that the counter sees; a mask keeps SDPA from cutting it in half.
    mask = torch.ones(B, T)
    mask[0, 0] = 0
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, attention_mask=mask, num_steps=steps, logits_to_keep=0)
    c, expected = model.config, counter.get_total_flops()
    layers = sum(c.runs_of_layer(i, steps) for i in range(c.num_hidden_layers))
    assert abs(flops_per_token(c, T, steps) * B * T / (expected - _padding(c, B, T) * layers) - 1) < 0.01


@pytest.mark.parametrize("variant", ["deepseek", "multi_token", "plain", "loop"])
def test_training_flops_equal_torchs_counter_to_one_percent(build, variant):
    model, (B, T) = (
        build(variant, execution={"experts": "loop", "attention": "sdpa"}, vocab_size=2048),
        (2, 48),
    )
    tokens = torch.ones(B, T, dtype=torch.long)
    mask = torch.ones(B, T)
    mask[0, 0] = 0
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, attention_mask=mask, targets=tokens).loss.backward()
    c, expected = model.config, counter.get_total_flops()
    layers = sum(c.runs_of_layer(i, c.recurrence.num_steps) for i in range(c.num_hidden_layers))
    layers += c.num_nextn_predict_layers
    counted = expected - 3 * _padding(c, B, T) * layers
    # An ignored target costs nothing: module k of multi-token prediction has none at the last k positions.
    ignored = B * sum(range(1, c.num_nextn_predict_layers + 1))
    counted += 3 * 2 * c.vocab_size * c.hidden_size * ignored
    assert abs(training_flops_per_token(c, T) * B * T / counted - 1) < 0.01


def _padding(c: ModelConfig, B: int, T: int) -> int:
    """FLOPs of the zero columns that pad MLA's values, which the formula rightly leaves out."""
    spare = max(c.qk_head_dim - c.v_head_dim, 0) if c.use_mla else 0
    return 2 * T * c.num_attention_heads * spare * B * T


def test_round_trip_and_presets():
    config = ModelConfig.from_dict({**SMALL, "recurrence": BLOCK})
    assert ModelConfig.from_dict(config.to_dict()) == config
    for name in PRESETS:
        preset = ModelConfig.from_dict({"preset": name, "hidden_size": 96, "recurrence": {"num_steps": 7}})
        assert preset.hidden_size == 96
        assert preset.recurrence.num_steps == 7
        assert preset.kv_lora_rank == PRESETS[name]["kv_lora_rank"]
        assert ModelConfig.from_dict(preset.to_dict()) == preset


def test_a_preset_gives_key_value_heads_to_plain_attention_alone():
    assert ModelConfig.from_dict({"preset": "large"}).num_key_value_heads is None
    plain = ModelConfig.from_dict({"preset": "large", "use_mla": False})
    assert plain.kv_heads == 6
    assert plain.num_attention_heads == 12
    assert (
        ModelConfig.from_dict({"preset": "large", "use_mla": False, "num_key_value_heads": 4}).kv_heads == 4
    )
    assert ModelConfig.from_dict(plain.to_dict()) == plain


def test_configs_stored_by_older_versions_are_read():
    """They could hold keys that latent attention ignored, and lack newer ones."""
    new = ModelConfig.from_dict({"preset": "large"})
    older = {**new.to_dict(), "num_key_value_heads": 6, "head_dim": 128}
    del older["rope_pairs"], older["qkv_bias"]
    assert ModelConfig.from_stored(older) == new
    with pytest.raises(ValueError, match="num_key_value_heads=6 is for plain attention"):
        ModelConfig.from_dict(older)
    plain = ModelConfig.from_dict({**PLAIN, "num_key_value_heads": 2, "head_dim": 6})
    assert ModelConfig.from_stored(plain.to_dict()) == plain


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        ({}, []),
        ({"preset": "large"}, []),
        ({"preset": "nano", "use_mla": False, "use_moe": False, "recurrence": {"placement": "none"}}, []),
        (
            {"use_mla": False, "kv_lora_rank": 24, "q_lora_rank": 8},
            ["model.q_lora_rank=8, kv_lora_rank=24: not used with use_mla=false"],
        ),
        ({"use_moe": False, "n_group": 2}, ["model.n_group=2: not used with use_moe=false"]),
        (
            {"first_k_dense_replace": 4, "router_z_loss_weight": 0.1},
            ["model.first_k_dense_replace=4, router_z_loss_weight=0.1: not used with dense layers alone"],
        ),
        (
            {"first_k_dense_replace": 0, "intermediate_size": 96},
            ["model.intermediate_size=96: not used with experts in every layer"],
        ),
        ({"mtp_loss_weight": 0.1}, ["model.mtp_loss_weight=0.1: not used with num_nextn_predict_layers=0"]),
        (
            {"recurrence": {"num_steps": 4, "halting": {"threshold": 0.5}}},
            [
                "model.recurrence.num_steps=4, recurrence.halting.threshold=0.5: not used with "
                "recurrence.placement=none"
            ],
        ),
        (
            {"recurrence": {**BLOCK, "ema_decay": 0.5, "halting": {"threshold": 0.5, "measure": "kl"}}},
            [
                "model.recurrence.ema_decay=0.5: not used with cache=per_step",
                "model.recurrence.halting.measure=kl, recurrence.halting.threshold=0.5: not used with "
                "halting.kind=fixed",
            ],
        ),
        (
            {"recurrence": {**BLOCK, "halting": {"kind": "act", "mixture": 0.1, "ponder_prior": 0.3}}},
            [
                "model.recurrence.halting.mixture=0.1: not used with halting.granularity=token",
                "model.recurrence.halting.ponder_prior=0.3: not used with halting.kind=act",
            ],
        ),
    ],
)
def test_keys_that_do_nothing_are_named(given, lines):
    assert unused_keys(ModelConfig.from_dict(given)) == lines


PLAIN = {"use_mla": False, "use_moe": False}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hiden_size": 8}, "model.hiden_size is not a known key; did you mean 'hidden_size'"),
        ({"recurrence": {"num_step": 2}}, "did you mean 'num_steps'"),
        ({"preset": "huge"}, "model.preset='huge' is unknown; choose one of base, large, nano, small"),
        ({"hidden_size": 0}, "model.hidden_size=0 must be at least 1"),
        ({"qk_rope_head_dim": 3}, "must be even"),
        ({"use_mla": False, "head_dim": 5}, "model.head_dim=5 must be even"),
        ({"use_mla": False, "num_key_value_heads": 3}, "num_attention_heads=4 is not divisible by num_key_v"),
        (
            {"num_key_value_heads": 2},
            "num_key_value_heads=2 is for plain attention and does nothing with use_",
        ),
        (
            {"head_dim": 16},
            "head_dim=16 is for plain attention and does nothing with use_mla=true; leave it",
        ),
        ({"hidden_act": "gelu", "use_mla": False}, "hidden_act=gelu needs .*; set model.use_moe=false too"),
        ({"hidden_act": "tanh"}, "hidden_act='tanh' is unknown; choose one of silu, relu2, gelu"),
        ({"norm": "layer"}, "norm='layer' is unknown; choose one of rms_norm, layer_norm"),
        (
            {"hidden_act": "gelu", "use_moe": False},
            "hidden_act=gelu needs the plain form; set model.use_mla=false",
        ),
        ({"qkv_bias": True, "q_lora_rank": 8}, "qkv_bias=true does not go with q_lora_rank=8"),
        ({**PLAIN, "latent_norm": False}, "latent_norm=false does not go with use_mla=false"),
        ({"rope_pairs": [0]}, r"rope_pairs=\[0\] and rope_pairs_dim=None belong together"),
        (
            {"rope_pairs": [0, 4], "rope_pairs_dim": 8, "qk_rope_head_dim": 4},
            "each below rope_pairs_dim / 2 with rope_pairs_dim=8",
        ),
        ({**PLAIN, "use_bias": True}, "use_bias=true does not go with hidden_act=silu"),
        (
            {**PLAIN, "norm": "layer_norm", "rms_norm_affine": False},
            "norm=layer_norm does not go with rms_norm_aff",
        ),
        (
            {**PLAIN, "position_embedding": "learned", "num_pause_tokens": 1},
            "position_embedding=learned does not go with num_pause_tokens=1",
        ),
        (
            {**PLAIN, "position_embedding": "learned", "rope_scaling": {"factor": 2.0}},
            "position_embedding=learned does not go with rope_scaling=YarnConfig",
        ),
        (
            {**PLAIN, "rope_scaling": {"rope_type": "llama3", "low_freq_factor": 4.0}},
            "low_freq_factor=4.0 and high_freq_factor=4.0; the first must be below the second",
        ),
        (
            {"rope_scaling": {"factr": 2}},
            "model.rope_scaling.factr is not a known key; did you mean 'factor'",
        ),
        ({"rope_scaling": {"factor": 0.5}}, "model.rope_scaling.factor=0.5 must be at least 1"),
        ({"n_shared_experts": -1}, "n_shared_experts=-1 must be at least 0"),
        ({"n_group": 3}, "n_routed_experts=8 is not divisible by n_group=3"),
        (
            {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3},
            "exceeds the 2 experts of the kept groups",
        ),
        ({"topk_group": 2}, r"topk_group=2 must lie in 1..n_group=1"),
        ({"n_group": 8, "topk_group": 4}, "fewer than 2 experts per group"),
        (
            {"recurrence": {"placement": "blok"}},
            "placement='blok' is unknown; choose one of none, kv, post_attention, block",
        ),
        ({"recurrence": {"num_steps": 99}}, "num_steps=99 must lie in 1..max_steps=32"),
        ({"recurrence": {**BLOCK, "ranges": [[1, 5]]}}, "ranges="),
    ],
)
def test_impossible_values_are_refused_in_one_line(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        ModelConfig.from_dict(values)
    assert "\n" not in str(caught.value)


def test_initial_weights_depend_on_seed_and_name_alone(build):
    one, two, other = (build(seed=seed).state_dict() for seed in (0, 0, 1))
    for name in one:
        assert torch.equal(one[name], two[name]), name
        assert "norm" in name or not torch.equal(one[name], other[name]), name
    rows = build().model.layers[1].mlp.experts.w1
    assert not torch.equal(rows[0], rows[1])
    wide = ZeroModel(ModelConfig.from_dict({**SMALL, "n_routed_experts": 8}))
    assert torch.equal(wide.model.layers[1].mlp.experts.w1[:4], rows)
