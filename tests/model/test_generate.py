"""Sampling against the distribution it claims to draw from."""

import math
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.generate import truncated


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    vocabulary=st.integers(1, 30),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.none() | st.floats(0.01, 1.0),
)
def test_truncation_keeps_the_tokens_that_a_loop_over_them_keeps(seed, vocabulary, top_k, top_p):
    logits = 3 * torch.randn(2, vocabulary, generator=torch.Generator().manual_seed(seed))
    kept, limit = truncated(logits, top_k, top_p).isfinite(), math.inf if top_p is None else top_p
    for row, row_kept in zip(logits, kept, strict=True):
        ranked = sorted(range(vocabulary), key=lambda i: -float(row[i]))[:top_k]
        shares = torch.softmax(row[ranked], 0).tolist()
        before = dict(zip(ranked, accumulate(shares, initial=0.0), strict=False))  # of the more likely ones
        allowed = {token for token in ranked if before[token] < limit}
        found = {i for i in range(vocabulary) if row_kept[i]}
        assert found <= set(ranked)
        # Exactly at the edge of top_p rounding decides; everything else must agree.
        assert all(abs(before[token] - limit) < 1e-5 for token in found ^ allowed)
        assert ranked[0] in found


def test_samples_follow_the_models_distribution(build):
    model, prompt = build(vocab_size=8), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = torch.softmax(model(prompt).logits[0, -1] / 0.7, 0)
    drawn = model.generate(prompt.expand(4000, -1), 1, temperature=0.7, seed=1)[:, -1]
    frequency = drawn.bincount(minlength=8) / 4000
    assert (frequency - expected).abs().max() < 4 * 0.5 / 4000**0.5
    top = model.generate(prompt.expand(400, -1), 1, temperature=0.7, top_k=2, seed=1)[:, -1]
    assert set(top.tolist()) == set(expected.topk(2).indices.tolist())


def test_the_seed_decides_and_narrow_choices_are_greedy(build, tokens):
    model = build()
    greedy = model.generate(tokens, 12)
    assert torch.equal(model.generate(tokens, 12, temperature=1.0, top_k=1), greedy)
    assert torch.equal(model.generate(tokens, 12, temperature=1.0, top_p=1e-9), greedy)
    one, two, other = (model.generate(tokens, 12, temperature=1.0, seed=s) for s in (3, 3, 4))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must not be negative"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0 must be at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0 must lie in 0 < top_p <= 1"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
    ],
)
def test_impossible_options_are_refused(build, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        build().generate(tokens, **{"max_new_tokens": 4, **options})


def test_an_empty_prompt_is_refused(build):
    with pytest.raises(ValueError, match="the prompt needs at least 1 token"):
        build().generate(torch.zeros(2, 0, dtype=torch.long), 4)
