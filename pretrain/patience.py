"""Work of one rank that takes longer than the other ranks' communication waits."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from pretrain import heartbeat

T = TypeVar("T")
PATIENCE = 15.0  # seconds; communication_timeout_minutes is at least 1
BUSY = "busy"


def gather_when_done(
    gather: Callable[[Any], list[Any]], work: Callable[[], T], patience: float = PATIENCE
) -> list[T]:
    """Runs `work`, which must not communicate or raise, on every rank and returns all ranks' results.

    While a rank works, a second thread answers for it every `patience` seconds that it is busy, and the
    others ask again: their time-out counts from the last answer. A rank that is stopped or dead does not
    answer.

    Args:
        gather: every rank's value in the order of ranks, for all ranks together.
    """
    finished, lost = threading.Event(), []

    def answer() -> None:
        try:
            while not finished.wait(patience):
                gather((BUSY, None))
        except Exception as error:  # raised below, in the thread that works
            lost.append(error)

    answering = threading.Thread(target=answer)
    answering.start()
    try:
        result = work()
    finally:
        finished.set()
        answering.join()
    if lost:
        raise lost[0]
    heartbeat.note("wait for the other ranks")
    while True:
        answers = gather(("done", result))
        if all(state != BUSY for state, _ in answers):
            return [value for _, value in answers]
