"""Scores the answers to a synthetic task with labels, for eval/run.py."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from eval.looping.measures import encode_rows
from eval.looping.tasks import TASKS, chance
from eval.scoring.core import Score, Scorer, mean_score
from eval.scoring.results import TaskResult, majority, taken
from eval.scoring.task import Evaluation, EvaluationTask, Options

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
    problem_depths = [item.problem_depth for item in data.items]
    members = {
        d: [i for i, depth in enumerate(problem_depths) if depth == d]
        for d in sorted({d for d in problem_depths if d is not None})
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
                "problem_depth": item.problem_depth,
                "prompt": item.document.text,
                "target": answer,
                "resps": log_prob,
                "acc": float(greedy),
            }
            for item, answer, (log_prob, greedy) in zip(data.items, answers, scores, strict=True)
        ]

        def result(chosen: Sequence[int], problem_depth: int | None = None, **fields: Any) -> TaskResult:
            return TaskResult(
                task=task if problem_depth is None else f"{task}_problem_depth{problem_depth}",
                values={"acc,none": [float(scores[i][1]) for i in chosen]},
                totals={"cross_entropy,none": mean_score([-scores[i][0] for i in chosen])},
                num_documents=len(chosen),
                baselines=baselines(chosen),
                config={**config, "problem_depth": problem_depth},
                **fields,
            )

        counted, parts = taken(scorer), [result(chosen, d) for d, chosen in members.items()]
        names = [part.task for part in parts]
        return [result(range(len(rows)), samples=samples, subtasks=names, **counted), *parts]

    return evaluation


LABELLED = {name: EvaluationTask(name, partial(load, task=name)) for name in TASKS}
