"""Samples of a synthetic task as JSON lines, and how far guessing gets on them.

python data_pipeline/generate.py TASK --num_samples N [sizes] [--seed S --split train|test] --out FILE --audit

`generate.py TASK --help` lists the sizes of a task. `python data_pipeline/p_hop.py` and the scripts of the
other older tasks are `generate.py p_hop`.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import Field, asdict, fields
from pathlib import Path
from typing import Any

from common.errors import user_errors
from common.files import replacing
from common.locks import FolderInUseError, FolderLock
from data_pipeline.errors import DataError
from data_pipeline.tasks.registry import TASKS
from data_pipeline.tasks.splits import SPLITS
from data_pipeline.tasks.task import SyntheticTask


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="generate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    for name, task in TASKS.items():
        command = commands.add_parser(name, help=task.about, description=task.about)
        command.add_argument("--num_samples", type=int, required=True, help="number of samples")
        for option in fields(task.options):
            _add_size(command, option)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--split", choices=SPLITS, default="train")
        command.add_argument("--out", type=Path, help="JSONL file to write; without it nothing is written")
        command.add_argument("--audit", action="store_true", help="print how far guessing gets")
    return parser


def _add_size(command: argparse.ArgumentParser, option: "Field[Any]") -> None:
    """An integer is parsed by argparse, a list by `parse_options`."""
    default, form = option.default, ""
    if option.type is not int:
        assert callable(option.default_factory)
        default = ",".join(map(str, option.default_factory()))
        form = "; FIRST-LAST or comma-separated" if option.type == list[int] else "; comma-separated"
    command.add_argument(
        f"--{option.name}",
        type=int if option.type is int else str,
        default=default,
        help=f"{option.metadata['help']}{form} (default: {default})",
    )


def parse_options(task: SyntheticTask[Any], arguments: argparse.Namespace) -> Any:
    """An instance of `task.options`. Raises DataError for a list of numbers that is not one."""
    values = {}
    for option in fields(task.options):
        value = getattr(arguments, option.name)
        if option.type == list[int]:
            value = _numbers(option.name, value)
        elif option.type == list[str]:
            value = value.split(",")
        values[option.name] = value
    return task.options(**values)


def _numbers(name: str, text: str) -> list[int]:
    if match := re.fullmatch(r"([0-9]+)-([0-9]+)", text):
        return list(range(int(match[1]), int(match[2]) + 1))
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[0-9]+", part) for part in parts):
        raise DataError(
            f"--{name} {text!r} is neither FIRST-LAST nor numbers joined by commas: give 1-4 or 1,2,4"
        )
    return [int(part) for part in parts]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends with one line and exit code 2."""
    arguments = make_parser().parse_args(argv)
    task = TASKS[arguments.task]
    with user_errors(DataError, FolderInUseError, OSError):
        if arguments.out is None and not arguments.audit:
            raise DataError("nothing to do: give --out FILE.jsonl, --audit or both")
        options = parse_options(task, arguments)
        samples = list(task.samples(arguments.num_samples, options, arguments.seed, arguments.split))
        if arguments.out is not None:
            _write(arguments.out, "".join(json.dumps(_as_dict(sample)) + "\n" for sample in samples))
            print(f"{arguments.out}: {len(samples)} samples")
        if arguments.audit:
            print(task.audit_text(samples, options))


def _write(path: Path, text: str) -> None:
    """The file is whole or as it was; one process writes it. A link, as /dev/stdout is, stays a link."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_text(text, encoding="utf-8")
        return
    if not path.parent.is_dir():
        raise DataError(f"folder {path.parent} does not exist: create it or fix --out")
    with (
        FolderLock(path.parent, "generate.py", "choose another --out", name=f".{path.name}.lock"),
        replacing(path) as temporary,
    ):
        temporary.write_text(text, encoding="utf-8")


def _as_dict(sample: Any) -> dict[str, Any]:
    """The fields of a named tuple or a dataclass."""
    return sample._asdict() if hasattr(sample, "_asdict") else asdict(sample)


def run_task(name: str) -> None:
    """`generate.py NAME` with the arguments of this process."""
    main([name, *sys.argv[1:]])


if __name__ == "__main__":
    main()
