"""Answers after thinking against the model's own calls, one question at a time, without padding."""

from pathlib import Path

import pytest
import torch

from data_pipeline.sources.traced import traced_gsm8k
from data_pipeline.tokenization.tokenizer import EOS_ID, EOT_ID, Tokenizer
from eval.scoring.core import Scorer
from eval.thinking import answers as thoughts_answers
from eval.thinking.answers import Answered, Way, answer_all, answer_batch, batches
from eval.thinking.tasks import (
    Question,
    QuestionSet,
    generated_questions,
    normalize,
    published_questions,
    read_answer,
)
from model import ZeroModel
from model.cache import LatentCache
from model.latent_cot.thoughts import generate_with_thoughts
from model.pretrained import load_pretrained

from .thinkers import KINDS, SIZE, C, encoded, write_random_model

NEW = 24
# Numbers of a token in the cache. Latent attention: layers 0, 1 (twice) and 2, latent and rotated key.
TOKEN_NUMBERS = {"thinker": 4 * (16 + 8), "teacher": 3 * 2 * 32}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_random_model(tmp_path_factory.mktemp(kind) / "export", kind) for kind in KINDS}


@pytest.fixture(autouse=True)
def few_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thoughts_answers, "TIMED", 1)


def load(exports: dict[str, Path], name: str) -> tuple[ZeroModel, Tokenizer]:
    return load_pretrained(exports[name]), Tokenizer(exports[name] / "tokenizer.model")


def of_many_lengths() -> QuestionSet:
    data = generated_questions("causal_loop_v2", 7, 3, SIZE)
    cut = [q._replace(text=q.text[7 * i % 20 :]) for i, q in enumerate(data.questions)]
    return data._replace(questions=cut)


def until_eos(ids: list[int]) -> list[int]:
    return ids[: ids.index(EOS_ID) + 1] if EOS_ID in ids else ids


@torch.inference_mode()
def written_alone(model: ZeroModel, prompt: list[int], new: int) -> list[int]:
    """Greedy, every token by a pass over the whole row without a cache."""
    row = list(prompt)
    for _ in range(new):
        row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
        if row[-1] == EOS_ID:
            break
    return row[len(prompt) :]


@pytest.mark.parametrize("mode", ["cot", "none"])
@pytest.mark.parametrize("name", KINDS)
def test_written_answers_equal_passes_without_a_cache(exports, name, mode):
    model, tokenizer = load(exports, name)
    data = of_many_lengths()
    prompts = encoded(tokenizer, data, *[EOT_ID] * (mode == "none"))
    expected = [written_alone(model, prompt, NEW) for prompt in prompts]
    assert len({len(answer) for answer in expected}) > 1  # they do end at different lengths
    for batch_size in (1, 3):
        answers = answer_all(Scorer(model, tokenizer, batch_size), data, Way(mode), NEW, seed=0)
        assert [row.tokens for row in answers.rows] == expected
        for prompt, row in zip(prompts, answers.rows, strict=True):
            assert row.passes == len(row.tokens)  # the question's gives the first token
            read = len(prompt) + len(row.tokens) - 1
            assert row.cache_bytes == row.peak_cache_bytes == 4 * read * TOKEN_NUMBERS[name]
        assert answers.num_truncated == 0
        assert list(answers.alone) == [0, 1, 2, 3]  # TIMED of each depth


@pytest.mark.parametrize(
    "way",
    [
        Way("thoughts"),
        Way("thoughts", 2, 4),
        Way("thoughts", 5, 6, tolerance=0.5),
        Way("thoughts", replace="zeroed"),
    ],
)
def test_thoughts_equal_the_models_own_row_by_row(exports, way, monkeypatch):
    model, tokenizer = load(exports, "thinker")
    data = of_many_lengths()
    passes, read = [0], ZeroModel.read

    def counted(*inputs: object, **options: object) -> object:
        passes[0] += 1
        return read(*inputs, **options)

    thinking = {
        name: getattr(way, name) for name in ("num_latents", "num_iterations", "tolerance", "replace")
    }
    expected = []
    for prompt in encoded(tokenizer, data):
        tokens = torch.tensor([prompt])
        with torch.inference_mode():
            full, _ = generate_with_thoughts(model, tokens, EOT_ID, NEW, thinking=thinking)
            new = until_eos(full[0].tolist())
            with monkeypatch.context() as patch:
                patch.setattr(ZeroModel, "read", counted)
                passes[0] = 0
                _, found = generate_with_thoughts(model, tokens, EOT_ID, len(new), thinking=thinking)
        expected.append(Answered(new, passes[0], *[4 * found.cache.numel()] * 2, 0.0))
        held = len(prompt) + (way.num_latents or C) + 1 + len(new) - 1
        assert found.cache.numel() == held * TOKEN_NUMBERS["thinker"]
    assert len({len(answer.tokens) for answer in expected}) > 1
    for batch_size in (1, 3):
        rows = answer_all(Scorer(model, tokenizer, batch_size), data, way, NEW, seed=0).rows
        for row, theirs in zip(rows, expected, strict=True):
            same = row._replace(seconds=0.0)
            if way.tolerance and batch_size > 1:  # the batch goes on until its slowest row has settled
                assert row.passes >= theirs.passes
                same = same._replace(passes=theirs.passes)
            assert same == theirs
    if way.tolerance:
        assert len({row.passes - len(row.tokens) for row in expected}) > 1  # it does stop some rows earlier


@pytest.mark.parametrize("name", KINDS)
def test_budgets_equal_the_models_own_row_by_row(exports, name):
    model, tokenizer = load(exports, name)
    data = of_many_lengths()
    plain = answer_all(Scorer(model, tokenizer, 3), data, Way("cot"), 30, seed=0).rows
    changed = False
    for way in (Way("cot", kv_budget=9, kv_buffer=4), Way("cot", kv_budget=30, kv_buffer=4)):
        rows = answer_all(Scorer(model, tokenizer, 3), data, way, 30, seed=0).rows
        for prompt, row, without in zip(encoded(tokenizer, data), rows, plain, strict=True):
            cache, budget = LatentCache(), {"kv_budget": way.kv_budget, "kv_buffer": way.kv_buffer}
            tokens = torch.tensor([prompt])
            with torch.inference_mode():
                own = model.generate(tokens, len(row.tokens), cache=cache, **budget)[0, len(prompt) :]
            assert row.tokens == own.tolist()
            assert row.tokens[-1] == EOS_ID or len(row.tokens) == 30
            assert row.cache_bytes == 4 * cache.numel()
            most = min(len(row.tokens) - 1, way.kv_budget + way.kv_buffer)
            assert row.peak_cache_bytes == 4 * (len(prompt) + most) * TOKEN_NUMBERS[name]
            if way.kv_budget == 30:
                assert row._replace(seconds=0) == without._replace(seconds=0)
            changed |= row.cache_bytes < without.cache_bytes
    assert changed


def test_shuffled_latents_are_of_another_question_of_the_batch(exports):
    model, tokenizer = load(exports, "thinker")
    data, way = of_many_lengths(), Way("thoughts", replace="shuffled")
    answers = answer_all(Scorer(model, tokenizer, 3), data, way, NEW, seed=11)
    lengths = [len(row) for row in encoded(tokenizer, data)]
    scorer = Scorer(model, tokenizer, 3)
    members = batches(scorer, lengths, pairs=True)
    assert [len(batch) for batch in members] == [3, 4]  # none is left alone
    assert [len(batch) for batch in batches(scorer, lengths, pairs=False)] == [3, 3, 1]
    assert sorted(i for batch in members for i in batch) == list(range(7))
    assert answers.alone == {}
    for batch in members:
        prompts = [encoded(tokenizer, data)[i] for i in batch]
        width = max(map(len, prompts))
        tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        with torch.inference_mode():
            thinking = {"replace": "shuffled", "seed": 11}
            new, found = generate_with_thoughts(model, tokens, EOT_ID, NEW, mask, thinking)
        for i, own in zip(batch, new.tolist(), strict=True):
            assert answers.rows[i].tokens == until_eos(own)
            assert answers.rows[i].passes == 1 + found.passes + len(until_eos(own))
    own = answer_all(Scorer(model, tokenizer, 3), data, Way("thoughts"), NEW, seed=11)
    assert [row.tokens for row in own.rows] != [row.tokens for row in answers.rows]


def test_a_long_question_is_cut_from_the_left(exports):
    model, tokenizer = load(exports, "thinker")
    short, long = Question("s", "A1?A", "1"), Question("l", "A1B2" * 40 + "?A", "1")
    data = QuestionSet([short, long], 2, 0.5, {}, [])
    answers = answer_all(Scorer(model, tokenizer, 2), data, Way("thoughts"), 20, seed=0)
    assert answers.num_truncated == 1
    room = 160 - 20 - C - 1
    cut = encoded(tokenizer, data)[1][-room:]
    alone = answer_batch(model, tokenizer, [cut], Way("thoughts"), 20, 0)[0]
    assert answers.rows[1]._replace(seconds=0) == alone._replace(seconds=0)
    with pytest.raises(ValueError, match="max_new_tokens is 156: with the thoughts it leaves no room"):
        answer_all(Scorer(model, tokenizer, 2), data, Way("thoughts"), 156, seed=0)


def test_answers_are_compared_without_commas_in_numbers():
    assert read_answer("\nAnswer: 1,080") == "1,080"
    assert read_answer("\nAnswer:") == ""
    assert read_answer(" 5") is None
    assert read_answer("so\nAnswer: 5") is None
    assert normalize(" 1,080,000 ") == "1080000"
    assert normalize("Tom, Al and 3, 4") == "Tom, Al and 3, 4"


def test_published_questions_are_those_of_training(data_root):
    gsm8k = published_questions("gsm8k", data_root, None)
    assert gsm8k.num_documents == len(gsm8k.questions) == 1319
    traced = list(traced_gsm8k(data_root / "gsm8k" / "test.jsonl"))
    asked = {question.text: question.answer for question in gsm8k.questions}
    assert len(traced) > 1300
    for document in traced:
        assert asked[document.question] == document.answer
    icot = published_questions("icot", data_root, 3)
    assert (icot.num_documents, len(icot.questions)) == (1319, 3)
    assert [q.answer for q in icot.questions] == [normalize(q.answer) for q in gsm8k.questions[:3]]
    prosqa = published_questions("prosqa", data_root, None)
    assert (prosqa.num_documents, prosqa.chance) == (500, 0.5)
    for question in prosqa.questions:
        assert question.answer.removesuffix(".").split()[-1] in question.text.rpartition(". ")[2]
