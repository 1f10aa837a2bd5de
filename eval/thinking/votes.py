"""Test-time scaling: sampled chains of thought, whose answers vote (Wang et al. 2022, arXiv 2203.11171)."""

from eval.scoring.core import Scorer
from eval.scoring.generation import TEMPERATURE, Ballot, majority_vote
from eval.thinking.answers import Way, answer_all
from eval.thinking.tasks import QuestionSet, normalize, read_chain_answer


def voters(samples: int) -> list[int]:
    """Numbers of votes that are counted: 1, 4, 16, ... below `samples`, and that."""
    return sorted({4**n for n in range(samples.bit_length()) if 4**n < samples} | {samples})


def vote(
    scorer: Scorer, data: QuestionSet, way: Way, max_new_tokens: int | None, seed: int, samples: int
) -> dict[str, list[float]]:
    """Answers every question `samples` times with a chain of thought.

    Returns:
        `acc,maj@k` for k of `voters`: 1.0 for a question where the majority of its first k is right.
    """
    ballots: list[list[Ballot]] = [[] for _ in data.questions]
    sampled = way._replace(temperature=TEMPERATURE)
    for sample in range(samples):
        answers = answer_all(scorer, data, sampled, max_new_tokens, seed + sample)
        for question, row, own in zip(data.questions, answers.rows, ballots, strict=True):
            found = read_chain_answer(scorer.tokenizer, row.tokens)
            answer = None if found is None else normalize(found)
            own.append(Ballot(answer, float(answer == normalize(question.answer))))
    return {f"acc,maj@{k}": [majority_vote(own[:k]) for own in ballots] for k in voters(samples)}
