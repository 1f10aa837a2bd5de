"""Several tasks over one checkpoint, loaded once: one table, one results file.

python eval/run.py --checkpoint runs/NAME/export --tasks gsm8k,logiqa,babi,arc --data DATA_ROOT [--limit N]
"""

import difflib
from functools import partial

from data_pipeline.errors import user_errors
from eval import arc, babi, causal_loop, gsm8k, gsm8k_cot, logiqa
from eval.cli import USER_ERRORS, Task, add_data_flags, evaluate, make_parser

TASKS: dict[str, Task] = {
    "gsm8k": gsm8k.load,
    "gsm8k_cot": gsm8k_cot.load,
    "logiqa": logiqa.load,
    "babi": babi.load,
    "arc": arc.load,
    **{name: partial(arc.load, names=[name]) for name in arc.SETS},
    "causal_loop": causal_loop.load,
}


def select_tasks(names: str) -> dict[str, Task]:
    """The tasks of a comma-separated list. Raises ValueError for an unknown one, with the nearest name."""
    selected = {}
    for name in names.split(","):
        if name not in TASKS:
            nearest = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(TASKS)}"
            raise ValueError(f"there is no task {name!r}: {hint}")
        selected[name] = TASKS[name]
    return selected


def main() -> None:
    parser = make_parser(__doc__)
    add_data_flags(parser)
    parser.add_argument("--tasks", required=True, metavar="A,B,...", help=f"of {', '.join(TASKS)}")
    args = parser.parse_args()
    with user_errors(*USER_ERRORS):
        evaluate(select_tasks(args.tasks), args)


if __name__ == "__main__":
    main()
