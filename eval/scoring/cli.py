"""The one command line: shared flags, then evaluate, print and write. A script adds only flags of its own."""

import argparse
import io
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from common.errors import user_errors
from eval.scoring.core import Scorer
from eval.scoring.interruption import Kept, interruptible
from eval.scoring.journal import Journal, checkpoint_fingerprint
from eval.scoring.results import Setting, TaskResult, build_report, results_table, write_report
from eval.scoring.task import Evaluation, EvaluationTask, Options
from eval.scoring.training_data import decontamination, read_training_data

USER_ERRORS = (ValueError, OSError)
GENERATION = ("max_new_tokens", "samples")  # flags of tasks that generate


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is the one line `error: ...`, exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def show_any_text() -> None:
    """Lets print() write names that are not text, such as a folder's bytes in another encoding."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


# ---- the flags


def make_parser(description: str | None, task: EvaluationTask | None = None) -> Parser:
    """The flags of a task's script; without a task the flags of all tasks."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    left_out: set[str] = set()
    if task is not None:
        left_out = {*task.without, *(() if task.generates else GENERATION)}
    for flag, how in shared_flags().items():
        if how.get("dest", _name(flag)) not in left_out:
            parser.add_argument(flag, **how)
    for flag, own in {} if task is None else task.flags.items():
        parser.add_argument(flag, **own)
    return parser


def shared_flags() -> dict[str, dict[str, Any]]:
    """Every flag that means the same to all tasks, with argparse's keywords."""
    hidden_alias = {
        "dest": "num_steps",
        "type": num_steps_list,
        "default": argparse.SUPPRESS,
        "help": argparse.SUPPRESS,
    }
    return {
        "--checkpoint": {
            "type": Path,
            "required": True,
            "metavar": "DIR",
            "help": "exported folder, runs/NAME/export",
        },
        "--data": {
            "type": Path,
            "default": Path(os.environ.get("DATA_ROOT", "data")),
            "metavar": "PATH",
            "help": "the folder that holds all sets, or this task's file (default: $DATA_ROOT, else data)",
        },
        "--limit": {
            "type": positive_integer,
            "metavar": "N",
            "help": "only the first N problems of each data file",
        },
        "--num_fewshot": {
            "type": shots_list,
            "metavar": "K",
            "help": "solved examples in each prompt, one number or several: 0,1,2,4"
            " (default: lm-eval's: gsm8k 5, gsm8k_cot 8, others none)",
        },
        "--num_steps": {
            "type": num_steps_list,
            "metavar": "1,4,adaptive",
            "help": "loop steps to test, one number or several; adaptive: until the model, or its"
            " predictions, settle (default: as the checkpoint is configured)",
        },
        "--depth": hidden_alias,
        "--steps": hidden_alias,
        "--max_new_tokens": {
            "type": positive_integer,
            "metavar": "N",
            "help": "of a generated answer (default: the task's)",
        },
        "--samples": {
            "type": positive_integer,
            "default": 0,
            "metavar": "K",
            "help": "also sample K answers to each problem and let the majority decide (default: only"
            " the greedy one)",
        },
        "--batch_size": {
            "type": positive_integer,
            "default": 16,
            "metavar": "B",
            "help": "prompts at a time (default: 16)",
        },
        "--num_processes": {
            "type": positive_integer,
            "default": 1,
            "metavar": "N",
            "help": "processes that share the work, each with a copy of the model (default: 1)",
        },
        "--output_path": {
            "type": Path,
            "metavar": "DIR",
            "help": "folder for results_<timestamp>.json; an interrupted call resumes from it (default:"
            " none)",
        },
        "--log_samples": {
            "action": "store_true",
            "help": "also write samples_<task>_<timestamp>.jsonl there",
        },
        "--trust_remote_code": {
            "action": "store_true",
            "help": "run the Python code of a Hugging Face folder that brings its own (default: refuse it)",
        },
        "--seed": {"type": int, "default": 1234, "help": "of everything drawn at random (default: 1234)"},
    }


def positive_integer(text: str) -> int:
    """An argparse type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"is {value}, at least 1 is needed")
    return value


def problem_depth_list(text: str) -> list[int]:
    """An argparse type: different numbers from 1."""
    return [_integer(part, "a depth of problems", 1) for part in _parts(text)]


def shots_list(text: str) -> list[int]:
    """An argparse type: different numbers from 0."""
    return [_integer(part, "a number of examples", 0) for part in _parts(text)]


def num_steps_list(text: str) -> list[int | str]:
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


def _name(flag: str) -> str:
    return flag.removeprefix("--")


# ---- a call


def main(task: EvaluationTask, description: str | None) -> None:
    """A task's script: parse, evaluate, report. A user's mistake is one line and exit code 2."""
    args = make_parser(description, task).parse_args()
    show_any_text()
    with user_errors(*USER_ERRORS):
        evaluate([task], args)


def evaluate(tasks: Sequence[EvaluationTask], args: argparse.Namespace) -> None:
    """Reads all data, loads the model once, runs the tasks at all shots and depths, prints and writes.

    Raises ValueError or OSError for a user's mistake. A signal ends it with one line, see interruption.py.
    """
    if args.log_samples and args.output_path is None:
        raise ValueError("--log_samples needs --output_path, the folder to write them to")
    with interruptible("nothing is kept; with --output_path it can be resumed") as kept:
        _evaluate(tasks, args, kept)


def _evaluate(tasks: Sequence[EvaluationTask], args: argparse.Namespace, kept: Kept) -> None:
    given = vars(args)
    shots = given.get("num_fewshot") or [None]
    shared = {field.name for field in fields(Options)} - {"num_fewshot"}
    options = Options(**{name: value for name, value in given.items() if name in shared})
    loaded = [
        (task, task.load(replace(options, num_fewshot=n), **_own_flags(task, given)))
        for task in tasks
        for n in shots
    ]
    training_data = read_training_data(args.checkpoint)
    scorer = Scorer.from_checkpoint(
        args.checkpoint, args.batch_size, args.num_processes, args.trust_remote_code
    )
    start = time.monotonic()
    finished = False
    try:
        if args.output_path is not None:
            journal = Journal.open(args.output_path, fingerprint(tasks, args, scorer))
            scorer.journal = journal
            kept.text = lambda: journal.kept
        results = run_at_depths(scorer, loaded, options.num_steps, several_shots=len(shots) > 1)
        config = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
        config["num_steps_tested"] = config.pop("num_steps", None)  # `num_steps` is the checkpoint's own
        config |= {"total_evaluation_time_seconds": time.monotonic() - start}
        config |= {"decontamination": decontamination(training_data), "training_data": training_data}
        _report(tasks, results, build_report(results, scorer, config), args)
        finished = True  # what the journal holds is written
    except OSError as error:  # a full disk, a worker that died
        if scorer.journal is None:
            raise
        raise _saying(error, kept.text()) from error
    finally:
        scorer.close()
        if scorer.journal is not None:
            scorer.journal.close(finished)


def _saying(error: OSError, kept: str) -> OSError:
    """The error with what is kept, unless it says so itself."""
    told = error.strerror or str(error)
    told = told if kept in told else f"{told}; {kept}"
    return OSError(error.errno, told, error.filename) if error.errno else OSError(told)


def _own_flags(task: EvaluationTask, given: dict[str, Any]) -> dict[str, Any]:
    """The values of the task's own flags, as far as the command line has them: eval/run.py has none."""
    return {_name(flag): given[_name(flag)] for flag in task.flags if _name(flag) in given}


def fingerprint(tasks: Sequence[EvaluationTask], args: argparse.Namespace, scorer: Scorer) -> dict[str, Any]:
    """What the journal of an evaluation must match to be resumed: all that an answer's last bit depends on.

    Tasks and own flags are in it, so that other calls may use the folder at the same time, as the jobs of a
    SLURM array do.
    """
    names = [[task.name, _own_flags(task, vars(args))] for task in tasks]
    command = [Path(sys.argv[0]).stem, *names]
    computed_by = [*(version(name) for name in ("zeromodel", "torch")), scorer.device.type]
    own = {"batch_size": args.batch_size, "command": command, "computed_by": computed_by}
    return checkpoint_fingerprint(args.checkpoint) | own


def run_at_depths(
    scorer: Scorer,
    loaded: Sequence[tuple[EvaluationTask, Evaluation]],
    num_steps: Sequence[int | str] | None,
    several_shots: bool = False,
) -> list[TaskResult]:
    """The results of all evaluations at each loop depth, by default the model's own, marked with it.

    Raises ValueError for a depth that the model cannot run at.
    """
    recurrence = scorer.model.config.recurrence
    looped = recurrence.placement != "none"
    own: int | str = "adaptive" if recurrence.halting.kind != "fixed" else recurrence.num_steps
    wanted: Sequence[int | str | None] = num_steps or [None]
    if not all(task.sweeps_num_steps for task, _ in loaded):
        for depth in num_steps or ():
            scorer.set_depth(depth)  # all are tried before the first evaluation has run for an hour
    results = []
    for task, evaluation in loaded:
        if task.sweeps_num_steps:
            results += evaluation(scorer)
            continue
        for asked in wanted:
            if asked is not None:
                scorer.set_depth(asked)
            for result in evaluation(scorer):
                marks = [] if not looped or asked in (None, own) else [f"num_steps={asked}"]
                if several_shots and result.num_fewshot != result.default_fewshot:
                    marks.append(f"shots={result.num_fewshot}")
                setting = Setting(
                    (own if asked is None else asked) if looped else None,
                    "@" + ",".join(marks) if marks else "",
                )
                results.append(replace(result, setting=setting))
    return results


def _report(
    tasks: Sequence[EvaluationTask],
    results: Sequence[TaskResult],
    report: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    """Prints and writes. A task that is alone is shown and drawn its own way."""
    show, draw = (tasks[0].show, tasks[0].draw) if len(tasks) == 1 else (None, None)
    print(show(results) if show else results_table(report))
    for result in results:
        if result.num_truncated:
            print(
                f"{result.name}: {result.num_truncated} prompts were longer than the model's"
                f" {report['config']['max_length']} positions and were cut from the left"
            )
    print(f"training data, decontamination: {report['config']['decontamination']}")
    if args.output_path is not None:
        figure = draw(results) if draw else None
        for path in write_report(args.output_path, report, results, args.log_samples, figure):
            print(f"written: {path}")
