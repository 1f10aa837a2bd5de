"""Several tasks over one checkpoint, loaded once: one table, one results file.

python eval/run.py --checkpoint DIR --tasks gsm8k,logiqa,babi,arc --data DATA_ROOT [--limit N]
    [--num_fewshot 0,1,2,4,8 --depth 1,2,4,adaptive --samples K]

Several numbers of examples or depths give one result each, `arc_easy@depth=4,shots=2`; at the model's own
depth and the task's own number of examples it is called `arc_easy`.
"""

import argparse
from functools import partial

from common.errors import user_errors
from common.nearest import nearest
from eval import arc, babi, causal_loop, gsm8k, gsm8k_cot, hendrycks_math, logiqa, perplexity, reclor
from eval.looping import answers
from eval.looping.tasks import TASKS as LABELLED
from eval.scoring.cli import (
    USER_ERRORS,
    Task,
    add_data_flags,
    add_generation_flags,
    add_run_flags,
    evaluate,
    make_parser,
)

TASKS: dict[str, Task] = {
    "gsm8k": gsm8k.load,
    "gsm8k_cot": gsm8k_cot.load,
    "logiqa": logiqa.load,
    "babi": babi.load,
    "arc": arc.load,
    **{name: partial(arc.load, names=[name]) for name in arc.SETS},
    "causal_loop": causal_loop.load,
    **{name: partial(answers.load, task=name) for name in LABELLED},
    "perplexity": perplexity.load,
    "math": hendrycks_math.load,
    "reclor": reclor.load,
}
GENERATING = ("gsm8k", "gsm8k_cot", "babi", "causal_loop", "math")


def select_tasks(names: str) -> dict[str, Task]:
    """The tasks of a comma-separated list. Raises ValueError for an unknown one, with the nearest name, and
    for one that would run twice.
    """
    selected: dict[str, Task] = {}
    for name in names.split(","):
        if name not in TASKS:
            raise ValueError(f"there is no task {name!r}: {nearest(name, TASKS)}")
        if name in selected:
            raise ValueError(f"--tasks {names} has {name} twice: name it once")
        selected[name] = TASKS[name]
    if "arc" in selected and set(arc.SETS) & set(selected):
        raise ValueError(f"--tasks {names}: arc is arc_easy and arc_challenge: name it or them")
    return selected


def check_samples(tasks: dict[str, Task], args: argparse.Namespace) -> None:
    """Raises ValueError for --samples where no task generates."""
    if args.samples and not set(tasks) & set(GENERATING):
        raise ValueError(
            f"--samples {args.samples}: no task of {', '.join(tasks)} generates answers to vote on, as"
            f" {', '.join(GENERATING)} do: leave it out"
        )


def main() -> None:
    parser = make_parser(__doc__)
    add_data_flags(parser)
    add_run_flags(parser)
    add_generation_flags(parser)
    parser.add_argument("--tasks", required=True, metavar="A,B,...", help=f"of {', '.join(TASKS)}")
    args = parser.parse_args()
    with user_errors(*USER_ERRORS):
        tasks = select_tasks(args.tasks)
        check_samples(tasks, args)
        evaluate(tasks, args)


if __name__ == "__main__":
    main()
