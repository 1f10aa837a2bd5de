"""Scores the answers to a synthetic task with labels, for eval/run.py."""

from collections.abc import Sequence
from typing import Any

from eval.looping.measures import encode_rows
from eval.looping.tasks import TASKS, chance
from eval.scoring.core import Score, Scorer, mean_score
from eval.scoring.results import TaskResult, majority, taken
from eval.scoring.task import Evaluation, Options

NUM_SAMPLES = 500


def load(options: Options, task: str) -> Evaluation:
    """Generates `options.limit` samples of `task`, else NUM_SAMPLES, at its default sizes.

    Scores the answer, the label of the last position: whether it is the most likely of all tokens. A task
    whose problems differ in depth also has one result per depth. Raises ValueError for exemplars.
    """
    if options.num_fewshot:
        raise ValueError(f"{task} has no exemplars: num_fewshot is {options.num_fewshot}, it must be 0")
    sizes = TASKS[task].options
    data = TASKS[task].generate(options.limit or NUM_SAMPLES, options.seed, **sizes)
    answers = [item.document.labels[-1][1] for item in data.items]
    depths = sorted({item.problem_depth for item in data.items if item.problem_depth is not None})
    members = {
        f"{task}_problem_depth{d}": [i for i, item in enumerate(data.items) if item.problem_depth == d]
        for d in depths
    }
    config = {**sizes, "seed": options.seed, "split": "test"}

    def baselines(chosen: Sequence[int]) -> dict[str, Score]:
        found = {
            "chance": Score(chance(task, sizes)),
            "majority": majority([answers[i] for i in chosen]),
        }
        for guess, given in data.guesses.items():
            found[guess] = mean_score([float(given[i] == answers[i]) for i in chosen])
        return found

    def evaluation(scorer: Scorer) -> list[TaskResult]:
        rows = encode_rows(task, [item.document for item in data.items], scorer)
        scores = scorer.loglikelihood_tokens([(row.tokens, row.targets[-1:]) for row in rows])
        samples = [
            {
                "doc_id": item.id,
                "group": task,
                "prompt": item.document.text,
                "target": answer,
                "resps": log_prob,
                "acc": float(greedy),
            }
            for item, answer, (log_prob, greedy) in zip(data.items, answers, scores, strict=True)
        ]

        def result(name: str, chosen: Sequence[int], **fields: Any) -> TaskResult:
            return TaskResult(
                task=name,
                values={"acc,none": [float(scores[i][1]) for i in chosen]},
                totals={"cross_entropy,none": mean_score([-scores[i][0] for i in chosen])},
                num_documents=len(chosen),
                baselines=baselines(chosen),
                config=config,
                **fields,
            )

        counted = taken(scorer)
        whole = result(task, range(len(rows)), samples=samples, subtasks=list(members), **counted)
        return [whole, *(result(name, chosen) for name, chosen in members.items())]

    return evaluation
