"""What the tasks share: the scorer, exemplars, multiple choice, and the statistics of results."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from data_pipeline.sources.documents import Problem
from eval.scoring.scorer import Scorer

__all__ = [
    "ChoiceScores",
    "Score",
    "Scorer",
    "add_fewshot",
    "mean_score",
    "sample_record",
    "score_choices",
    "with_shots",
]


def add_fewshot(
    problems: Sequence[Problem], exemplars: Sequence[Problem], num_fewshot: int, seed: int
) -> list[Problem]:
    """The problems with `num_fewshot` solved exemplars before each prompt, drawn anew for each problem.

    One random stream serves all problems in order, as in lm-eval run by one process: give all problems of the
    file, and cut afterwards. Raises ValueError if there are too few exemplars.
    """
    if not 0 <= num_fewshot <= len(exemplars):
        raise ValueError(
            f"num_fewshot is {num_fewshot}: it must be 0 to {len(exemplars)}, the exemplars there"
        )
    rng = random.Random(seed)
    return [with_shots(problem, rng.sample(exemplars, num_fewshot)) for problem in problems]


def with_shots(problem: Problem, shots: Sequence[Problem]) -> Problem:
    """The problem with these solved exemplars before its prompt."""
    return replace(problem, prompt="".join(f"{s.prompt}{s.target}\n\n" for s in shots) + problem.prompt)


class ChoiceScores(NamedTuple):
    """What multiple-choice scoring gives: one entry per problem."""

    acc: list[float]
    acc_norm: list[float]
    samples: list[dict[str, Any]]


def score_choices(scorer: Scorer, problems: Sequence[Problem]) -> ChoiceScores:
    """Accuracy of the most likely choice, by log-likelihood (acc) and per character (acc_norm)."""
    requests = [(problem.prompt, choice) for problem in problems for choice in problem.choices]
    scores = iter(scorer.loglikelihood(requests))
    result = ChoiceScores([], [], [])
    for problem in problems:
        log_probs = [next(scores)[0] for _ in problem.choices]
        # The space between prompt and choice does not belong to the choice's text.
        per_character = [
            p / len(choice.removeprefix(" ")) for p, choice in zip(log_probs, problem.choices, strict=True)
        ]
        chosen, chosen_norm = (values.index(max(values)) for values in (log_probs, per_character))
        result.acc.append(float(chosen == problem.gold))
        result.acc_norm.append(float(chosen_norm == problem.gold))
        result.samples.append(
            {
                **sample_record(problem),
                "choices": list(problem.choices),
                "gold": problem.gold,
                "resps": log_probs,
                "filtered_resps": [chosen, chosen_norm],
                "acc": result.acc[-1],
                "acc_norm": result.acc_norm[-1],
            }
        )
    return result


def sample_record(problem: Problem) -> dict[str, Any]:
    """The fields that a sample line has for every task."""
    return {
        "doc_id": problem.id,
        "group": problem.group,
        "prompt": problem.prompt,
        "target": problem.target,
    }


class Score(NamedTuple):
    """A mean over samples and its standard error (None for a single sample)."""

    value: float
    stderr: float | None = None


def mean_score(values: Sequence[float]) -> Score:
    """Mean and sample standard error; for 0/1 values the latter is sqrt(p (1 - p) / (n - 1)), as in lm-eval.

    Raises ValueError if there are no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("no samples to score: the data file is empty")
    mean = sum(values) / n
    if n == 1:
        return Score(mean)
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    return Score(mean, math.sqrt(variance / n))
