"""bAbI, 20 tasks of reading and inference (en-10k test files), answered by generation (lm-eval's babi).

python eval/babi.py --checkpoint runs/NAME/export --data DATA_ROOT [--limit N per task --num_fewshot K]

Scored per task, pooled, and as the number of failed tasks (error above 5%), as the literature reports it.
`exact_match,none` is lm-eval's: the target keeps its leading space, so a tokenizer with a dummy prefix scores
0% there. `exact_match,stripped` strips both sides; failed tasks are counted by it. lm-eval's copy of the data
spells out the answers of task 19 ("south west"); here they are as published ("s,w"). Exemplars come from the
pooled train files. The baselines are each task's most common answer in its test file, and chance among the
answers there.
"""

from collections.abc import Sequence
from typing import Any

from data_pipeline.sources.documents import Problem
from data_pipeline.sources.problems import read_babi
from eval.scoring.cli import main
from eval.scoring.core import Score, Scorer, add_fewshot, sample_record
from eval.scoring.generation import Ballot, Generation, values_of
from eval.scoring.results import TaskResult, majority
from eval.scoring.task import Evaluation, EvaluationTask, Options, find_data, first

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
    pooled = [problem for group in problems.values() for problem in group]
    generation = Generation(pooled, options.max_new_tokens or MAX_NEW_TOKENS, STOP, grade, ballot)

    def evaluation(scorer: Scorer) -> list[TaskResult]:
        samples, found = generation.run(scorer, options)
        common = {"num_fewshot": options.shots(), "config": found.pop("config")}
        return summarize(samples, documents, common, {**found, "data_files": [path]})

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


def ballot(sample: dict[str, Any]) -> Ballot:
    """The stripped answer votes; an empty one does not."""
    return Ballot(sample["filtered_resps"]["stripped"] or None, sample["exact_match,stripped"])


def is_failed(wrong: int, num_answers: int) -> bool:
    """Whether a task counts as failed: more than 5% of its answers are wrong."""
    return wrong > MAX_ERROR * num_answers


def summarize(
    samples: list[dict[str, Any]],
    documents: dict[str, list[Problem]],
    common: dict[str, Any],
    together: dict[str, Any],
) -> list[TaskResult]:
    """The pooled result, with all samples and the count of failed tasks, then one result per task.

    `common`: fields of every result; `together`: those that concern all tasks and are reported once.
    """
    of_task = {name: [sample for sample in samples if sample["group"] == name] for name in documents}
    guesses = {name: _baselines(group) for name, group in documents.items()}
    stripped = {name: [s["exact_match,stripped"] for s in lines] for name, lines in of_task.items()}
    failed = sum(is_failed(matches.count(0.0), len(matches)) for matches in stripped.values())
    steps = dict(zip((sample["doc_id"] for sample in samples), together.get("steps", ()), strict=False))
    pooled = TaskResult(
        task="babi",
        values=values_of([line for lines in of_task.values() for line in lines], METRICS),
        totals={"failed_tasks,none": failed},
        num_documents=sum(len(group) for group in documents.values()),
        baselines={
            kind: Score(sum(guesses[n][kind].value * len(of_task[n]) for n in of_task) / len(samples))
            for kind in ("chance", "majority")
        },
        samples=samples,
        subtasks=[f"babi_{name}" for name in documents],
        **common,
        **together,
    )
    tasks = [
        TaskResult(
            task=f"babi_{name}",
            values=values_of(of_task[name], METRICS),
            num_documents=len(group),
            baselines=guesses[name],
            steps=[steps[line["doc_id"]] for line in of_task[name]] if steps else (),
            **common,
        )
        for name, group in documents.items()
    ]
    return [pooled, *tasks]


def _baselines(problems: Sequence[Problem]) -> dict[str, Score]:
    """What guessing reaches on one task: any of its answers at random, and always the most common one."""
    targets = [problem.target for problem in problems]
    return {"chance": Score(1 / len(set(targets))), "majority": majority(targets)}


TASK = EvaluationTask("babi", load, generates=True)

if __name__ == "__main__":
    main(TASK, __doc__)
