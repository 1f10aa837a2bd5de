"""Votes of sampled chains of thought against answers that are known."""

import torch

from data_pipeline.tokenization.tokenizer import EOS_ID, EOT_ID, Tokenizer
from eval.scoring.core import Scorer
from eval.scoring.generation import TEMPERATURE
from eval.thinking import votes as thoughts_votes
from eval.thinking.answers import Answered, Answers, Way, answer_batch
from eval.thinking.tasks import Question, QuestionSet
from eval.thinking.votes import vote, voters
from model.pretrained import load_pretrained

from .thinkers import write_random_model


def test_the_votes_that_are_counted():
    assert [voters(k) for k in (1, 3, 4, 16, 20)] == [[1], [1, 3], [1, 4], [1, 4, 16], [1, 4, 16, 20]]


def test_the_majority_of_the_first_answers_decides(tmp_path, monkeypatch):
    """Of equals the first seen; a chain without an answer does not vote."""
    export = write_random_model(tmp_path / "export", "teacher")
    tokenizer = Tokenizer(export / "tokenizer.model")
    given = {0: ["3", "3", "5", "5", "5"], 1: ["1", "2", "2", "1", "1"], 2: [None, "6", None, None, "4"]}
    gold = {0: "5", 1: "2", 2: "6"}
    seeds = []

    def answered(text: str | None) -> Answered:
        tokens = tokenizer.encode("\nAnswer: " + text) if text else []
        return Answered([*([EOT_ID, *tokens] if text else []), EOS_ID], 1, 0, 0, 0.0)

    def answers(scorer, data, way, max_new_tokens, seed) -> Answers:
        assert way == Way("cot", temperature=TEMPERATURE)
        seeds.append(seed)
        return Answers("cot", [answered(given[i][seed - 7]) for i in range(3)], {}, 0, 9)

    monkeypatch.setattr(thoughts_votes, "answer_all", answers)
    data = QuestionSet([Question(str(i), "?", gold[i]) for i in range(3)], 3, 0.1, {}, [])
    found = vote(Scorer(load_pretrained(export), tokenizer, 2), data, Way("cot"), None, 7, 5)
    assert seeds == [7, 8, 9, 10, 11]
    assert found == {
        "acc,maj@1": [0.0, 0.0, 0.0],
        "acc,maj@4": [0.0, 0.0, 1.0],  # 3 3 5 5 and 1 2 2 1 are ties
        "acc,maj@5": [1.0, 0.0, 1.0],
    }


def test_samples_follow_their_seed(tmp_path):
    export = write_random_model(tmp_path / "export", "teacher")
    tokenizer = Tokenizer(export / "tokenizer.model")
    model, way = load_pretrained(export), Way("cot", temperature=TEMPERATURE)
    prompts = [[1, 20, 30, 40], [1, 50, 60, 70]]
    rows = [
        [row.tokens for row in answer_batch(model, tokenizer, prompts, way, 12, seed)] for seed in (1, 1, 2)
    ]
    assert rows[0] == rows[1] != rows[2]
    with torch.inference_mode():
        whole = model.generate(
            torch.tensor(prompts), 12, eos_token_id=EOS_ID, temperature=TEMPERATURE, seed=2
        )
    for own, line in zip(rows[2], whole[:, 4:].tolist(), strict=True):
        assert own == line[: len(own)]
