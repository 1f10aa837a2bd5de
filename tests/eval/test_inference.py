"""Shared contexts, cached prefixes and leaving rows against one request at a time, for every kind of model.

The references know no padding and no sharing: a full pass for log-likelihoods, ZeroModel.generate on one row
for answers.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.tokenization.tokenizer import Tokenizer
from eval.scoring.inference import ADAPTIVE
from eval.scoring.scorer import Scorer, cut_at_stop
from model import ModelConfig, ZeroModel
from model.cache import LatentCache
from model.latent_cot.rkv import CacheLimit

from ..model.conftest import SMALL
from ..model.loops import EVERY, EXACT

LOOP = {"placement": "block", "ranges": [[1, 1]], "num_steps": 4}
MODELS: dict[str, dict[str, Any]] = {
    "mla_moe": {},
    "gqa": {"use_mla": False, "num_key_value_heads": 1},
    "mixing": {"embedding_mixing": 3},
    "pauses": {"num_pause_tokens": 2},
    "memory": {"num_memory_tokens": 2, "segment_length": 5, "use_moe": False},
    "virtual": {"recurrence": {**LOOP, "virtual_layers": 2}},
    **{name: {"recurrence": section} for name, section in EVERY.items()},
}
# One of each placement, halting, granularity and cache, the models without loops, and what is approximate.
SHORT = [name for name in MODELS if name not in EVERY] + list(EVERY)[::9]
PREFIX = "Mary moved to the bathroom. John went to the hallway. "
REQUESTS = [
    (PREFIX + "Where is Mary?", " bathroom"),
    (PREFIX + "Where is Mary?", " the hallway"),
    (PREFIX + "Where is Mary? ", "nowhere"),
    (PREFIX + "Where is John and where was he before?", " A"),
    (PREFIX + "Where is John and where was he before?", " B"),
    (PREFIX + "Who?", " John"),  # a context of its own
    (PREFIX.rstrip(), " A"),  # nothing but the prefix
    (PREFIX.rstrip(), " Brown"),
]
PROMPTS = [context for context, _ in REQUESTS[2:]]


@pytest.fixture
def make(checkpoint: Path) -> Any:
    tokenizer = Tokenizer(checkpoint / "tokenizer.model")

    def make(batch_size: int = 3, max_length: int = 256, **options: Any) -> Scorer:
        sizes = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": max_length}
        # Large initial weights: the next tokens of a random model must differ clearly, or rounding decides.
        config = ModelConfig.from_dict({**SMALL, "initializer_range": 0.2, **sizes, **options})
        return Scorer(ZeroModel(config, seed=1), tokenizer, batch_size)

    return make


@torch.inference_mode()
def alone(scorer: Scorer, request: tuple[str, str], model: ZeroModel, num_steps: int | None) -> Any:
    """(log-likelihood, steps) of one request by one pass over its whole row."""
    context, target = scorer.encode_pair(*request)
    out = model(torch.tensor([context + target[:-1]]), num_steps=num_steps)
    log_probs = out.logits[0, -len(target) :].double().log_softmax(-1)
    total = log_probs.gather(-1, torch.tensor(target)[:, None]).sum().item()
    if out.num_iterations is None:
        return total, None
    places = model.config.positions_per_token
    return total, out.num_iterations[:, 0, places - 1 :: places][:, -len(target) :].double().mean().item()


@torch.inference_mode()
def answer_alone(scorer: Scorer, prompt: str, stop: list[str], num_steps: int | None = None) -> str:
    ids = torch.tensor([scorer.tokenizer.encode(prompt, bos=True)])
    new = scorer.model.generate(
        ids, max_new_tokens=9, eos_token_id=scorer.tokenizer.eos_id, num_steps=num_steps
    )[0, ids.shape[1] :]
    return cut_at_stop(scorer.tokenizer.decode(new.tolist()), stop)


def check(scorer: Scorer, tolerance: float = 1e-5) -> None:
    found = scorer.loglikelihood(REQUESTS)
    steps = scorer.take_steps()
    expected = [alone(scorer, request, scorer.model, None) for request in REQUESTS]
    assert [total for total, _ in found] == pytest.approx([t for t, _ in expected], abs=tolerance, rel=1e-6)
    assert steps == pytest.approx([mean for _, mean in expected if mean is not None], abs=1e-6)
    stop = [answer_alone(scorer, PROMPTS[0], [])[3:5]]
    answers = scorer.generate(PROMPTS, 9, stop)
    assert answers == [answer_alone(scorer, prompt, stop) for prompt in PROMPTS]
    assert scorer.take_seconds() > 0
    assert scorer.take_seconds() == 0


@pytest.mark.parametrize("name", SHORT)
def test_what_is_shared_changes_nothing(make, name):
    # A memory that is handed on nine times, with these weights, multiplies rounding.
    check(make(**MODELS[name]), tolerance=2e-4 if name == "memory" else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name not in SHORT])
def test_what_is_shared_changes_nothing_in_any_loop(make, name):
    check(make(**MODELS[name]))


def tokens_read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, tokens per row) of every pass from now on."""
    passes: list[tuple[int, int]] = []
    forward = ZeroModel.forward

    def counted(self: ZeroModel, tokens: torch.Tensor, *args: Any, **options: Any) -> Any:
        passes.append((tokens.shape[0], tokens.shape[1]))
        return forward(self, tokens, *args, **options)

    monkeypatch.setattr(ZeroModel, "forward", counted)
    return passes


def test_shared_tokens_are_read_once(make, monkeypatch):
    scorer = make(batch_size=8)
    pairs = [scorer.encode_pair(*request) for request in REQUESTS]
    prefix = min(len(context) for context, _ in pairs) - 1
    longest = max(len(context) for context, _ in pairs) - 1 - prefix
    single, target = pairs.pop(5)  # a context of its own
    choices = max(len(target) for _, target in pairs)
    expected = [(3, longest), (len(pairs), choices), (1, len(single + target) - 1 - prefix)]
    passes = tokens_read(monkeypatch)
    scorer.loglikelihood(REQUESTS)
    assert passes == [(1, prefix), *expected]
    passes.clear()
    scorer.loglikelihood(REQUESTS)
    assert passes == expected  # the prefix is still held
    passes.clear()
    scorer.generate(PROMPTS, 1)
    assert passes == [(4, longest + 1)]  # of six prompts two occur twice


@pytest.mark.parametrize("name", ["memory", "virtual", *(n for n in EVERY if n.endswith("fixed-token-ema"))])
def test_a_model_whose_cache_is_inexact_reads_whole_rows(make, monkeypatch, name):
    scorer = make(**MODELS[name])
    passes = tokens_read(monkeypatch)
    scorer.loglikelihood(REQUESTS)
    assert sum(rows for rows, _ in passes) == len(REQUESTS)


def test_which_caches_are_exact(make):
    for name, options in MODELS.items():
        config = make(**options).model.config
        kept = name not in ("memory", "virtual") and config.recurrence.cache in EXACT
        assert config.decodes_exactly(4) == kept, name
    virtual = make(**MODELS["virtual"]).model.config
    assert virtual.decodes_exactly(2)
    assert not virtual.decodes_exactly(3)


def test_ended_rows_leave_the_batch(make, monkeypatch):
    scorer = make(batch_size=8)
    answers = scorer.generate(PROMPTS, 9)
    first = answers[1][:1]
    assert 0 < sum(first in answer[:1] for answer in answers) < len(PROMPTS)
    passes = tokens_read(monkeypatch)
    scorer.generate(PROMPTS, 9, [first])
    steps = [rows for rows, width in passes if width == 1]
    assert steps[0] < len(PROMPTS)
    assert steps == sorted(steps, reverse=True)


def test_samples_depend_on_seed_and_number_alone(make):
    prompts = PROMPTS + PROMPTS[:3]
    found = make(batch_size=3).generate(prompts, 9, temperature=0.8, seed=5)
    assert found == make(batch_size=100).generate(prompts, 9, temperature=0.8, seed=5)
    assert found[:4] == make(batch_size=2).generate(prompts[:4], 9, temperature=0.8, seed=5)
    assert found != make(batch_size=3).generate(prompts, 9, temperature=0.8, seed=6)
    assert found[: len(PROMPTS)] != found[len(PROMPTS) :] + found[3 : len(PROMPTS)]
    with pytest.raises(ValueError, match="temperature is -1"):
        make().generate(["a"], 2, temperature=-1)


@torch.inference_mode()
def test_samples_have_the_models_distribution(make):
    scorer, n, temperature = make(batch_size=500, initializer_range=0.05), 4000, 0.7
    prompt = PROMPTS[0]
    ids = torch.tensor([scorer.tokenizer.encode(prompt, bos=True)])
    expected = (scorer.model(ids).logits[0, -1].double() / temperature).softmax(-1)
    texts = scorer.generate([prompt] * n, 1, temperature=temperature)
    probabilities: dict[str, float] = {}
    for token, p in enumerate(expected.tolist()):  # some tokens are nothing, or no character, by themselves
        text = scorer.tokenizer.decode([token])
        probabilities[text] = probabilities.get(text, 0.0) + p
    for text, p in sorted(probabilities.items(), key=lambda pair: -pair[1])[:20]:
        assert texts.count(text) / n == pytest.approx(p, abs=4.5 * (p * (1 - p) / n) ** 0.5)


@pytest.mark.parametrize("depth", [1, 3, 6])
def test_a_given_depth_is_what_every_token_runs(make, depth):
    scorer = make(recurrence=LOOP)
    scorer.set_depth(depth)
    assert scorer.num_steps == depth
    found = [total for total, _ in scorer.loglikelihood(REQUESTS)]
    assert scorer.take_steps() == [depth] * len(REQUESTS)
    expected = [alone(scorer, request, scorer.model, depth)[0] for request in REQUESTS]
    assert found == pytest.approx(expected, abs=1e-5, rel=1e-6)
    assert scorer.generate(PROMPTS, 9) == [answer_alone(scorer, p, [], depth) for p in PROMPTS]
    assert scorer.take_steps() == [depth] * len(PROMPTS)
    scorer.num_steps = None
    scorer.loglikelihood(REQUESTS)
    assert scorer.take_steps() == [4] * len(REQUESTS)
    assert scorer.take_steps() == []


@pytest.mark.parametrize(
    ("section", "measure"),
    [
        ({**LOOP, "num_steps": 8}, "kl"),
        ({**LOOP, "num_steps": 8, "virtual_layers": 2}, "kl"),
        ({"placement": "kv", "num_steps": 8}, "cosine"),
    ],
)
def test_adaptive_depth_of_a_model_that_learned_none_is_threshold_halting(make, section, measure):
    scorer = make(recurrence=section, initializer_range=0.05)
    halting = {"kind": "threshold", "measure": measure, "min_steps": section.get("virtual_layers", 1)}
    other = make(recurrence={**section, "halting": halting}, initializer_range=0.05).model
    fixed = [total for total, _ in scorer.loglikelihood(REQUESTS)]
    scorer.take_steps()
    scorer.set_depth(ADAPTIVE)
    assert scorer.num_steps is None
    found = [total for total, _ in scorer.loglikelihood(REQUESTS)]
    expected = [alone(scorer, request, other, None) for request in REQUESTS]
    assert found == pytest.approx([total for total, _ in expected], abs=1e-5, rel=1e-6)
    steps = scorer.take_steps()
    assert steps == pytest.approx([mean for _, mean in expected])
    assert min(steps) < 8
    assert found != fixed


def test_adaptive_depth_of_a_model_that_learned_it_is_its_own(make):
    scorer = make(recurrence={**LOOP, "halting": {"kind": "ponder", "threshold": 0.3}})
    own = scorer.loglikelihood(REQUESTS)
    steps = scorer.take_steps()
    assert min(steps) < 4
    scorer.set_depth(ADAPTIVE)
    assert scorer.loglikelihood(REQUESTS) == own
    assert scorer.take_steps() == steps


def test_a_fixed_depth_switches_training_free_halting_off(make):
    scorer = make(recurrence={**LOOP, "halting": {"kind": "threshold", "threshold": 0.1}})
    scorer.loglikelihood(REQUESTS)
    assert min(scorer.take_steps()) < 4
    scorer.set_depth(3)
    scorer.loglikelihood(REQUESTS)
    assert scorer.take_steps() == [3] * len(REQUESTS)


def test_an_impossible_depth_is_refused(make):
    plain, looped = make(), make(recurrence=LOOP)
    plain.set_depth(1)
    plain.generate(PROMPTS, 2)
    assert plain.take_steps() == []
    for depth in (2, ADAPTIVE):
        with pytest.raises(ValueError, match=f"num_steps is {depth}: a model without recurrence"):
            plain.set_depth(depth)
    for depth in (0, "deep"):
        with pytest.raises(ValueError, match=f"num_steps is {depth}: it must be at least 1, or adaptive"):
            looped.set_depth(depth)


def test_cut_requests_share_what_the_others_do_not_lose(make):
    scorer = make(max_length=56)
    long = (PREFIX * 3 + "Where?", " bathroom")
    requests = [*REQUESTS[:5], long, (long[0], " A")]
    found = scorer.loglikelihood(requests)
    assert scorer.take_truncated() == sum(
        sum(map(len, scorer.encode_pair(*request))) > 57 for request in requests
    )
    for request, (total, _) in zip(requests, found, strict=True):
        context, target = scorer.encode_pair(*request)
        row = (context + target)[-57:-1]
        log_probs = scorer.model(torch.tensor([row])).logits[0, -len(target) :].double().log_softmax(-1)
        expected = log_probs.gather(-1, torch.tensor(target)[:, None]).sum().item()
        assert total == pytest.approx(expected, abs=1e-5, rel=1e-6)


LIMITS = [CacheLimit(9, 4), CacheLimit(5, 1, 0.6, 3), CacheLimit(12, 2, 1.0, 11)]


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", ["mla_moe", "gqa", "mixing", "virtual"])
def test_a_limited_cache_answers_as_each_prompt_alone(make, name, limit):
    """Rows that end leave the batch, and with them padding; what R-KV keeps of the others stays the same."""
    scorer, n = make(batch_size=4, **MODELS[name]), 28
    options = dict(zip(("kv_budget", "kv_buffer", "kv_lambda", "kv_window"), limit, strict=True))
    prompts, expected = list(dict.fromkeys(PROMPTS)), []
    for prompt in prompts:
        ids = torch.tensor([scorer.tokenizer.encode(prompt, bos=True)])
        with torch.inference_mode():
            new = scorer.model.generate(ids, n, **options)[0, ids.shape[1] :].tolist()
        expected.append((ids.shape[1], new))
    text = scorer.tokenizer.decode(expected[1][1])
    stop = [text[8:11]]  # a row that leaves early
    written = scorer.write(prompts, n, stop, limit=limit)
    assert written != scorer.write(prompts, n, stop)
    for (length, new), one in zip(expected, written, strict=True):
        assert one.text == cut_at_stop(scorer.tokenizer.decode(new), stop)
        assert one.tokens <= n
        cache = LatentCache()
        with torch.inference_mode():
            scorer.model(torch.tensor([[1]]), cache=cache)
        held = min(one.tokens - 1, limit.budget + limit.buffer)
        assert one.cache_bytes == (length + held) * cache.numel() * 4
    assert min(one.tokens for one in written) < n
