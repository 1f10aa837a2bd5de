"""Several tasks over one checkpoint, loaded once: one table, one results file.

python eval/run.py --checkpoint DIR --tasks gsm8k,logiqa,babi,arc --data DATA_ROOT [--limit N]
    [--num_fewshot 0,1,2,4,8 --num_steps 1,2,4,adaptive --samples K]

Several numbers of examples or loop steps give one result each, `arc_easy@num_steps=4,shots=2`; at the model's
own depth and the task's own number of examples it is called `arc_easy`.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

from common.errors import user_errors
from common.nearest import nearest
from eval.looping.answers import EVALUATION_TASKS
from eval.scoring.cli import USER_ERRORS, evaluate, make_parser, show_any_text
from eval.scoring.task import EvaluationTask

# Scripts of this folder that are not a task of this command; the last two must be told which of their own.
OTHERS = {"__init__", "run", "report", "lm_eval_adapter", "reasoning", "thoughts"}


def find_tasks() -> dict[str, EvaluationTask]:
    """By name: the labelled synthetic tasks, what the other scripts here export as TASK, and its parts."""
    found = dict(EVALUATION_TASKS)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem in OTHERS:
            continue
        task: EvaluationTask = import_module(f"eval.{path.stem}").TASK
        assert found.get(task.name, task) is task, f"two tasks are called {task.name}"
        found[task.name] = task
        for part in task.sets:
            found[part] = replace(task, name=part, load=partial(task.load, names=[part]), sets=())
    return found


TASKS = find_tasks()
GENERATING = tuple(name for name, task in TASKS.items() if task.generates)


def select_tasks(names: str) -> list[EvaluationTask]:
    """The tasks of a comma-separated list. Raises ValueError for an unknown one, with the nearest name, and
    for one that would run twice.
    """
    selected: dict[str, EvaluationTask] = {}
    for name in names.split(","):
        if name not in TASKS:
            raise ValueError(f"there is no task {name!r}: {nearest(name, TASKS)}")
        if name in selected:
            raise ValueError(f"--tasks {names} has {name} twice: name it once")
        selected[name] = TASKS[name]
    for name, task in selected.items():
        if set(task.sets) & set(selected):
            raise ValueError(f"--tasks {names}: {name} is {' and '.join(task.sets)}: name it or them")
    return list(selected.values())


def check_samples(tasks: Sequence[EvaluationTask], args: argparse.Namespace) -> None:
    """Raises ValueError for --samples where no task generates."""
    if args.samples and not any(task.generates for task in tasks):
        raise ValueError(
            f"--samples {args.samples}: no task of {', '.join(task.name for task in tasks)} generates answers"
            f" to vote on, as {', '.join(GENERATING)} do: leave it out"
        )


def main() -> None:
    """The command line; a user's mistake is one line and exit code 2."""
    parser = make_parser(__doc__)
    parser.add_argument("--tasks", required=True, metavar="A,B,...", help=f"of {', '.join(TASKS)}")
    args = parser.parse_args()
    show_any_text()
    with user_errors(*USER_ERRORS):
        tasks = select_tasks(args.tasks)
        check_samples(tasks, args)
        evaluate(tasks, args)


if __name__ == "__main__":
    main()
