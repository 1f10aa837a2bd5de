"""Answers after thinking: explicit chain of thought, latent thoughts or none, what they score and cost.

python eval/thoughts.py --checkpoint runs/NAME/export --task causal_loop_v2 --num_samples N
    [--task_options variables=4,statements=6] [--mode cot|thoughts|none] [--output_path DIR]
python eval/thoughts.py --checkpoint runs/NAME/export --task gsm8k|icot|prosqa --data DATA_ROOT [--limit N]

A checkpoint with latent thoughts uses them, another one writes its chain of thought, unless --mode says
otherwise. Latents (--num_latents, --num_iterations, --tolerance), the controls (--replace) and the cache that
R-KV leaves a chain of thought (--kv_budget) can be set here; several numbers give one result each. Next to
the accuracy, by problem depth on causal loops, are forward passes, seconds of a question alone and in a
batch, and the bytes of its cache. An answer is right if it is the reference's up to commas inside numbers.
--samples K also samples K chains of thought, whose answers vote: the first 1, 4, 16, ... and all of them.
"""

import argparse
from typing import Any

from eval.looping.tasks import TASKS as GENERATORS
from eval.looping.tasks import task_options as read_options
from eval.scoring.cli import main, positive_integer, problem_depth_list
from eval.scoring.core import Scorer
from eval.scoring.kv_flags import KV_FLAGS, finite
from eval.scoring.results import TaskResult
from eval.scoring.task import Evaluation, EvaluationTask, Options
from eval.thinking.answers import MODES
from eval.thinking.summary import evaluate_ways, table
from eval.thinking.tasks import GENERATED, TASKS, QuestionSet, generated_questions, published_questions
from eval.thinking.ways import WayFlags

DEFAULTS = "; ".join(
    f"{task}: " + ",".join(f"{name}={value}" for name, value in GENERATORS[task].options.items())
    for task in GENERATED
)


def load(
    options: Options,
    *,
    task: str,
    num_samples: int | None,
    task_options: str,
    problem_depth: list[int] | None,
    **way_flags: Any,
) -> Evaluation:
    """Generates or reads the questions. Raises ValueError for flags of another kind of task."""
    data, sizes = read_questions(options, task, num_samples, task_options, problem_depth)
    config = {"task_options": sizes, "split": "test", "seed": options.seed}

    def evaluation(scorer: Scorer) -> list[TaskResult]:
        return evaluate_ways(scorer, task, data, WayFlags(**way_flags), options, config)

    return evaluation


def read_questions(
    options: Options,
    task: str,
    num_samples: int | None,
    task_options: str,
    problem_depth: list[int] | None,
) -> tuple[QuestionSet, dict[str, int]]:
    """The questions, and the sizes of generated ones. Raises ValueError for flags of another kind of task."""
    generated = task in GENERATED
    for flag, value, fits in (
        ("num_samples", num_samples, generated),
        ("task_options", task_options, generated),
        ("problem_depth", problem_depth and ",".join(map(str, problem_depth)), generated),
        ("limit", options.limit, not generated),
    ):
        if value and not fits:
            raise ValueError(
                f"--{flag} {value} does not go with --task {task}, which"
                f" {'generates its questions' if generated else 'reads them from a file'}: leave it out"
            )
    if not generated:
        return published_questions(task, options.data, options.limit), {}
    if not num_samples:
        raise ValueError(f"--task {task} generates its questions: say how many by --num_samples N")
    sizes = read_options(task, task_options)
    return generated_questions(task, num_samples, options.seed, sizes, problem_depth), sizes


def counts(text: str) -> list[int]:
    """An argparse type: different numbers from 0."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 0 or len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"is {text}, different numbers from 0 are needed: 1,2,4")
    return values


TASK = EvaluationTask(
    "thoughts",
    load,
    generates=True,
    flags={
        "--task": {"required": True, "choices": TASKS, "help": "which task"},
        "--num_samples": {
            "type": positive_integer,
            "metavar": "N",
            "help": f"questions to generate ({', '.join(GENERATED)})",
        },
        "--task_options": {
            "default": "",
            "metavar": "A=1,B=2",
            "help": f"sizes of a generated task (defaults: {DEFAULTS})",
        },
        "--problem_depth": {
            "type": problem_depth_list,
            "metavar": "D,..",
            "help": "only the generated problems of these depths (default: all)",
        },
        "--mode": {"choices": MODES, "help": "default: thoughts where the checkpoint has latents, else cot"},
        "--num_latents": {"type": counts, "metavar": "C,..", "help": "default: the checkpoint's"},
        "--num_iterations": {
            "type": counts,
            "metavar": "T,..",
            "help": "over the latents (default: the checkpoint's)",
        },
        "--tolerance": {
            "type": finite,
            "default": 0.0,
            "metavar": "X",
            "help": "stop where latents change by less than this",
        },
        "--replace": {"choices": ("shuffled", "zeroed"), "help": "control: not the question's own latents"},
        **KV_FLAGS,
    },
    without=("num_fewshot", "num_steps"),
    show=table,
)

if __name__ == "__main__":
    main(TASK, __doc__)
