"""The command line that all task scripts share."""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from data_pipeline.errors import user_errors
from data_pipeline.sources import Problem
from eval.core import Scorer
from eval.results import TABLE_HEADER, TaskResult, build_report, format_table, table_rows, write_report


@dataclass(frozen=True)
class Options:
    """What a task may be told. `limit` counts problems per data file; None leaves the task's own default."""

    data: Path = Path("data")
    limit: int | None = None
    num_fewshot: int | None = None
    seed: int = 1234
    max_new_tokens: int | None = None

    def shots(self, default: int = 0) -> int:
        """How many exemplars; `default` is the task's number in lm-eval."""
        return default if self.num_fewshot is None else self.num_fewshot


USER_ERRORS = (ValueError, OSError)
Evaluation = Callable[[Scorer], list[TaskResult]]
# A task first reads all its data, so that a user's mistake shows before the first task has run for an hour.
Task = Callable[[Options], Evaluation]


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is the one line `error: ...`, exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def make_parser(description: str | None) -> Parser:
    """The flags of every task script."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="exported folder, runs/NAME/export")
    add(
        "--batch_size",
        type=positive_integer,
        default=16,
        metavar="B",
        help="prompts at a time (default: 16)",
    )
    add(
        "--output_path",
        type=Path,
        metavar="DIR",
        help="folder for results_<timestamp>.json (default: none)",
    )
    add("--log_samples", action="store_true", help="also write samples_<task>_<timestamp>.jsonl there")
    add("--seed", type=int, default=1234, help="of everything drawn at random (default: 1234)")
    return parser


def add_data_flags(parser: Parser) -> None:
    """The flags of the tasks that read published data."""
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        default=Path(os.environ.get("DATA_ROOT", "data")),
        metavar="PATH",
        help="the folder that holds all sets, or this task's file (default: $DATA_ROOT, else data)",
    )
    add("--limit", type=positive_integer, metavar="N", help="only the first N problems of each data file")
    add(
        "--num_fewshot",
        type=int,
        metavar="K",
        help="solved examples in each prompt (default: lm-eval's: gsm8k 5, gsm8k_cot 8, others none)",
    )
    add(
        "--max_new_tokens",
        type=positive_integer,
        metavar="N",
        help="of a generated answer",
    )


def positive_integer(text: str) -> int:
    """An argparse type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"is {value}, at least 1 is needed")
    return value


def first(documents: Sequence[Problem], limit: int | None, path: Path) -> list[Problem]:
    """The first `limit` documents (None: all). Raises ValueError if the file at `path` held none."""
    if not documents:
        raise ValueError(f"{path} holds no problems: get the published file again")
    return list(documents[:limit])


def find_data(data: Path, name: str) -> Path:
    """`data` itself if it is a file, else the file `name` in that folder. Raises ValueError if missing."""
    if data.is_file():
        return data
    path = data / name
    if not path.is_file():
        raise ValueError(f"no data file {path}: --data or DATA_ROOT takes the folder of {name}, or that file")
    return path


def main(task: Task, description: str | None) -> None:
    """The whole of a task script: parse, evaluate, report. A user's mistake is one line and exit code 2."""
    parser = make_parser(description)
    add_data_flags(parser)
    with user_errors(*USER_ERRORS):
        evaluate({"": task}, parser.parse_args())


def evaluate(tasks: dict[str, Task], args: argparse.Namespace) -> None:
    """Reads all data, loads the model once, runs the tasks, prints the table and writes what was asked for.

    Raises ValueError or OSError for a user's mistake.
    """
    if args.log_samples and args.output_path is None:
        raise ValueError("--log_samples needs --output_path, the folder to write them to")
    names = {field.name for field in fields(Options)}
    options = Options(**{name: value for name, value in vars(args).items() if name in names})
    evaluations = [task(options) for task in tasks.values()]
    scorer = Scorer.from_checkpoint(args.checkpoint, args.batch_size)
    start = time.monotonic()
    results = [result for evaluation in evaluations for result in evaluation(scorer)]
    config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    config |= {"total_evaluation_time_seconds": time.monotonic() - start}
    _report(results, build_report(results, scorer, config), args)


def _report(results: Sequence[TaskResult], report: dict[str, Any], args: argparse.Namespace) -> None:
    print(format_table(TABLE_HEADER, table_rows(report)))
    for result in results:
        if result.num_truncated:
            print(
                f"{result.task}: {result.num_truncated} prompts were longer than the model's"
                f" {report['config']['max_length']} positions and were cut from the left"
            )
    if args.output_path is not None:
        print(f"written: {write_report(args.output_path, report, results, args.log_samples)}")
