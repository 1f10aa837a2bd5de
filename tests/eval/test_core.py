"""Scoring and generation against brute force: one prompt, no padding, no cache, one token at a time."""

import math
import random

import numpy as np
import pytest
import torch

from data_pipeline.sources.documents import Problem
from eval.scoring.core import Scorer, add_fewshot, mean_score, score_choices
from eval.scoring.scorer import cut_at_stop
from model import ZeroModel

REQUESTS = [
    ("Question: Where is Mary?\nAnswer:", " bathroom"),
    ("Question: Where is Mary?\nAnswer:", " the hallway"),
    ("Question: Where is Mary?\nAnswer: ", "bathroom"),  # the space moves to the continuation
    ("", "A"),
    ("", " Straße 東京 \u2581 naïve"),
    ("x", "\n\ny"),
    ("Passage: " + "Mary moved to the bathroom. " * 9, "John went to the hallway."),
    ("tab\t\n ", "ends in white space"),
    ("Emoji 🧠", " 🧠🧠"),
]


@torch.inference_mode()
def brute_force_loglikelihood(scorer: Scorer, context: list[int], target: list[int]) -> tuple[float, bool]:
    total, greedy, ids = 0.0, True, list(context)
    for token in target:
        window = ids[-scorer.max_length :]
        probabilities = torch.softmax(scorer.model(torch.tensor([window])).logits[0, -1].double(), dim=-1)
        total += math.log(probabilities[token].item())
        greedy &= probabilities.argmax().item() == token
        ids.append(token)
    return total, greedy


@torch.inference_mode()
def brute_force_generate(scorer: Scorer, prompt: str, max_new_tokens: int, stop: list[str]) -> str:
    ids = scorer.tokenizer.encode(prompt, bos=True)[-(scorer.max_length - max_new_tokens) :]
    new: list[int] = []
    while len(new) < max_new_tokens:
        token = int(scorer.model(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token == scorer.tokenizer.eos_id:
            break
        new.append(token)
        text = scorer.tokenizer.decode(new)
        for s in stop:
            if s in text:
                return text[: text.index(s)]
    return scorer.tokenizer.decode(new)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_loglikelihood_equals_brute_force(make_scorer, batch_size):
    scorer = make_scorer(batch_size)
    results = scorer.loglikelihood(REQUESTS)
    for request, (total, greedy) in zip(REQUESTS, results, strict=True):
        expected, expected_greedy = brute_force_loglikelihood(scorer, *scorer.encode_pair(*request))
        assert total == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy
    assert scorer.take_truncated() == 0


def test_order_of_requests_changes_nothing(make_scorer):
    scorer = make_scorer()
    results = dict(zip(REQUESTS, scorer.loglikelihood(REQUESTS), strict=True))
    shuffled = random.Random(0).sample(REQUESTS, len(REQUESTS))
    for request, (total, greedy) in zip(shuffled, scorer.loglikelihood(shuffled), strict=True):
        assert (pytest.approx(total, abs=1e-4), greedy) == results[request]
    assert scorer.loglikelihood([]) == []


@torch.inference_mode()
def test_is_greedy_is_true_for_the_most_likely_token_only(make_scorer):
    scorer = make_scorer()
    best, second = [], []
    for i in range(40):
        ids = scorer.tokenizer.encode(f"Where is Mary {i}", bos=True)
        order = scorer.model(torch.tensor([ids])).logits[0, -1].argsort(descending=True).tolist()
        for token, pairs in zip(order[:2], (best, second), strict=True):
            text = scorer.tokenizer.decode([token])
            # A byte piece, or one that joins the context, does not come back as the same token.
            if scorer.tokenizer.encode(f"Where is Mary {i}{text}", bos=True) == [*ids, token]:
                pairs.append((f"Where is Mary {i}", text))
    assert len(best) >= 3
    assert len(second) >= 3
    assert all(greedy for _, greedy in scorer.loglikelihood(best))
    assert not any(greedy for _, greedy in scorer.loglikelihood(second))


def test_encode_pair_is_the_rule_of_lm_eval(make_scorer):
    scorer = make_scorer()
    encode = scorer.tokenizer.encode
    for context, continuation in REQUESTS:
        context_ids, target_ids = scorer.encode_pair(context, continuation)
        assert context_ids == [scorer.tokenizer.bos_id, *encode(context.rstrip())]
        # lossless and unigram without a merge over the border: both sides decode to the text
        assert scorer.tokenizer.decode(context_ids + target_ids) == context + continuation
    assert scorer.encode_pair("Answer: ", "yes") == scorer.encode_pair("Answer:", " yes")


def test_long_context_is_cut_from_the_left_and_counted(make_scorer):
    scorer = make_scorer(batch_size=2, max_length=20)
    fits = ("a" * 5, "bcd")
    context, target = scorer.encode_pair(*fits)
    assert len(context) + len(target) <= 21
    long = ("0123456789" * 5, "4567")
    exact = ("0" * (21 - 1 - 3), "123")  # bos + 17 + 3 = 21 tokens: one more than the positions, and fits
    results = scorer.loglikelihood([fits, long, exact])
    assert scorer.take_truncated() == 1
    assert scorer.take_truncated() == 0
    for request, (total, _) in zip([fits, long, exact], results, strict=True):
        context, target = scorer.encode_pair(*request)
        window = (context + target)[-21:-1]
        logits = scorer.model(torch.tensor([window])).logits[0].double().log_softmax(-1)
        expected = sum(logits[len(window) - len(target) + i, t].item() for i, t in enumerate(target))
        assert total == pytest.approx(expected, abs=1e-4)


def test_bad_requests_say_what_is_wrong(make_scorer):
    with pytest.raises(ValueError, match="no token of its own"):
        make_scorer().loglikelihood([("context", "")])
    with pytest.raises(ValueError, match="30 tokens exceeds .* 20"):
        make_scorer(max_length=20).loglikelihood([("context", "1" * 30)])
    for max_new_tokens in (0, 20, 21):
        with pytest.raises(ValueError, match=f"max_new_tokens is {max_new_tokens}"):
            make_scorer(max_length=20).generate(["a"], max_new_tokens)
    with pytest.raises(ValueError, match="batch_size is 0"):
        make_scorer(batch_size=0)


def test_overflow_is_an_error(make_scorer):
    scorer = make_scorer()
    with torch.no_grad():
        next(scorer.model.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="log-probability of nan"):
        scorer.loglikelihood([("a", "b")])


PROMPTS = [
    "",
    "a",
    "Question: Where is Mary?\nAnswer:",
    "Passage: John went to the hallway.\n" * 4,
    "東京 🧠",
]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_generate_equals_brute_force(make_scorer, batch_size):
    scorer = make_scorer(batch_size)
    texts = scorer.generate(PROMPTS, 12)
    assert texts == [brute_force_generate(scorer, prompt, 12, []) for prompt in PROMPTS]
    # Stop at strings that do occur, of one byte and of several, and at some that do not.
    stops = [texts[0][2:5], texts[3][4], "Passage:"]
    stopped = scorer.generate(PROMPTS, 12, stops)
    assert stopped == [brute_force_generate(scorer, prompt, 12, stops) for prompt in PROMPTS]
    assert stopped != texts
    assert scorer.take_truncated() == 0


def test_generation_ends_when_every_row_has_met_its_stop_string(make_scorer, monkeypatch):
    scorer = make_scorer(batch_size=8)
    calls = 0
    forward = ZeroModel.forward

    def counted(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(ZeroModel, "forward", counted)
    texts = scorer.generate(PROMPTS, 12)
    assert calls == 12
    calls = 0
    assert scorer.generate(PROMPTS, 12, [text[0] for text in texts]) == [""] * len(PROMPTS)
    assert calls < 12


def test_generate_cuts_a_long_prompt(make_scorer):
    scorer = make_scorer(batch_size=2, max_length=20)
    prompts = ["0123456789" * 3, "ab"]
    assert scorer.generate(prompts, 6) == [brute_force_generate(scorer, prompt, 6, []) for prompt in prompts]
    assert scorer.take_truncated() == 1


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\ntwo", ["\n"], "one"),
        ("a Passage: b\nc", ["\n", "Passage:"], "a "),
        ("nothing", ["\n"], "nothing"),
        ("\nfirst", ["\n"], ""),
        ("none", [], "none"),
    ],
)
def test_cut_at_stop(text, stop, expected):
    assert cut_at_stop(text, stop) == expected


def problems(n: int) -> list[Problem]:
    return [Problem(id=str(i), prompt=f"Q{i}\nA:", target=f" {i}") for i in range(n)]


def test_fewshot_draws_one_stream_in_order():
    exemplars = problems(20)
    shown = add_fewshot(problems(3), exemplars, 2, seed=7)
    rng = random.Random(7)
    for i, problem in enumerate(shown):
        first, second = rng.sample(range(20), 2)
        assert problem.prompt == f"Q{first}\nA: {first}\n\nQ{second}\nA: {second}\n\nQ{i}\nA:"
        assert problem.target == f" {i}"
    assert add_fewshot(problems(3), exemplars, 0, seed=7) == problems(3)
    for bad in (21, -1):
        with pytest.raises(ValueError, match=f"num_fewshot is {bad}: it must be 0 to 20"):
            add_fewshot(problems(3), exemplars, bad, seed=7)


class GivenScores:
    """A scorer whose log-probabilities are given."""

    def __init__(self, scores: dict[tuple[str, str], float]) -> None:
        self.scores = scores

    def loglikelihood(self, requests: list[tuple[str, str]]) -> list[tuple[float, bool]]:
        return [(self.scores[request], False) for request in requests]


def test_score_choices_on_hand_made_log_probabilities():
    scores = {("p", " ab"): -3.0, ("p", " abcdef"): -6.0}
    scores |= {("q", " x"): -1.0, ("q", " y"): -2.0, ("q", " z"): -1.0}
    made = [
        Problem(id="0", prompt="p", target=" abcdef", choices=(" ab", " abcdef"), gold=1),
        Problem(id="1", prompt="q", target=" x", choices=(" x", " y", " z"), gold=0),  # a tie: the first wins
    ]
    result = score_choices(GivenScores(scores), made)  # type: ignore[arg-type]
    assert result.acc == [0.0, 1.0]  # -3 beats -6
    assert result.acc_norm == [1.0, 1.0]  # -6 / 6 characters beats -3 / 2
    assert [sample["filtered_resps"] for sample in result.samples] == [[0, 1], [0, 0]]


def test_mean_score_is_the_sample_standard_error():
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    score = mean_score(values)
    assert score.value == pytest.approx(0.6)
    assert score.stderr == pytest.approx(math.sqrt(0.6 * 0.4 / 4))
    assert score.stderr == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))
    assert mean_score([1.0]) == (1.0, None)
    assert mean_score([0.0, 0.0]) == (0.0, 0.0)
    with pytest.raises(ValueError, match="no samples"):
        mean_score([])
