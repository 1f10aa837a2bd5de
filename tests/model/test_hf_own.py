"""The class that exported folders bring along computes and generates what our model does."""

from collections.abc import Collection, Sequence
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from model import ModelConfig, ZeroModel
from model.config.recurrence import HaltingConfig
from model.latent_cot.thoughts import generate_with_thoughts

from .conftest import SMALL, VARIANTS
from .loops import COVERING, EVERY
from .own_classes import assert_close, left_mask, wrapped
from .thoughts import BOT, EOT, FEEDBACKS, make, questions

LONG = {"max_position_embeddings": 128}
# Each kind of cache and placement, and what is not a loop but changes positions or the cache.
GENERATING = (
    "kv-act-token-per_step",
    "post_attention-entropy-mixed-per_step",
    "block-fixed-token-parallel",
    "block-ponder-sequence-ema",
    "block-threshold-kl-token-last",
    "block-act-loss-mixed-first",
    "deepseek",
    "gpt2",
    "llama",
    "converted",
    "pause",
    "memory",
    "multi_token",
    "embedding_mixing",
    "loop_retrofit",
)
CACHED = ("block-fixed-token-parallel", "kv-act-token-per_step", "pause", "memory")


def some_slow(names: Sequence[str], quick: Collection[str]) -> list[Any]:
    """Parameters, of which all but `quick` are slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


EACH = some_slow([*COVERING, *VARIANTS], [*COVERING[::6], "gpt2", "converted", "pause", "memory"])


def named(name: str, **changes: object) -> ZeroModel:
    """A model by the name of a variant or of a loop."""
    values = VARIANTS[name] if name in VARIANTS else {"recurrence": EVERY[name]}
    return ZeroModel(ModelConfig.from_dict({**SMALL, **values, **changes}), seed=2).eval()


@pytest.mark.parametrize("name", EACH)
@torch.no_grad()
def test_logits_are_those_of_our_model(name, tokens):
    ours = named(name)
    theirs, mask = wrapped(ours), left_mask(tokens)
    for options in ({}, {"num_steps": 2}) if ours.config.recurrence.placement != "none" else ({},):
        assert_close(theirs(tokens, **options).logits, ours(tokens, **options).logits)
        padded = ours(tokens, attention_mask=mask, **options).logits
        assert_close(theirs(tokens, attention_mask=mask, **options).logits[mask > 0], padded[mask > 0])


@pytest.mark.parametrize("name", EACH)
@torch.no_grad()
def test_reading_over_a_cache_equals_one_pass(name, tokens):
    """For caches that merge loop steps, which are approximations, it equals our own reading."""
    ours = named(name)
    theirs, mask = wrapped(ours), left_mask(tokens)
    whole = theirs(tokens, attention_mask=mask, use_cache=False).logits
    cache, parts = DynamicCache(), []
    for start, end in ((0, 9), (9, 10), (10, 17)):
        out = theirs(tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        assert out.past_key_values is cache
        assert cache.get_seq_length() == end
        parts.append(out.logits)
    together, real = torch.cat(parts, 1), mask > 0
    if ours.config.decodes_exactly(ours.config.recurrence.num_steps) or ours.config.num_memory_tokens:
        assert_close(together[real], whole[real])
    else:
        assert together[real].isfinite().all()


@pytest.mark.parametrize("name", some_slow(GENERATING, ("block-act-loss-mixed-first",)))
def test_greedy_text_is_that_of_our_model(name, tokens):
    ours, mask = named(name, **LONG), left_mask(tokens)
    theirs = wrapped(ours, eos_token_id=7, pad_token_id=0)
    expected = ours.generate(tokens, 64, attention_mask=mask, eos_token_id=7)
    found = theirs.generate(tokens, attention_mask=mask, max_new_tokens=64, do_sample=False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True, "top_k": 9}], ids=["beams", "sample"]
)
@pytest.mark.parametrize("name", some_slow(CACHED, ["memory"]))
def test_the_cache_does_not_change_what_is_generated(name, options, tokens):
    theirs, mask = wrapped(named(name)), left_mask(tokens)
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        texts.append(
            theirs.generate(
                tokens, attention_mask=mask, max_new_tokens=12, use_cache=use_cache, pad_token_id=0, **options
            )
        )
    assert torch.equal(*texts)


def test_rows_of_a_cache_are_repeated_chosen_and_taken_back(tokens):
    theirs = wrapped(named("loop"))
    with torch.no_grad():
        cache = theirs(tokens).past_key_values
        cache.crop(-7)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([5, 0]))
        assert (cache.batch_size, cache.get_seq_length(), cache.is_croppable) == (2, 10, True)
        again = theirs(tokens[[2, 0], 10:], past_key_values=cache).logits
        assert_close(again, theirs(tokens[[2, 0]]).logits[:, 10:])
        cache.reset()
        assert_close(theirs(tokens, past_key_values=cache).logits, theirs(tokens).logits)


@pytest.mark.parametrize(("measure", "threshold"), [("cosine", 0.9), ("kl", 0.5)])
def test_tokens_exit_early_when_asked(measure, threshold, tokens):
    ours = named("loop", **LONG)
    theirs = wrapped(ours)
    halting = HaltingConfig(kind="threshold", measure=measure or "cosine", threshold=threshold)
    with torch.no_grad():
        options = {"num_steps": 8, "exit_measure": measure, "exit_threshold": threshold}
        found = theirs(tokens, **options)
        expected = ours(tokens, num_steps=8, halting=halting)
    assert_close(found.logits, expected.logits)
    assert torch.equal(found.num_iterations, expected.num_iterations)
    default = HaltingConfig(kind="threshold")
    with torch.no_grad():
        found = theirs(tokens, exit_measure="cosine").logits
        assert_close(found, ours(tokens, halting=default).logits)
    text = theirs.generate(tokens, max_new_tokens=20, do_sample=False, **options)
    assert torch.equal(text, ours.generate(tokens, 20, num_steps=8, halting=halting))


@pytest.mark.parametrize("feedback", some_slow(tuple(FEEDBACKS), ["jacobi"]))
def test_thoughts_come_before_the_answer(feedback):
    ours = make("halting", feedback).eval()
    theirs = wrapped(ours, bot_token_id=BOT, eot_token_id=EOT, eos_token_id=7, pad_token_id=0)
    tokens = questions()
    mask = (torch.arange(7) >= torch.tensor([0, 2, 4])[:, None]).long()
    for options in ({}, {"num_latents": 2}, {"num_steps": 2}):
        thinking = {name: n for name, n in options.items() if name == "num_latents"}
        steps = options.get("num_steps")
        answer, _ = generate_with_thoughts(
            ours, tokens, EOT, 9, mask, thinking, eos_token_id=7, num_steps=steps
        )
        found = theirs.generate(tokens, attention_mask=mask, max_new_tokens=9, do_sample=False, **options)
        assert torch.equal(found[:, : tokens.shape[1]], tokens)
        assert (found[:, tokens.shape[1]] == EOT).all()
        assert torch.equal(found[:, tokens.shape[1] + 1 :], answer)
    plain = theirs.generate(tokens, attention_mask=mask, max_new_tokens=9, do_sample=False, num_latents=0)
    assert torch.equal(plain, ours.generate(tokens, 9, attention_mask=mask, eos_token_id=7))
    sampled = theirs.generate(tokens[:1], num_return_sequences=4, do_sample=True, max_new_tokens=3)
    assert len(sampled) == 4


def test_impossible_arguments_are_one_line(tokens):
    loop, plain, memory = (wrapped(named(name)) for name in ("loop", "deepseek", "memory"))
    other = DynamicCache()
    other.update(torch.ones(3, 1, 4, 2), torch.ones(3, 1, 4, 2), 0)
    static = StaticCache(config=loop.config, max_cache_len=20)
    for call, message in (
        (lambda: loop(tokens, num_steps=0), "num_steps=0 must be at least 1"),
        (lambda: loop(tokens, exit_measure="l2"), "measure='l2' is unknown"),
        (lambda: loop(tokens, num_steps=2.5), "num_steps=2.5 is not an integer"),
        (lambda: loop(tokens, exit_threshold=2.0), "exit_threshold=2.0 must lie in -1..1"),
        (
            lambda: loop(tokens, exit_threshold=-1.0, exit_measure="kl"),
            "must lie in 0..inf for exit_measure=kl",
        ),
        (lambda: plain(tokens, exit_threshold=0.9), "exit_threshold=0.9, .*: the model has no loop"),
        (lambda: plain(tokens, num_steps=4), "num_steps=4: the model has no loop"),
        (lambda: loop(tokens, past_key_values=other), "DynamicCache with 4 tokens"),
        (lambda: loop(tokens, past_key_values=static), "StaticLayer with 0 tokens"),
        (lambda: loop(tokens, output_attentions=True), "output_attentions=True"),
        (lambda: loop(tokens, labels=tokens, num_latents=2), "leave out labels"),
        (lambda: loop.generate(tokens, num_latents=2), "eot_token_id"),
        (lambda: loop(tokens, attention_mask=torch.ones(3, 4).tril()), "attention_mask has shape"),
        (lambda: memory(tokens).past_key_values.crop(-1), "cannot forget single tokens"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="at inference only"):
        loop.train()(tokens, exit_threshold=0.9)


@torch.no_grad()
def test_states_tuples_and_kept_positions(tokens):
    ours = named("loop")
    theirs, states = wrapped(ours), []
    out = theirs(tokens, output_hidden_states=True, use_cache=False)
    expected = ours(tokens, states=states)
    assert len(out.hidden_states) == len(states) + 1 == 6
    assert_close(out.hidden_states[-1], expected.hidden)
    logits, *_ = theirs(tokens, return_dict=False)
    assert_close(theirs(tokens, logits_to_keep=2).logits, logits[:, -2:])
    assert_close(theirs(tokens, logits_to_keep=torch.tensor([0, 5])).logits, logits[:, [0, 5]])
    embedded = ours.model.embed_tokens(tokens)
    assert_close(theirs(inputs_embeds=embedded).logits, logits)
