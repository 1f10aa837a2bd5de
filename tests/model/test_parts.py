"""Attention and the Latent Reasoning Unit by themselves, without a model around them."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from model import LatentReasoningUnit, ModelConfig, MultiHeadLatentAttention
from model.attention import GroupedQueryAttention
from model.initialization import initialize

from .conftest import SMALL

GUIDE = Path(__file__).parents[2] / "docs/MODEL.md"


def config_of(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict({**SMALL, **changes})


def states(width: int = 24) -> torch.Tensor:
    return torch.randn(2, 9, width, generator=torch.Generator().manual_seed(1))


def test_the_guides_lines_run():
    section = GUIDE.read_text().split("## Parts from Python")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)
    trace = names["trace"]
    assert names["attended"].shape == (2, 10, 256)
    assert names["latent"].shape == (2, 10, 64)
    assert trace.halt_probs.shape == (2, 10, 8)
    assert trace.ponder_cost.shape == trace.num_iterations.shape == (2, 10)
    torch.testing.assert_close(trace.halt_probs.sum(-1), torch.ones(2, 10))


@pytest.mark.parametrize("form", [{}, {"qk_norm": True}, {"use_mla": False}, {"num_pause_tokens": 2}])
@torch.no_grad()
def test_attention_by_itself_is_the_models(build, form):
    model, x = build(**form), states()
    layer = model.model.layers[0].self_attn
    tokens = torch.zeros(2, 9 // model.config.positions_per_token, dtype=torch.long)
    torch.testing.assert_close(layer(x).out, layer(x, model.attention_context(tokens)).out, rtol=0, atol=1e-6)
    alone = (MultiHeadLatentAttention if model.config.use_mla else GroupedQueryAttention)(model.config)
    alone.load_state_dict(layer.state_dict())
    later = x.clone()
    later[:, 5] += 1.0
    assert torch.equal(alone(x).out, layer(x).out)
    torch.testing.assert_close(alone(later).out[:, :5], alone(x).out[:, :5], rtol=0, atol=1e-6)


def test_attention_by_itself_runs_its_unit():
    loop = {"placement": "kv", "num_steps": 3, "position_mixing": 3, "halting": {"kind": "ponder"}}
    out = MultiHeadLatentAttention(config_of(recurrence=loop))(states())
    assert out.trace is not None
    assert out.trace.halt_probs.shape == (2, 9, 3)
    assert out.out.isfinite().all()


@torch.no_grad()
def test_a_unit_by_itself_is_the_loop_that_its_definition_says():
    loop = {"placement": "block", "num_steps": 4, "injection": "add", "update": "gated"}
    unit, core, x = LatentReasoningUnit(config_of(recurrence=loop), 6), torch.nn.Linear(6, 6), states(6)
    expected = x
    for _ in range(4):
        candidate = core(torch.nn.functional.rms_norm(expected, (6,), eps=1e-6) + x)
        gate = unit.gate(torch.cat((expected, candidate), -1)).sigmoid()
        expected = expected + gate * (candidate - expected)
    found = unit.refine(x, core)
    torch.testing.assert_close(found.states[-1], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.out, torch.nn.functional.rms_norm(expected, (6,), eps=1e-6))
    assert (found.trace.num_iterations == 4).all()


def test_a_unit_by_itself_halts_and_cuts_gradients_as_its_config_says():
    torch.manual_seed(0)
    loop = {"placement": "block", "num_steps": 4, "halting": {"kind": "act", "threshold": 0.2}}
    unit, core, x = (
        LatentReasoningUnit(config_of(recurrence=loop), 6).eval(),
        torch.nn.Linear(6, 6),
        states(6),
    )
    trace = unit.refine(x, core).trace
    assert len(trace.num_iterations.unique()) > 1
    torch.testing.assert_close(trace.halt_probs.sum(-1), torch.ones(2, 9))
    loop = {
        "placement": "block",
        "num_steps": 4,
        "backprop_steps": 1,
        "injection": "none",
        "update": "simple",
    }
    unit, x = LatentReasoningUnit(config_of(recurrence=loop), 6).train(), x.requires_grad_()
    unit.refine(x, core).out.square().sum().backward()
    assert x.grad is None
    assert core.weight.grad is not None


def test_initial_weights_of_parts_are_those_their_roles_need():
    """No parameter is left uninitialised, and the ones that must start at a value do."""
    loop = {"placement": "kv", "num_steps": 2, "position_mixing": 3, "update": "gated"}
    config = config_of(recurrence=loop, qkv_bias=True)
    twins = []
    for _ in range(2):
        torch.manual_seed(3)
        twins.append(MultiHeadLatentAttention(config).state_dict())
    assert all(torch.equal(twins[0][name], twins[1][name]) for name in twins[0])
    assert not twins[0]["k_latent_proj.weight"].any()
    assert not twins[0]["q_proj.bias"].any()
    assert not twins[0]["reasoning.mixing.weight"].any()
    assert (twins[0]["reasoning.unit.gate.bias"] == 2.0).all()
    assert 0.05 < twins[0]["q_proj.weight"].std() < 0.5
    one, two = MultiHeadLatentAttention(config), MultiHeadLatentAttention(config)
    for layer in (one, two):
        initialize(layer, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
