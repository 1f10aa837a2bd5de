"""Lines of gpu_check.py's table: what a check found, and how it reports it."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from common.errors import error_line

T = TypeVar("T")

# ok, FAILED: held against a limit. measured: a figure without one. n/a: this machine lacks what it needs.
# not run: interrupted.
OK, FAILED, MEASURED, ABSENT, NOT_RUN = "ok", "FAILED", "measured", "n/a", "not run"


class CheckError(Exception):
    """A check could not be carried out: one line."""


@dataclass(frozen=True)
class Row:
    check: str
    what: str
    verdict: str
    result: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What a check is given.

    Args:
        config: YAML whose model is trained at its real size; on a CPU all sizes are tiny.
        work: folder for data and runs.
    """

    check: str
    device: str  # cpu | cuda
    config: str
    ds_config: str
    work: Path

    @property
    def small(self) -> bool:
        return self.device == "cpu"

    @property
    def rows(self) -> Path:
        return rows_file(self.work, self.check)

    def note(self, what: str, verdict: str, result: str, **figures: Any) -> None:
        """Adds a line to the table at once: it stays if the check ends or is interrupted after it."""
        row = Row(self.check, what, verdict, result, figures)
        with self.rows.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")

    def attempt(self, what: str, call: Callable[[], T], case: str = "") -> T | None:
        """What `call` returns. None, with a line, if the model refuses it here or a kernel fails."""
        try:
            return call()
        except ValueError as refusal:  # the model names what it cannot run and why
            self.note(what, ABSENT, error_line(refusal))
        except Exception as failure:  # of a kernel; the others are still tried
            self.note(what, FAILED, case + error_line(failure))
        return None

    def judge(self, what: str, good: bool, result: str, **figures: Any) -> None:
        """A line whose verdict is ok or FAILED."""
        self.note(what, OK if good else FAILED, result, **figures)


def rows_file(work: Path, check: str) -> Path:
    return work / f"{check}.jsonl"
