"""Counts of every loop against the built model, and the combinations that are refused."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import ModelConfig, ZeroModel
from model.config.execution import ExecutionConfig
from model.counts import flops_per_token, num_parameters, recomputed_flops_per_token, training_flops_per_token

from .conftest import SMALL
from .loops import EVERY

TWO_RANGES = {"placement": "block", "num_steps": 3, "ranges": [[0, 0], [2, 2]], "sandwich_norm": True}


@pytest.mark.parametrize("name", sorted(EVERY))
def test_parameter_counts_equal_the_built_model(name):
    config = ModelConfig.from_dict({**SMALL, "recurrence": EVERY[name]})
    with torch.device("meta"):
        model = ZeroModel(config)
    assert num_parameters(config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("section", [TWO_RANGES, {**TWO_RANGES, "ranges": None, "injection": "gate"}])
def test_parameter_counts_of_ranges(section):
    config = ModelConfig.from_dict({**SMALL, "recurrence": section})
    with torch.device("meta"):
        assert num_parameters(config) == sum(p.numel() for p in ZeroModel(config).parameters())


FLOPS = {
    "kv": {"placement": "kv", "num_steps": 3, "query_conditioned": True},
    "kv_latent": {"placement": "kv", "num_steps": 3, "k_rope_source": "latent", "injection": "gate"},
    "post_attention": {"placement": "post_attention", "num_steps": 3, "latent_intermediate_size": 50},
    "block": {**TWO_RANGES, "injection": "concat"},
    "loss": {
        "placement": "block",
        "ranges": [[1, 1]],
        "num_steps": 3,
        "halting": {"kind": "ponder", "threshold": 0.999999},
    },
    "truncated": {"placement": "block", "ranges": [[1, 1]], "num_steps": 5, "backprop_steps": 2},
}


@pytest.mark.parametrize("name", sorted(FLOPS))
@pytest.mark.parametrize("training", [False, True])
def test_flops_equal_torchs_counter_to_one_percent(name, training):
    values = {**SMALL, "num_attention_heads": 4, "v_head_dim": 10, "vocab_size": 512}
    config = ModelConfig.from_dict({**values, "use_moe": False, "recurrence": FLOPS[name]})
    model, (B, T) = ZeroModel(config), (2, 48)
    model.execution = dataclasses.replace(model.execution, attention="sdpa")
    tokens, mask = torch.ones(B, T, dtype=torch.long), torch.ones(B, T)
    mask[0, 0] = 0  # a mask keeps SDPA from cutting full T x T attention in half
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if training:
            model.train()(tokens, attention_mask=mask, targets=tokens).loss.backward()
        else:
            model.eval()(tokens, attention_mask=mask)
    if training:
        expected = training_flops_per_token(config, T) * B * T
    else:
        expected = flops_per_token(config, T) * B * T
    assert abs(expected / counter.get_total_flops() - 1) < 0.01


@pytest.mark.parametrize("name", sorted(FLOPS))
@pytest.mark.parametrize("checkpointing", ["block", "iteration", "selective"])
def test_flops_computed_twice_equal_torchs_counter(name, checkpointing):
    values = {**SMALL, "num_attention_heads": 4, "v_head_dim": 10, "vocab_size": 512}
    config = ModelConfig.from_dict({**values, "use_moe": False, "recurrence": FLOPS[name]})
    tokens, mask = torch.ones(2, 48, dtype=torch.long), torch.ones(2, 48)
    mask[0, 0] = 0
    counted = {}
    for policy in ("none", checkpointing):
        model = ZeroModel(config, execution=ExecutionConfig(attention="sdpa", checkpointing=policy)).train()
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(tokens, attention_mask=mask, targets=tokens).loss.backward()
        counted[policy] = counter.get_total_flops() / tokens.numel()
    expected = recomputed_flops_per_token(config, checkpointing, 48)
    if checkpointing != "selective":  # the counter only sees math attention, which selective does not keep
        assert expected == pytest.approx(counted[checkpointing] - counted["none"], rel=0.02)
    assert (expected > 0) == (checkpointing == "block" or checkpointing == "iteration")


@pytest.mark.parametrize(
    "baseline", [{"num_pause_tokens": 2}, {"num_memory_tokens": 3, "segment_length": 10, "use_moe": False}]
)
@pytest.mark.parametrize("training", [False, True])
def test_flops_of_the_baselines_equal_torchs_counter_to_one_percent(baseline, training):
    values = {**SMALL, "num_attention_heads": 4, "v_head_dim": 10, "use_moe": False, **baseline}
    config = ModelConfig.from_dict(values)
    model, (B, T) = ZeroModel(config), (2, 48)
    model.execution = dataclasses.replace(model.execution, attention="sdpa")
    tokens, starts = torch.ones(B, T, dtype=torch.long), torch.tensor([[0, T]] * B, dtype=torch.int32)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if training:
            model.train()(tokens, cu_seqlens=starts, targets=tokens).loss.backward()
        else:
            model.eval()(tokens, cu_seqlens=starts)
    expected = training_flops_per_token(config, T) if training else flops_per_token(config, T)
    assert abs(expected * B * T / counter.get_total_flops() - 1) < 0.01


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_memory_tokens": 2}, "num_memory_tokens=2 and segment_length=None belong together"),
        ({"segment_length": 8}, "num_memory_tokens=0 and segment_length=8 belong together"),
        ({"num_memory_tokens": 2, "segment_length": 0}, "segment_length=0 must be at least 1"),
        ({"num_memory_tokens": 2, "segment_length": 4}, "does not go with use_moe=true"),
        ({"num_pause_tokens": -1}, "num_pause_tokens=-1 must be at least 0"),
        (
            {"num_pause_tokens": 1, "recurrence": {"placement": "kv"}},
            "does not go with recurrence.placement=kv",
        ),
        ({"num_pause_tokens": 1, "embedding_mixing": 4}, "does not go with embedding_mixing=4"),
        ({"num_pause_tokens": 1, "num_nextn_predict_layers": 1}, "does not go with num_nextn"),
    ],
)
def test_baselines_stand_alone(values, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict({**SMALL, **values})


BLOCK = {"placement": "block", "ranges": [[1, 1]], "num_steps": 4}
KV = {"placement": "kv", "num_steps": 4}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"placement": "core"}, "placement='core' is unknown; choose one of none, kv, post_attention, block"),
        ({**BLOCK, "ranges": [[1, 3]]}, r"ranges=\[\[1, 3\]\] must hold pairs .* in 0..2"),
        ({**BLOCK, "ranges": [[0, 1], [1, 2]]}, "rising and apart"),
        ({**BLOCK, "ranges": [[2, 1]]}, "rising and apart"),
        ({**BLOCK, "ranges": []}, "loops no layer"),
        ({**BLOCK, "ranges": [1, 2]}, r"ranges\[0\]=1 is not a list"),
        ({**BLOCK, "ranges": [["0", "1"]]}, r"ranges\[0\]\[0\]='0' is not an integer"),
        ({**BLOCK, "num_steps": 40}, "num_steps=40 must lie in 1..max_steps=32"),
        ({**BLOCK, "virtual_layers": 5}, "virtual_layers=5 must lie in 1..num_steps=4"),
        (
            {**BLOCK, "virtual_layers": 3, "halting": {"kind": "threshold", "min_steps": 2}},
            "virtual_layers=3 must lie in 1..halting.min_steps=2",
        ),
        ({**BLOCK, "virtual_layers": 2, "cache": "ema"}, "cache=ema merges them"),
        ({**BLOCK, "halting": {"kind": "act", "min_steps": 5}}, "min_steps=5 must lie in 1..num_steps=4"),
        ({**BLOCK, "ema_decay": 1.0}, "ema_decay=1.0 must be above 0 and below 1"),
        ({**BLOCK, "position_mixing": 3}, "position_mixing=3 is not for placement=block"),
        ({**BLOCK, "query_conditioned": True}, "query_conditioned=true is not for placement=block"),
        ({**BLOCK, "k_rope_source": "latent"}, "k_rope_source=latent is not for placement=block"),
        ({**KV, "cache": "parallel"}, "cache=parallel is not for placement=kv"),
        ({**KV, "sandwich_norm": True}, "sandwich_norm=true is not for placement=kv"),
        ({**KV, "virtual_layers": 2}, "virtual_layers=2 is not for placement=kv"),
        ({**KV, "halting": {"kind": "threshold", "measure": "kl"}}, "a unit inside attention makes none"),
        ({**KV, "halting": {"kind": "act", "expectation": "loss"}}, "expectation=loss reads the loss out"),
        (
            {**BLOCK, "ranges": [[0, 0], [2, 2]], "halting": {"kind": "act"}},
            "expectation=loss .* a single range",
        ),
        ({**BLOCK, "halting": {"kind": "threshold", "expectation": "state"}}, "kind=threshold has none"),
        ({**BLOCK, "backprop_steps": 2, "halting": {"kind": "act"}}, "cuts the gradient that .*kind=act"),
        ({**BLOCK, "halting": {"kind": "act", "threshold": 1.5}}, "threshold=1.5 must lie between 0 and 1"),
        ({**BLOCK, "halting": {"stability_weight": 0.1}}, "stability_weight=0.1 weighs learned halting"),
        ({**BLOCK, "halting": {"kind": "Act"}}, "halting.kind='Act' is unknown"),
        (
            {**BLOCK, "halting": {"knd": "act"}},
            "model.recurrence.halting.knd is not a known key; did you mean 'kind'",
        ),
        ({"halting": {"kind": "act"}}, "halting.kind=act needs a loop"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(section, message):
    with pytest.raises(ValueError, match=message) as error:
        ModelConfig.from_dict({**SMALL, "recurrence": section})
    assert "\n" not in str(error.value)


def test_the_kv_placement_needs_a_latent():
    with pytest.raises(ValueError, match="placement=kv refines the KV latent"):
        ModelConfig.from_dict({**SMALL, "use_mla": False, "recurrence": KV})
