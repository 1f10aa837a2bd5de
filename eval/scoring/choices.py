"""Multiple choice by log-likelihood: what ARC, LogiQA and ReClor share."""

from collections.abc import Sequence
from pathlib import Path

from data_pipeline.sources.documents import Problem
from eval.scoring.core import Score, Scorer, score_choices
from eval.scoring.results import TaskResult, majority, taken


def choice_result(
    scorer: Scorer,
    task: str,
    problems: Sequence[Problem],
    documents: Sequence[Problem],
    num_fewshot: int,
    data_files: Sequence[Path],
) -> TaskResult:
    """acc and acc_norm of `problems`, and what guessing reaches.

    Chance is over these problems; the majority is the share of the most common letter of the right answer
    in all `documents` of the file.
    """
    scores = score_choices(scorer, problems)
    chance = sum(1 / len(problem.choices) for problem in problems) / len(problems)
    return TaskResult(
        task=task,
        values={"acc,none": scores.acc, "acc_norm,none": scores.acc_norm},
        num_documents=len(documents),
        baselines={
            "chance": Score(chance),
            "majority": majority(problem.gold for problem in documents),
        },
        samples=scores.samples,
        num_fewshot=num_fewshot,
        data_files=data_files,
        **taken(scorer),
    )
