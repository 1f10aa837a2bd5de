"""bAbI, 20 tasks of reading and inference (en-10k test files), answered by generation (lm-eval's babi).

python eval/babi.py --checkpoint runs/NAME/export --data DATA_ROOT [--limit N per task --num_fewshot K]

Scored per task, pooled, and as the number of failed tasks (error above 5%), as the literature reports it.
`exact_match,none` is lm-eval's: the target keeps its leading space, so a tokenizer with a dummy prefix scores
0% there. `exact_match,stripped` strips both sides; failed tasks are counted by it. lm-eval's copy of the data
spells out the answers of task 19 ("south west"); here they are as published ("s,w"). Exemplars come from the
pooled train files. The baseline is each task's most common answer in its test file.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from data_pipeline.sources import Problem, read_babi
from eval.cli import Evaluation, Options, find_data, first, main
from eval.core import Score, Scorer, add_fewshot, sample_record
from eval.results import TaskResult

MAX_NEW_TOKENS = 24  # the longest answer has 20 bytes: enough for any tokenizer
STOP = ("\n", "Passage:")
METRICS = ("exact_match,none", "exact_match,stripped")
MAX_ERROR = 0.05  # a task with more is failed


def load(options: Options) -> Evaluation:
    """Reads the test files out of the tar.gz. Raises ValueError if it is missing or bad."""
    path = find_data(options.data, "babi/tasks_1-20_v1-2.tar.gz")
    published = first(list(read_babi(path, split="test")), None, path)
    documents = group_by_task(published)
    if options.shots():
        exemplars = list(read_babi(path, split="train"))
        published = add_fewshot(published, exemplars, options.shots(), options.seed)
    problems = {name: group[: options.limit] for name, group in group_by_task(published).items()}
    max_new_tokens = options.max_new_tokens or MAX_NEW_TOKENS
    common: dict[str, Any] = {
        "num_fewshot": options.shots(),
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
    """A sample line with the exact match of response and target as they are, and stripped."""
    answers = {"none": response, "stripped": response.strip()}
    targets = {"none": problem.target, "stripped": problem.target.strip()}
    return {
        **sample_record(problem),
        "resps": response,
        "filtered_resps": answers,
        **{f"exact_match,{name}": float(answers[name] == targets[name]) for name in answers},
    }


def summarize(
    samples: list[dict[str, Any]], documents: dict[str, list[Problem]], common: dict[str, Any]
) -> list[TaskResult]:
    """The pooled result, with all samples and the count of failed tasks, then one result a task."""
    values = {name: {key: list[float]() for key in METRICS} for name in documents}
    for sample in samples:
        for key in METRICS:
            values[sample["group"]][key].append(sample[key])
    majority = {name: majority_count(group) / len(group) for name, group in documents.items()}
    stripped = {name: of_task["exact_match,stripped"] for name, of_task in values.items()}
    failed = sum(matches.count(0.0) > MAX_ERROR * len(matches) for matches in stripped.values())
    sizes = {name: len(matches) for name, matches in stripped.items()}
    pooled = TaskResult(
        task="babi",
        values={key: [value for of_task in values.values() for value in of_task[key]] for key in METRICS},
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
            values=values[name],
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
