"""Results, sample lines and the table of answers after thinking."""

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from eval.scoring.core import Score, Scorer, mean_score
from eval.scoring.results import TaskResult, format_table
from eval.scoring.task import Options
from eval.thinking.answers import Answers, Way, answer_all, try_way
from eval.thinking.tasks import QuestionSet, normalize, read_answer, read_chain_answer
from eval.thinking.votes import vote
from eval.thinking.ways import WayFlags, mark, settings, ways
from model import ZeroModel

COSTS = ("forward_passes", "generated_tokens", "cache_bytes", "peak_cache_bytes")
LATENCY = "latency_seconds,batch="  # then the number of questions in a batch


def evaluate_ways(
    scorer: Scorer, task: str, data: QuestionSet, flags: WayFlags, options: Options, config: dict[str, Any]
) -> list[TaskResult]:
    """All results of eval/thoughts.py, way by way, the whole before its parts; `config` of each.

    Raises ValueError for a model that cannot answer in these ways.
    """
    model = scorer.model
    if not isinstance(model, ZeroModel):
        raise ValueError("the checkpoint is a Hugging Face folder, which has no <bot> and <eot>: import it")
    wanted = ways(flags, model.config, scorer.batch_size, options.samples)
    for way in wanted:  # all are tried before the first has run for an hour
        try_way(scorer, data, way, options.seed)
    results: list[TaskResult] = []
    length, seed = options.max_new_tokens, options.seed
    for way in wanted:
        found = answer_all(scorer, data, way, length, seed)
        whole, *parts = summarize(scorer, task, data, way, found, config)
        if options.samples:
            whole.values.update(vote(scorer, data, way, length, seed, options.samples))
        results += [whole, *parts]
    return results


def summarize(
    scorer: Scorer, task: str, data: QuestionSet, way: Way, answers: Answers, config: dict[str, Any]
) -> list[TaskResult]:
    """The result of all questions, with their sample lines, and one per problem depth; `config` of each."""
    suffix, config = mark(way, scorer.model.config), {**config, **settings(way, scorer.model.config)}
    config |= {"problem_set": task, "max_new_tokens": answers.max_new_tokens}
    lines = sample_lines(task, data, answers, scorer)
    gold = [normalize(question.answer) for question in data.questions]

    def result(
        name: str, members: Sequence[int], problem_depth: int | None = None, **fields: Any
    ) -> TaskResult:
        """Majority knows the test answers: it is the best of all constants."""
        common, _ = Counter(gold[i] for i in members).most_common(1)[0]
        guesses = {"majority": [common] * len(gold), **data.guesses}
        return TaskResult(
            task=name + suffix,
            values={"acc,none": [lines[i]["acc"] for i in members]},
            totals=costs(members, lines, answers, scorer.batch_size),
            num_documents=data.num_documents if problem_depth is None else len(members),
            baselines={
                "chance": Score(data.chance),
                **{
                    guess: mean_score([float(normalize(given[i]) == gold[i]) for i in members])
                    for guess, given in guesses.items()
                },
            },
            config={**config, "problem_depth": problem_depth},
            seconds=sum(answers.rows[i].seconds for i in members),
            **fields,
        )

    whole, everything = f"thoughts_{task}", range(len(gold))
    problem_depths = [question.problem_depth for question in data.questions]
    parts = [
        result(f"{whole}_problem_depth{d}", [i for i in everything if problem_depths[i] == d], d)
        for d in sorted({d for d in problem_depths if d is not None})
    ]
    top: dict[str, Any] = {
        "samples": lines,
        "num_truncated": answers.num_truncated,
        "data_files": data.data_files,
    }
    return [result(whole, everything, subtasks=[part.task for part in parts], **top), *parts]


def costs(
    members: Sequence[int], lines: Sequence[dict[str, Any]], answers: Answers, batch_size: int
) -> dict[str, float | Score]:
    """Means over questions, and medians of seconds."""
    found: dict[str, float | Score] = {
        f"{name},none": mean_score([lines[i][name] for i in members]) for name in COSTS
    }
    in_batch = [answers.rows[i].seconds for i in members]
    found[f"{LATENCY}{batch_size}"] = statistics.median(in_batch)
    alone = [answers.alone[i] for i in members if i in answers.alone]
    if alone and batch_size > 1:
        found[f"{LATENCY}1"] = statistics.median(alone)
    return found


def sample_lines(task: str, data: QuestionSet, answers: Answers, scorer: Scorer) -> list[dict[str, Any]]:
    """What --log_samples writes: the answer to each question, whether it is right, and its costs."""
    lines = []
    for question, row in zip(data.questions, answers.rows, strict=True):
        if answers.mode == "cot":
            found = read_chain_answer(scorer.tokenizer, row.tokens)
        else:
            found = read_answer(scorer.tokenizer.decode(row.tokens))
        right = found is not None and normalize(found) == normalize(question.answer)
        lines.append(
            {
                "doc_id": question.id,
                "group": task,
                "problem_depth": question.problem_depth,
                "prompt": question.text,
                "target": question.answer,
                "resps": scorer.tokenizer.decode(row.tokens),
                "filtered_resps": found,
                "acc": float(right),
                "forward_passes": row.passes,
                "generated_tokens": len(row.tokens),
                "cache_bytes": row.cache_bytes,
                "peak_cache_bytes": row.peak_cache_bytes,
            }
        )
    return lines


def table(results: Sequence[TaskResult]) -> str:
    """One row per result; columns are accuracy, what it is to beat, and costs."""
    timed = sorted({key for result in results for key in result.totals if key.startswith(LATENCY)}, key=_size)
    rows = []
    for result in results:
        beat = ", ".join(f"{name} {score.value:.4f}" for name, score in result.baselines.items())
        score = mean_score(result.values["acc,none"])
        accuracy = f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")
        means = [result.totals[f"{name},none"] for name in COSTS]
        cost = [f"{mean.value:.5g}" for mean in means if isinstance(mean, Score)]
        seconds = [f"{result.totals[key]:.4g}" if key in result.totals else "n/a" for key in timed]
        rows.append((result.name, str(result.num_samples), accuracy, beat, *cost, *seconds))
    heading = [name.replace("_", " ") for name in (*COSTS, *timed)]
    return format_table(("task", "n", "accuracy", "to beat", *heading), rows)


def _size(key: str) -> int:
    return int(key.removeprefix(LATENCY))
