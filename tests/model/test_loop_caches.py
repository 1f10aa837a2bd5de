"""Caches of looped layers: what they hold, and what decoding computes with an approximate one."""

import dataclasses

import pytest
import torch

from model import ModelConfig, ZeroModel
from model.backends.attention import attend
from model.cache import LatentCache, kept_keys, slot_of
from model.layers import rotate

from .conftest import SMALL

LOOP = {"placement": "block", "ranges": [[1, 1]], "num_steps": 4, "update": "simple"}
TOLERANCE = {"rtol": 0, "atol": 3e-5}
APPROXIMATE = [
    {"cache": "last"},
    {"cache": "average"},
    {"cache": "ema", "ema_decay": 0.6},
    {"virtual_layers": 2},
    {"cache": "parallel", "virtual_layers": 2},
]


def make(qk_norm: bool = False, **options) -> ZeroModel:
    sizes = {**SMALL, "use_moe": False, "qk_norm": qk_norm}
    return ZeroModel(ModelConfig.from_dict({**sizes, "recurrence": {**LOOP, **options}})).eval()


def literal_decode(model: ZeroModel, cache: LatentCache, token: torch.Tensor) -> torch.Tensor:
    """Logits (V,) of one more token (1,): each step attends to what the cache keeps of earlier tokens."""
    net, lru, c = model.model, model.model.recurrence[0], model.config
    context = model.attention_context(token[None], cache=cache)

    def layer(number: int, x: torch.Tensor, step: int, kept):
        block, attention = net.layers[number], net.layers[number].self_attn
        normed = block.input_layernorm(x)
        plain = dataclasses.replace(context, cache=None, mask=None)  # a single token sees the whole cache
        query = attention.q_proj(normed).unflatten(-1, (c.num_attention_heads, -1))
        latent, k_rope, _ = attention._latent(normed, query.flatten(2), plain)
        query = attention.q_norm(query) if c.qk_norm else query
        q_nope, q_rope = query.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        extra = []
        if c.qk_norm:
            q_nope, k_rope, *extra = attention.k_norm(q_nope, attention._up(latent)[0], k_rope)
        new = torch.cat((latent, rotate(k_rope, context.rotation), *extra), -1)
        slots = (new,) if number != 1 else kept_keys(c.recurrence, kept, new, step, None)
        first = 0 if number != 1 or len(slots) > 1 else slot_of(c.recurrence, step)
        parts = [
            torch.cat((cache._slots[number, first + i][:, : cache.length], s), 1) for i, s in enumerate(slots)
        ]
        held = torch.cat(parts, 1)
        q = torch.cat((q_nope, rotate(q_rope, context.rotation)), -1)
        attended = attend(q, *attention.keys_and_values(held), plain, attention.scale)
        x = x + attention.o_proj(attended.flatten(2))
        return x + block.mlp(block.post_attention_layernorm(x)), slots

    prelude, _ = layer(0, net.embed_tokens(token[None]), 0, None)
    state, kept = prelude, None
    for step in range(4):
        state, kept = layer(1, lru.state_norm(state) + prelude, step, kept)
    out, _ = layer(2, lru.output_norm(state), 0, None)
    return model.lm_head(net.norm(out))[0, 0]


def decoded_and_full(tokens: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the tenth token, decoded (which must equal the literal decoding) and from a full pass."""
    model, cache = make(**options), LatentCache()
    with torch.no_grad():
        model(tokens[:1, :9], cache=cache)
        expected = literal_decode(model, cache, tokens[0, 9:10])
        found = model(tokens[:1, 9:10], cache=cache).logits[0, 0]
        torch.testing.assert_close(found, expected, **TOLERANCE)
        return found, model(tokens[:1, :10]).logits[0, 9]


@pytest.mark.parametrize("options", [*APPROXIMATE, {"cache": "ema", "qk_norm": True}], ids=str)
def test_an_approximate_cache_shows_later_tokens_what_the_last_step_left(tokens, options):
    found, full = decoded_and_full(tokens, **options)
    assert (found - full).abs().max() > 1e-3, "an approximation that changes nothing would be exact"


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("options", [{}, {"cache": "parallel"}, {"cache": "first"}], ids=str)
def test_an_exact_cache_equals_a_full_pass(tokens, options, qk_norm):
    found, full = decoded_and_full(tokens, qk_norm=qk_norm, **options)
    torch.testing.assert_close(found, full, **TOLERANCE)


@pytest.mark.parametrize(
    ("options", "slots"),
    [
        ({}, 4),
        ({"cache": "parallel"}, 4),
        ({"virtual_layers": 2}, 2),
        ({"cache": "ema"}, 1),
        ({"cache": "first"}, 1),
    ],
)
def test_the_cache_of_a_loop_holds_as_many_numbers_as_said(tokens, options, slots):
    cache = LatentCache()
    make(**options)(tokens, cache=cache)
    assert cache.numel() == tokens.numel() * (1 + slots + 1) * (10 + 4)


def test_refined_latents_need_one_cache_for_any_depth(tokens):
    config = ModelConfig.from_dict({**SMALL, "recurrence": {"placement": "kv", "num_steps": 5}})
    cache = LatentCache()
    ZeroModel(config).eval()(tokens, cache=cache)
    assert cache.numel() == tokens.numel() * 3 * (10 + 4)


@pytest.mark.parametrize("options", [*APPROXIMATE, {}, {"cache": "parallel"}, {"cache": "first"}], ids=str)
def test_generation_works_with_every_cache(tokens, options):
    model = make(**options)
    ids = model.generate(tokens, max_new_tokens=5)
    assert ids.shape == (3, 22)
    again = torch.cat([model.generate(row[None], max_new_tokens=5) for row in tokens])
    assert torch.equal(ids, again)
