"""The results files of a folder, in the order in which they were written: each says so itself.

A results file is `results_<timestamp>.json`; the samples file of a task beside it has the same timestamp.
Names hold local time, which a clock that is set back repeats, so that they order nothing: a file's key
`written` holds a number above that of every file that was there, and the time with its zone.
"""

import json
import os
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

PATTERN = "results_*.json"
WRITTEN = "written"


def written_now(folder: Path) -> dict[str, Any]:
    """The value of `written` for the next results file of a folder."""
    last = max((_order(path)[0] for path in folder.glob(PATTERN)), default=0)
    return {"number": last + 1, "at": datetime.now().astimezone().isoformat()}


def results_files(folder: Path) -> list[Path]:
    """The results files of a folder, the newest last; those without a number are older, ordered by name."""
    return sorted(folder.glob(PATTERN), key=_order)


def samples_file(results: Path, name: str) -> Path:
    """The samples file that was written with a results file; `name` is the task's key there."""
    return results.with_name(f"samples_{name}_{_stamp(results)}.jsonl")


def picture_file(results: Path, name: str) -> Path:
    """The picture that was written with a results file."""
    return results.with_name(f"{name}_{_stamp(results)}.png")


def new_results_file(folder: Path) -> Path:
    """A path of the folder that no other process has or gets; its temporary name (files.replacing) exists."""
    moment = datetime.now()
    while True:
        path = folder / f"results_{moment.isoformat(timespec='microseconds').replace(':', '-')}.json"
        moment += timedelta(microseconds=1)
        temporary = path.with_name(f"{path.name}.tmp")
        try:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            continue
        if not path.exists():  # whoever had the temporary name before has the path now
            return path
        temporary.unlink()


def _stamp(results: Path) -> str:
    return results.stem.removeprefix("results_")


def _order(path: Path) -> tuple[int, float, str]:
    """Number, seconds and name; a damaged file has number 0, and its readers say what is wrong."""
    try:
        written = json.loads(path.read_bytes())[WRITTEN]
        number, at = written["number"], datetime.fromisoformat(written["at"]).timestamp()
    except (OSError, ValueError, LookupError, TypeError, RecursionError, OverflowError):
        return 0, 0.0, path.name
    return (number, at, path.name) if type(number) is int else (0, 0.0, path.name)
