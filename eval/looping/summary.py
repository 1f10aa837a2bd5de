"""Results, sample lines and facts of a looped model at several depths on one labelled task."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from eval.looping.measures import (
    Outcome,
    Row,
    encode_rows,
    halting_time,
    measure,
    path_independence,
    pooled,
    spearman,
    unrolled_parameters,
)
from eval.looping.tasks import TaskData
from eval.scoring.core import Scorer, mean_score
from eval.scoring.results import TaskResult
from model import RecurrenceConfig, ZeroModel
from model.counts import flops_per_token


def evaluate_depths(
    scorer: Scorer,
    task: str,
    data: TaskData,
    asked: Sequence[int | str] | None,
    seed: int,
    config: dict[str, Any],
) -> list[TaskResult]:
    """All results of eval/reasoning.py, the whole task first; `config` of each.

    Raises ValueError for a model or a depth that cannot be measured.
    """
    if not isinstance(scorer.model, ZeroModel):
        raise ValueError("the checkpoint is a Hugging Face folder, whose loops are unknown: import it")
    steps = depths_to_test(scorer.model.config.recurrence, asked)
    rows = encode_rows(task, [item.document for item in data.items], scorer)
    measured = measure_depths(scorer, rows, steps)
    results = summarize(f"reasoning_{task}", data, measured, scorer, config)
    results[0].facts.update(facts(scorer, data, rows, measured, seed))
    return results


def depths_to_test(recurrence: RecurrenceConfig, asked: Sequence[int | str] | None) -> list[int]:
    """Rising test-time depths: as asked, else 1, R/2, R, 2R, 3R and 4R of the model's own R.

    Raises ValueError for `adaptive`, and for a depth other than 1 of a model without recurrence.
    """
    given = ",".join(map(str, asked or ()))
    numbers = [n for n in asked or () if isinstance(n, int)]
    if len(numbers) < len(asked or ()):
        raise ValueError(f"--num_steps {given}: only numbers of steps are measured here: leave adaptive out")
    if recurrence.placement == "none":
        if numbers not in ([], [1]):
            raise ValueError(
                f"--num_steps {given}: the checkpoint has no recurrence, so that every depth computes"
                " the same: leave --num_steps out"
            )
        return [1]
    R = recurrence.num_steps
    return sorted(set(numbers or (1, max(1, R // 2), R, 2 * R, 3 * R, 4 * R)))


class Measured(NamedTuple):
    """All outcomes over the same samples."""

    outcomes: dict[int, Outcome]  # by depth
    correct: dict[int, list[list[float]]]  # by depth, per sample and label


def measure_depths(scorer: Scorer, rows: Sequence[Row], steps: Sequence[int]) -> Measured:
    outcomes = {num_steps: measure(scorer, rows, num_steps) for num_steps in steps}
    correct = {
        num_steps: [
            [float(guess == target) for guess, target in zip(chosen, row.targets, strict=True)]
            for chosen, row in zip(outcome.predictions, rows, strict=True)
        ]
        for num_steps, outcome in outcomes.items()
    }
    return Measured(outcomes, correct)


def summarize(
    name: str, data: TaskData, measured: Measured, scorer: Scorer, config: dict[str, Any]
) -> list[TaskResult]:
    """Results of the answers, of all labels, and of the answers of each problem depth."""
    answers = [item.document.labels[-1][1] for item in data.items]

    def of_answers(
        task: str, members: Sequence[int], problem_depth: int | None = None, **fields: Any
    ) -> TaskResult:
        """Majority knows the test answers: it is the best of all constants."""
        common, _ = Counter(answers[i] for i in members).most_common(1)[0]
        guesses = {"majority": [common] * len(answers), **data.guesses}
        return TaskResult(
            task=task,
            values={f"acc,num_steps={n}": [v[i][-1] for i in members] for n, v in measured.correct.items()},
            totals={
                f"cross_entropy,num_steps={n}": sum(out.losses[i][-1] for i in members) / len(members)
                for n, out in measured.outcomes.items()
            },
            num_documents=len(members),
            baselines={
                guess: mean_score([float(given[i] == answers[i]) for i in members])
                for guess, given in guesses.items()
            },
            config={**config, "problem_depth": problem_depth},
            **fields,
        )

    everything = range(len(answers))
    problem_depths = [item.problem_depth for item in data.items]
    by_depth = [
        of_answers(f"{name}_problem_depth{d}", [i for i in everything if problem_depths[i] == d], d)
        for d in sorted({d for d in problem_depths if d is not None})
    ]
    labels = _of_labels(f"{name}_labels", data, measured, config)
    subtasks = [labels.task, *(result.task for result in by_depth)]
    samples = sample_lines(name, data, measured, scorer)
    return [of_answers(name, everything, subtasks=subtasks, samples=samples), labels, *by_depth]


def _of_labels(task: str, data: TaskData, measured: Measured, config: dict[str, Any]) -> TaskResult:
    """One value per sample, see measures.pooled."""
    labels = [[label for _, label in item.document.labels] for item in data.items]
    counts = Counter(label for row in labels for label in row)
    common, _ = counts.most_common(1)[0]
    return TaskResult(
        task=task,
        values={f"acc,num_steps={n}": pooled(values) for n, values in measured.correct.items()},
        totals={
            f"cross_entropy,num_steps={n}": mean_score(pooled(outcome.losses)).value
            for n, outcome in measured.outcomes.items()
        },
        num_documents=len(labels),
        baselines={"majority": mean_score(pooled([[float(x == common) for x in row] for row in labels]))},
        config={**config, "problem_depth": None, "num_labels": counts.total()},
    )


def sample_lines(name: str, data: TaskData, measured: Measured, scorer: Scorer) -> list[dict[str, Any]]:
    """What --log_samples writes: the answer given at each depth."""
    return [
        {
            "doc_id": item.id,
            "group": name,
            "problem_depth": item.problem_depth,
            "prompt": item.document.text,
            "target": item.document.labels[-1][1],
            "resps": {
                str(n): scorer.tokenizer.decode([outcome.predictions[i][-1]])
                for n, outcome in measured.outcomes.items()
            },
            "acc": {str(n): values[i][-1] for n, values in measured.correct.items()},
        }
        for i, item in enumerate(data.items)
    ]


def facts(
    scorer: Scorer, data: TaskData, rows: Sequence[Row], measured: Measured, seed: int
) -> dict[str, Any]:
    """What is not an accuracy: sizes and loop figures at each depth, and what is measured at the trained one.

    What the model or the task does not have is None.
    """
    config = scorer.model.config
    recurrence = config.recurrence
    looped = recurrence.placement != "none"
    trained = recurrence.num_steps if looped else 1
    adaptive = looped and recurrence.halting.kind != "fixed"
    depths = [float(item.problem_depth) for item in data.items if item.problem_depth is not None]
    length = max(len(row.tokens) for row in rows)
    by_steps = {}
    for n, outcome in measured.outcomes.items():
        ranked = adaptive and len(depths) == len(rows)
        by_steps[n] = {
            "unrolled_parameters": unrolled_parameters(scorer.model, n),
            "flops_per_token": flops_per_token(config, length, n),
            **outcome.figures,
            "answer_steps_mean": mean_score(outcome.answer_steps).value if looped else None,
            "problem_depth_correlation": spearman(outcome.answer_steps, depths) if ranked else None,
        }
    independence = None
    if recurrence.placement == "block":
        ends = path_independence(scorer, rows, trained, seed)
        independence = {
            "agreement": mean_score(pooled(ends.agrees))._asdict(),
            "distance": mean_score(pooled(ends.distance))._asdict(),
        }
    return {
        "placement": recurrence.placement,
        "halting": recurrence.halting.kind if looped else None,
        "trained_steps": trained,
        "parameters": sum(p.numel() for p in scorer.model.parameters()),
        "sequence_length": length,
        "by_steps": by_steps,
        "overthinking_gap": overthinking_gap(measured, 4 * trained) if looped else None,
        "path_independence": independence,
        "time": halting_time(scorer, rows, trained) if adaptive else None,
    }


def overthinking_gap(measured: Measured, last: int) -> dict[str, Any] | None:
    """Best accuracy of all depths minus the accuracy at depth `last`; None without `last`.

    The best is chosen on these very samples, so that the gap is never negative.
    """
    if last not in measured.correct:
        return None
    answers = {n: [row[-1] for row in values] for n, values in measured.correct.items()}
    best = max(answers, key=lambda n: sum(answers[n]))  # of equals the least deep
    gap = mean_score([a - b for a, b in zip(answers[best], answers[last], strict=True)])
    return {"best_steps": best, "last_steps": last, **gap._asdict()}
