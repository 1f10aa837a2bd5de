"""What iterating buys: accuracy against test-time depth on the synthetic tasks with labels.

python eval/reasoning.py --checkpoint runs/NAME/export --task p_hop --num_samples N
    [--task_options hops=3,length=24,alphabet=4] [--steps 1,2,4,8] [--output_path DIR]

Needs no data files: the test split is generated, and no text of it is in the training split. At every depth:
accuracy and cross-entropy at the answer and over all labels, by true depth where the task knows it, and how
long and how far the loop ran. At the trained depth: do other starts lead to the same answers (block loops),
and how much time does halting save. Beside them what guessing reaches on the same samples.
"""

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import user_errors
from eval.looping.figures import depth_figure
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
from eval.looping.tables import print_report
from eval.looping.tasks import TASKS, TaskData, task_options
from eval.scoring.cli import USER_ERRORS, make_parser, positive_integer
from eval.scoring.core import Score, Scorer, mean_score
from eval.scoring.results import TaskResult, build_report, write_report
from eval.scoring.training_data import decontamination, read_training_data
from model.counts import flops_per_token


def depths_to_test(model_steps: int, looped: bool, wanted: Sequence[int] | None) -> list[int]:
    """Rising test-time depths: as wanted, else 1, R/2, R, 2R, 3R and 4R of the model's own R.

    Raises ValueError for a depth other than 1 of a model without recurrence.
    """
    if not looped:
        if wanted is not None and list(wanted) != [1]:
            raise ValueError(
                f"--steps {','.join(map(str, wanted))}: the checkpoint has no recurrence, so that every depth"
                " computes the same: leave --steps out"
            )
        return [1]
    R = model_steps
    return sorted(set(wanted or (1, max(1, R // 2), R, 2 * R, 3 * R, 4 * R)))


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


def summarize(name: str, data: TaskData, measured: Measured, scorer: Scorer) -> list[TaskResult]:
    """Results of the answers, of all labels, and of the answers of each true depth."""
    answers = [item.document.labels[-1][1] for item in data.items]

    def of_answers(task: str, members: Sequence[int], **fields: Any) -> TaskResult:
        """Majority knows the test answers: it is the best of all constants."""
        common, _ = Counter(answers[i] for i in members).most_common(1)[0]
        guesses = {"majority": [common] * len(answers), **data.guesses}
        return TaskResult(
            task=task,
            values={f"acc,steps={n}": [v[i][-1] for i in members] for n, v in measured.correct.items()},
            totals={
                f"cross_entropy,steps={n}": sum(out.losses[i][-1] for i in members) / len(members)
                for n, out in measured.outcomes.items()
            },
            num_documents=len(members),
            baselines={
                guess: mean_score([float(given[i] == answers[i]) for i in members])
                for guess, given in guesses.items()
            },
            **fields,
        )

    everything = range(len(answers))
    depths = sorted({item.depth for item in data.items if item.depth is not None})
    by_depth = [
        of_answers(f"{name}_depth{d}", [i for i in everything if data.items[i].depth == d]) for d in depths
    ]
    labels = _of_labels(f"{name}_labels", data, measured)
    subtasks = [labels.task, *(result.task for result in by_depth)]
    samples = sample_lines(name, data, measured, scorer)
    return [of_answers(name, everything, subtasks=subtasks, samples=samples), labels, *by_depth]


def _of_labels(task: str, data: TaskData, measured: Measured) -> TaskResult:
    """One value a sample, see reasoning_measures.pooled."""
    labels = [[label for _, label in item.document.labels] for item in data.items]
    counts = Counter(label for row in labels for label in row)
    common, _ = counts.most_common(1)[0]
    return TaskResult(
        task=task,
        values={f"acc,steps={n}": pooled(values) for n, values in measured.correct.items()},
        totals={
            f"cross_entropy,steps={n}": mean_score(pooled(outcome.losses)).value
            for n, outcome in measured.outcomes.items()
        },
        num_documents=len(labels),
        baselines={"majority": mean_score(pooled([[float(x == common) for x in row] for row in labels]))},
        config={"num_labels": counts.total()},
    )


def sample_lines(name: str, data: TaskData, measured: Measured, scorer: Scorer) -> list[dict[str, Any]]:
    """What --log_samples writes: the answer given at each depth."""
    return [
        {
            "doc_id": item.id,
            "group": name,
            "depth": item.depth,
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
    """All that is no accuracy: sizes and loop figures at each depth, and what is measured at the trained one.

    What the model or the task does not have is None.
    """
    config = scorer.model.config
    recurrence = config.recurrence
    looped = recurrence.placement != "none"
    trained = recurrence.num_steps if looped else 1
    adaptive = looped and recurrence.halting.kind != "fixed"
    depths = [float(item.depth) for item in data.items if item.depth is not None]
    length = max(len(row.tokens) for row in rows)
    by_steps = {}
    for n, outcome in measured.outcomes.items():
        ranked = adaptive and len(depths) == len(rows)
        by_steps[n] = {
            "unrolled_parameters": unrolled_parameters(scorer.model, n),
            "flops_per_token": flops_per_token(config, length, n),
            **outcome.figures,
            "answer_steps_mean": mean_score(outcome.answer_steps).value if looped else None,
            "depth_correlation": spearman(outcome.answer_steps, depths) if ranked else None,
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
    """Best accuracy of all depths less that at depth `last`, of the same answers; None if that is not there.

    The best is chosen on these very samples, so that the gap is never negative.
    """
    if last not in measured.correct:
        return None
    answers = {n: [row[-1] for row in values] for n, values in measured.correct.items()}
    best = max(answers, key=lambda n: sum(answers[n]))  # of equals the least deep
    gap = mean_score([a - b for a, b in zip(answers[best], answers[last], strict=True)])
    return {"best_steps": best, "last_steps": last, **gap._asdict()}


def write_figure(directory: Path, results: Sequence[TaskResult], found: dict[str, Any]) -> Path:
    """Writes <task>_<timestamp>.png, whose path it returns: one line per true depth where there is one."""
    whole = results[0]
    lines: dict[str, list[Score]] = {}
    for result in results:
        label = result.task.removeprefix(f"{whole.task}_").replace("depth", "depth ")
        if not label.startswith("labels"):
            lines["all answers" if result is whole else label] = [
                mean_score(values) for values in result.values.values()
            ]
    figure = depth_figure(list(found["by_steps"]), lines, whole.baselines, found["trained_steps"], whole.task)
    path = directory / f"{whole.task}_{datetime.now().isoformat().replace(':', '-')}.png"
    figure.savefig(path, dpi=110, bbox_inches="tight")
    return path


def evaluate(args: argparse.Namespace) -> None:
    """Generates, measures, prints and writes. Raises ValueError or OSError for a user's mistake."""
    if args.log_samples and args.output_path is None:
        raise ValueError("--log_samples needs --output_path, the folder to write them to")
    options = task_options(args.task, args.task_options)
    training_data = read_training_data(args.checkpoint)
    data = TASKS[args.task].generate(args.num_samples, args.seed, **options)
    scorer = Scorer.from_checkpoint(args.checkpoint, args.batch_size)
    recurrence = scorer.model.config.recurrence
    steps = depths_to_test(recurrence.num_steps, recurrence.placement != "none", args.steps)
    start = time.monotonic()
    rows = encode_rows(args.task, [item.document for item in data.items], scorer)
    measured = measure_depths(scorer, rows, steps)
    # The prefix keeps the files apart from those of eval/causal_loop.py.
    results = summarize(f"reasoning_{args.task}", data, measured, scorer)
    found = facts(scorer, data, rows, measured, args.seed)
    config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    config |= {"task_options": options, "steps": steps, "split": "test"}
    config |= {"total_evaluation_time_seconds": time.monotonic() - start}
    config |= {"decontamination": decontamination(training_data), "training_data": training_data}
    report = build_report(results, scorer, config) | {"reasoning": found}
    print_report(results, found)
    if args.output_path is not None:
        print(f"written: {write_report(args.output_path, report, results, args.log_samples)}")
        print(f"written: {write_figure(args.output_path, results, found)}")


def step_counts(text: str) -> list[int]:
    """An argparse type."""
    return [positive_integer(part) for part in text.split(",")]


def main() -> None:
    """The command line; a user's mistake ends with one line and exit code 2."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--task", required=True, choices=TASKS, help="which task")
    add("--num_samples", type=positive_integer, required=True, metavar="N", help="test samples to generate")
    defaults = "; ".join(
        f"{name}: " + ",".join(f"{option}={value}" for option, value in task.options.items())
        for name, task in TASKS.items()
    )
    add("--task_options", default="", metavar="A=1,B=2", help=f"sizes of the task (defaults: {defaults})")
    add(
        "--steps",
        type=step_counts,
        metavar="1,2,..",
        help="test-time depths (default: 1 and 1/2, 1, 2, 3, 4 times the trained one)",
    )
    args = parser.parse_args()
    with user_errors(*USER_ERRORS):
        evaluate(args)


if __name__ == "__main__":
    main()
