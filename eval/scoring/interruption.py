"""Ctrl-C, SIGTERM and a lost terminal end an evaluation with one line that says what is kept."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """One of SIGNALS. Not an Exception: nothing but `interruptible` and clean-up may catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass
class Kept:
    """What `interruptible` says is safe."""

    text: Callable[[], str]


@contextmanager
def interruptible(nothing_kept: str) -> Iterator[Kept]:
    """A block that SIGNALS leave by its clean-up, with one line on stderr and the exit code 128 + the number.

    Signals that the process ignores, as under nohup, stay ignored.

    Args:
        nothing_kept: what the line says until the block has set the `text` of what it gets.
    """
    kept = Kept(lambda: nothing_kept)
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield kept
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, _raise)
    try:
        yield kept
    except Interrupted as stop:
        print(f"error: stopped by {stop}: {kept.text()}", file=sys.stderr)
        sys.exit(128 + stop.number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)
