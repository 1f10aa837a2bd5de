"""The latent cache: exact, and as small as promised."""

import pytest
import torch

from model.cache import LatentCache
from model.counts import cached_numbers

from .conftest import VARIANTS

TOLERANCE = {"rtol": 0, "atol": 2e-5}


@pytest.mark.parametrize("chunks", [[1] * 17, [17], [5, 1, 11], [16, 1]])
def test_decoding_in_chunks_equals_one_forward_pass(build, variant, tokens, chunks):
    model, cache = build(variant), LatentCache()
    parts = [model(part, cache=cache).logits for part in tokens.split(chunks, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens).logits, **TOLERANCE)


@pytest.mark.parametrize("cache_kind", [{}, {"cache": "parallel", "virtual_layers": 2}, {"cache": "last"}])
def test_the_cache_holds_as_many_numbers_as_counted(build, variant, tokens, cache_kind):
    recurrence = VARIANTS[variant].get("recurrence", {})
    if variant == "memory" or (cache_kind and recurrence.get("placement") != "block"):
        return  # a recurrent memory keeps no tokens; the kinds of cache are for loops
    model, cache = build(variant, recurrence={**recurrence, **cache_kind}), LatentCache()
    model(tokens, cache=cache)
    mixed = model.config.hidden_size if model.config.embedding_mixing else 0
    assert cache.numel() == tokens.numel() * (cached_numbers(model.config) + mixed)


def test_the_cache_holds_latent_plus_rope_numbers_per_token_and_slot(build):
    for variant, slots in (("deepseek", 3), ("loop", 1 + 3 + 1)):
        assert cached_numbers(build(variant).config) == slots * (10 + 4)


def test_generation_equals_recomputing_everything(build, variant, tokens):
    model, expected = build(variant), tokens
    for _ in range(8):
        expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(model.generate(tokens, max_new_tokens=8), expected)


def test_left_padded_rows_generate_what_they_generate_alone(build, variant):
    model, lengths = build(variant), [3, 8, 1]
    prompts = [torch.randint(1, 61, (1, n), generator=torch.Generator().manual_seed(n)) for n in lengths]
    batch = torch.cat([torch.nn.functional.pad(p, (8 - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (8 - p.shape[1], 0)) for p in prompts])
    together = model.generate(batch, max_new_tokens=6, attention_mask=mask)
    for prompt, row in zip(prompts, together, strict=True):
        assert torch.equal(model.generate(prompt, max_new_tokens=6)[0, -6:], row[-6:])


def test_rows_end_at_eos_or_the_stop_callback(build, tokens):
    model = build()
    free = model.generate(tokens, max_new_tokens=10)
    eos = int(free[0, 17 + 2])
    stopped = model.generate(tokens, max_new_tokens=10, eos_token_id=eos)
    row = stopped[0, 17:].tolist()
    end = row.index(eos)
    assert end <= 2
    assert set(row[end + 1 :]) <= {0}
    assert model.generate(tokens, 10, stopping=lambda new: torch.full((3,), new.shape[1] >= 4)).shape == (
        3,
        21,
    )


def test_more_loop_steps_than_cached_are_refused(build, tokens):
    model, cache = build("loop"), LatentCache()
    model(tokens, cache=cache, num_steps=1)
    with pytest.raises(ValueError, match="must not grow while a cache is in use"):
        model(tokens[:, :1], cache=cache, num_steps=2)


def test_too_long_input_is_refused(build, tokens):
    with pytest.raises(ValueError, match="exceed max_position_embeddings=64"):
        build()(tokens.repeat(1, 4))
    with pytest.raises(ValueError, match="max_new_tokens=48 exceed max_position_embeddings=64"):
        build().generate(tokens, max_new_tokens=48)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        build()(tokens, attention_mask=torch.ones(3, 4))
