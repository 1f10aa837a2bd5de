"""The command line that all task scripts share."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from common.errors import user_errors
from data_pipeline.sources.documents import Problem
from eval.scoring.core import Scorer
from eval.scoring.journal import Journal, checkpoint_fingerprint
from eval.scoring.results import (
    TABLE_HEADER,
    Setting,
    TaskResult,
    build_report,
    format_table,
    table_rows,
    write_report,
)
from eval.scoring.training_data import decontamination, read_training_data


@dataclass(frozen=True)
class Options:
    """What a task may be told. `limit` counts problems per data file; None leaves the task's own default."""

    data: Path = Path("data")
    limit: int | None = None
    num_fewshot: int | None = None
    seed: int = 1234
    max_new_tokens: int | None = None
    samples: int = 0  # that vote on each generated answer, beside the greedy one

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


def add_run_flags(parser: Parser) -> None:
    """The flags of the scripts that go through a Scorer: at which depths, in how many processes."""
    parser.add_argument(
        "--num_processes",
        type=positive_integer,
        default=1,
        metavar="N",
        help="processes that share the work, each with a copy of the model (default: 1)",
    )
    parser.add_argument(
        "--depth",
        type=depth_list,
        metavar="1,4,adaptive",
        help="loop steps to test, one or several; adaptive: until the model, or its predictions, settle"
        " (default: as the checkpoint is configured)",
    )


def add_generation_flags(parser: Parser) -> None:
    """The flags of the tasks answered by generation."""
    parser.add_argument(
        "--max_new_tokens",
        type=positive_integer,
        metavar="N",
        help="of a generated answer (default: the task's)",
    )
    parser.add_argument(
        "--samples",
        type=positive_integer,
        default=0,
        metavar="K",
        help="also sample K answers to each problem and let the majority decide (default: greedy only)",
    )


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
        type=shots_list,
        metavar="K",
        help="solved examples in each prompt, one number or several, 0,1,2,4"
        " (default: lm-eval's: gsm8k 5, gsm8k_cot 8, others none)",
    )


def positive_integer(text: str) -> int:
    """An argparse type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"is {value}, at least 1 is needed")
    return value


def shots_list(text: str) -> list[int]:
    """An argparse type: different numbers from 0."""
    return [_integer(part, "a number of examples", 0) for part in _parts(text)]


def depth_list(text: str) -> list[int | str]:
    """An argparse type: different numbers from 1, or `adaptive`."""
    return [
        part if part == "adaptive" else _integer(part, "a number of loop steps or `adaptive`", 1)
        for part in _parts(text)
    ]


def _parts(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    twice = [part for part in parts if parts.count(part) > 1]
    if twice:
        raise argparse.ArgumentTypeError(f"names {twice[0]!r} twice in {text!r}: name it once")
    return parts


def _integer(text: str, what: str, least: int) -> int:
    if not text.isascii() or not text.removeprefix("-").isdecimal():
        raise argparse.ArgumentTypeError(f"has {text!r}, which is not {what}: give for example 1,2,4")
    if int(text) < least:
        raise argparse.ArgumentTypeError(f"is {text}, at least {least} is needed")
    return int(text)


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


def main(task: Task, description: str | None, generates: bool = False) -> None:
    """The whole of a task script: parse, evaluate, report. A user's mistake is one line and exit code 2.

    `generates`: the task is answered by generation.
    """
    parser = make_parser(description)
    add_data_flags(parser)
    add_run_flags(parser)
    if generates:
        add_generation_flags(parser)
    with user_errors(*USER_ERRORS):
        evaluate({"": task}, parser.parse_args())


def evaluate(tasks: dict[str, Task], args: argparse.Namespace) -> None:
    """Reads all data, loads the model once, runs the tasks at all shots and depths, prints the table and
    writes what was asked for.

    Raises ValueError or OSError for a user's mistake.
    """
    if args.log_samples and args.output_path is None:
        raise ValueError("--log_samples needs --output_path, the folder to write them to")
    given = vars(args)
    shots = given.get("num_fewshot") or [None]
    names = {field.name for field in fields(Options)} - {"num_fewshot"}
    options = Options(**{name: value for name, value in given.items() if name in names})
    evaluations = [task(replace(options, num_fewshot=n)) for task in tasks.values() for n in shots]
    training_data = read_training_data(args.checkpoint)
    scorer = Scorer.from_checkpoint(args.checkpoint, args.batch_size, args.num_processes)
    start = time.monotonic()
    try:
        if args.output_path is not None:
            scorer.journal = Journal.open(args.output_path, fingerprint(list(tasks), args))
        results = run_at_depths(scorer, evaluations, args.depth, several_shots=len(shots) > 1)
    finally:
        scorer.close()
    config = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    config |= {"total_evaluation_time_seconds": time.monotonic() - start}
    config |= {"decontamination": decontamination(training_data), "training_data": training_data}
    _report(results, build_report(results, scorer, config), args)
    if scorer.journal is not None:
        scorer.journal.close(finished=True)  # what it holds is written


def fingerprint(tasks: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Of an evaluation's journal. The tasks are in it, so that others may use the folder at the same time, as
    those of a SLURM array do.
    """
    command = [Path(sys.argv[0]).stem, *tasks]
    return checkpoint_fingerprint(args.checkpoint) | {"batch_size": args.batch_size, "command": command}


def run_at_depths(
    scorer: Scorer,
    evaluations: Sequence[Evaluation],
    depths: Sequence[int | str] | None,
    several_shots: bool = False,
) -> list[TaskResult]:
    """The results of all evaluations at each depth, by default the model's own, marked with where they lie.

    Raises ValueError for a depth that the model cannot run at.
    """
    recurrence = scorer.model.config.recurrence
    looped = recurrence.placement != "none"
    own: int | str = "adaptive" if recurrence.halting.kind != "fixed" else recurrence.num_steps
    wanted: Sequence[int | str | None] = depths or [None]
    for depth in depths or ():
        scorer.set_depth(depth)  # all are tried before the first evaluation has run for an hour
    results = []
    for evaluation in evaluations:
        for asked in wanted:
            if asked is not None:
                scorer.set_depth(asked)
            num_steps = scorer.num_steps or recurrence.num_steps
            for result in evaluation(scorer):
                marks = [] if not looped or asked in (None, own) else [f"depth={asked}"]
                if several_shots and result.num_fewshot != result.default_fewshot:
                    marks.append(f"shots={result.num_fewshot}")
                setting = Setting(
                    (own if asked is None else asked) if looped else None,
                    num_steps if looped else None,
                    "@" + ",".join(marks) if marks else "",
                )
                results.append(replace(result, setting=setting))
    return results


def _report(results: Sequence[TaskResult], report: dict[str, Any], args: argparse.Namespace) -> None:
    print(format_table(TABLE_HEADER, table_rows(report)))
    for result in results:
        if result.num_truncated:
            print(
                f"{result.name}: {result.num_truncated} prompts were longer than the model's"
                f" {report['config']['max_length']} positions and were cut from the left"
            )
    print(f"training data, decontamination: {report['config']['decontamination']}")
    if args.output_path is not None:
        print(f"written: {write_report(args.output_path, report, results, args.log_samples)}")
