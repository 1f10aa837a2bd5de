"""The Latent Reasoning Unit: unrolled by hand, and its depth sampler."""

import re

import pytest
import torch
import torch.nn.functional as F

from model import ModelConfig
from model.context import AttentionContext
from model.recurrence import sample_depth

from .conftest import BLOCK, SMALL


@pytest.mark.parametrize("variant", ["loop", "loop_concat_simple"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_loop_equals_its_unrolling(build, tokens, variant, steps):
    model = build(variant)
    net, lru = model.model, model.model.recurrence[0]
    context = model.attention_context(tokens)
    prelude = net.layers[0](net.embed_tokens(tokens), context).hidden
    state = prelude
    for _ in range(steps):
        normed = lru.state_norm(state)
        if variant == "loop":
            candidate = net.layers[1](normed + prelude, context).hidden
            z = torch.sigmoid(lru.gate(torch.cat((state, candidate), -1)))
            state = (1 - z) * state + z * candidate
        else:
            state = net.layers[1](lru.injection(torch.cat((normed, prelude), -1)), context).hidden
    out = net.layers[2](lru.output_norm(state), context).hidden
    expected = model.lm_head(net.norm(out))
    torch.testing.assert_close(model(tokens, num_steps=steps).logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_loop_without_norm_injection_or_gate_is_a_stack_of_tied_layers(build, tokens, steps):
    loop = build("loop_tied")
    layers = len(loop.model.layers)
    stack = build("latent_dense", num_hidden_layers=layers * steps)
    weights = loop.state_dict()
    layer = re.compile(r"(?<=layers\.)\d+")
    tied = {name: weights[layer.sub(lambda i: str(int(i[0]) % layers), name)] for name in stack.state_dict()}
    stack.load_state_dict(tied)
    expected = stack(tokens).logits
    torch.testing.assert_close(loop(tokens, num_steps=steps).logits, expected, rtol=1e-4, atol=1e-5)


def test_depth_changes_the_answer_and_every_step_gets_a_gradient(build, tokens):
    model = build("loop")
    assert (model(tokens, num_steps=1).logits - model(tokens, num_steps=2).logits).abs().max() > 1e-3
    model(tokens, targets=tokens, num_steps=4).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    with pytest.raises(ValueError, match="num_steps=0 must be at least 1"):
        model(tokens, num_steps=0)


def test_sampled_depth_is_a_function_of_seed_and_step():
    config = ModelConfig.from_dict(
        {**SMALL, "recurrence": {**BLOCK, "num_steps": 8, "max_steps": 20, "depth_sampling": "poisson"}}
    )
    depths = [sample_depth(config, 0, step) for step in range(3000)]
    assert depths == [sample_depth(config, 0, step) for step in range(3000)]
    assert depths != [sample_depth(config, 1, step) for step in range(3000)]
    assert min(depths) >= 1
    assert max(depths) == 20  # clamped
    # E[R] = r + 1 with r = num_steps - 1, since E[exp(N(log r - s^2/2, s))] = r; the clamp lowers it a bit.
    assert abs(sum(depths) / len(depths) - 8) < 0.5
    fixed = ModelConfig.from_dict({**SMALL, "recurrence": BLOCK})
    assert {sample_depth(fixed, 0, step) for step in range(9)} == {3}


def test_loops_can_start_from_noise_and_only_block_loops_do(build, tokens):
    model = build("loop")
    one, again, other = (model(tokens, noise_seed=seed).logits for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)
    with pytest.raises(ValueError, match="noise_seed=1 is for placement=block"):
        build("deepseek")(tokens, noise_seed=1)


def test_mixing_embeddings_is_a_causal_convolution(build, tokens):
    network = build("embedding_mixing").model
    x, kernel = network.embed_tokens(tokens).transpose(1, 2), network.embedding_mixing.weight.T.flip(1)
    mixed = F.conv1d(F.pad(x, (3, 0)), kernel[:, None], groups=len(kernel))
    context = AttentionContext()
    torch.testing.assert_close(network.embed(tokens, context), (x + mixed).transpose(1, 2))
