"""bAbI, 20 tasks of reading and inference (en-10k test files), answered by generation (lm-eval's babi).

python eval/babi.py --checkpoint runs/NAME/export --data DATA_ROOT [--limit N per task --num_fewshot K]

Scored per task, pooled, and as the number of failed tasks (error above 5%), as the literature reports it.
Unlike lm-eval, which compares with a target that keeps its leading space (a tokenizer with a dummy prefix
scores 0% there), both sides are stripped. The baseline is each task's most common answer in its test file.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from data_pipeline.sources import Problem, read_babi
from eval.cli import Evaluation, Options, find_data, first, main
from eval.core import Score, Scorer, add_fewshot, sample_record
from eval.results import TaskResult

MAX_NEW_TOKENS = 16
STOP = ("\n", "Passage:")
MAX_ERROR = 0.05  # a task with more is failed


def load(options: Options) -> Evaluation:
    """Reads the test files out of the tar.gz. Raises ValueError if it is missing or bad."""
    path = find_data(options.data, "babi/tasks_1-20_v1-2.tar.gz")
    documents = group_by_task(first(list(read_babi(path, split="test")), None, path))
    problems = {name: first(group, options.limit, path) for name, group in documents.items()}
    if options.num_fewshot:
        exemplars = group_by_task(list(read_babi(path, split="train")))
        problems = {
            name: add_fewshot(group, exemplars[name], options.num_fewshot, options.seed)
            for name, group in problems.items()
        }
    max_new_tokens = options.max_new_tokens or MAX_NEW_TOKENS
    common: dict[str, Any] = {
        "num_fewshot": options.num_fewshot,
        "config": {"max_new_tokens": max_new_tokens, "until": STOP},
        "data_files": [path],
    }

    def evaluation(scorer: Scorer) -> list[TaskResult]:
        pooled = [problem for group in problems.values() for problem in group]
        responses = scorer.generate([problem.prompt for problem in pooled], max_new_tokens, STOP)
        samples = [grade(problem, response) for problem, response in zip(pooled, responses, strict=True)]
        return summarize(samples, documents, {**common, "num_truncated": scorer.take_truncated()})

    return evaluation


def group_by_task(problems: Sequence[Problem]) -> dict[str, list[Problem]]:
    """The problems of qa1, qa2, ... qa20, in this order."""
    groups: dict[str, list[Problem]] = {}
    for problem in sorted(problems, key=lambda problem: int(problem.group.removeprefix("qa"))):
        groups.setdefault(problem.group, []).append(problem)
    return groups


def grade(problem: Problem, response: str) -> dict[str, Any]:
    """A sample line with the exact match of the stripped response and the stripped target."""
    answer = response.strip()
    return {
        **sample_record(problem),
        "resps": response,
        "filtered_resps": answer,
        "exact_match": float(answer == problem.target.strip()),
    }


def summarize(
    samples: list[dict[str, Any]], documents: dict[str, list[Problem]], common: dict[str, Any]
) -> list[TaskResult]:
    """The pooled result, with all samples and the count of failed tasks, then one result a task."""
    matches: dict[str, list[float]] = {name: [] for name in documents}
    for sample in samples:
        matches[sample["group"]].append(sample["exact_match"])
    majority = {name: majority_count(group) / len(group) for name, group in documents.items()}
    failed = sum(values.count(0.0) > MAX_ERROR * len(values) for values in matches.values())
    sizes = {name: len(values) for name, values in matches.items()}
    pooled = TaskResult(
        task="babi",
        values={"exact_match,none": [value for values in matches.values() for value in values]},
        totals={"failed_tasks,none": failed},
        num_documents=sum(len(group) for group in documents.values()),
        baselines={"majority": Score(sum(majority[n] * sizes[n] for n in sizes) / sum(sizes.values()))},
        samples=samples,
        subtasks=[f"babi_{name}" for name in documents],
        **common,
    )
    tasks = [
        TaskResult(
            task=f"babi_{name}",
            values={"exact_match,none": matches[name]},
            num_documents=len(group),
            baselines={"majority": Score(majority[name])},
            # what concerns all tasks together is reported once, with the pooled result
            **{**common, "num_truncated": 0, "data_files": ()},
        )
        for name, group in documents.items()
    ]
    return [pooled, *tasks]


def majority_count(problems: Sequence[Problem]) -> int:
    """How many of the problems have the most common target."""
    return Counter(problem.target for problem in problems).most_common(1)[0][1]


if __name__ == "__main__":
    main(load, __doc__)
