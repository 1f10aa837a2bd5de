"""What ends a run before max_steps: a signal, the end of its launcher or of what reads its output, the stop
file, the time limit.

Each rank only notes a request. The trainer sums the notes of all ranks in the exchange that every step makes
anyway, so that all ranks stop after the same step, with a checkpoint. Before the first step there is nothing
to save, and the process ends at once.

A thread notices signals: a rank that waits inside torch for another one runs no Python handler.
"""

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, cast

from pretrain import checkpoint
from pretrain.launch import launchers

STOP_FILE = "STOP"  # in the run's folder; `touch` ends the run
# Launchers and SLURM kill 30 s after SIGTERM: what is not saved by then is lost. After SIGINT, the deepspeed
# launcher sends SIGTERM.
URGENT, GRACE_SECONDS = (signal.SIGTERM, signal.SIGINT), 25.0
PATIENT = (signal.SIGUSR1, signal.SIGHUP)
POLL_SECONDS = 1.0  # between two looks at the launchers


class StopRequests:
    """This rank's reason to stop, if it has one.

    Args:
        rank: only rank 0 watches the stop file, and prints.
    """

    def __init__(self, rank: int) -> None:
        self.first, self.started, self.launchers = rank == 0, time.monotonic(), launchers()
        self.cause: str | None = None
        self.run: Path | None = None
        self.deadline: float | None = None  # of time_limit_minutes
        self.give_up: float | None = None  # when an urgent signal leaves no more time
        self.stepping = False

    def install(self) -> None:
        """Notes signals and the end of a launcher from now on. Ignored signals stay so, as under nohup."""
        woken, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        self._handled = [
            number for number in (*URGENT, *PATIENT) if signal.getsignal(number) is not signal.SIG_IGN
        ]
        for number in self._handled:
            signal.signal(number, lambda *_: None)  # the thread is woken before
        os.register_at_fork(
            before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, self._handled),
            after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, self._handled),
            after_in_child=self._uninstall,
        )
        for name in ("stdout", "stderr"):
            setattr(sys, name, cast(TextIO, _Output(getattr(sys, name), self._note_lost_output)))
        self._stderr = sys.stderr  # a conversion redirects sys.stderr for a while
        threading.Thread(target=self._watch, args=(woken,), daemon=True).start()

    def _uninstall(self) -> None:
        """A forked process shares the socket, and must end by a signal of its own."""
        signal.set_wakeup_fd(-1)
        for number in self._handled:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._handled)  # what came since the fork arrives now

    def begin(self, run: Path, time_limit_minutes: float | None) -> None:
        """Also watches the run's stop file and its time limit, in minutes since construction."""
        self.run = run
        self.deadline = None if time_limit_minutes is None else self.started + 60 * time_limit_minutes

    def reason(self) -> str | None:
        """What requests a stop, as far as this rank knows; None: nothing."""
        if self.cause is not None:
            return self.cause
        if self.first and self.run is not None and (self.run / STOP_FILE).exists():
            return f"the file {self.run / STOP_FILE}"
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return "time_limit_minutes"
        return None

    def done(self) -> None:
        """Removes the stop file when the run has stopped, and not before: no request is lost."""
        if self.first and self.run is not None:
            (self.run / STOP_FILE).unlink(missing_ok=True)

    def _watch(self, woken: socket.socket) -> None:
        while True:
            if select.select([woken], [], [], POLL_SECONDS)[0]:
                for number in woken.recv(64):
                    self._note_signal(signal.Signals(number))
            if not all(launcher.runs() for launcher in self.launchers):
                self.launchers = []
                self._note("the end of its launcher", code=1)
            if self.give_up is not None and time.monotonic() >= self.give_up:
                self._leave(
                    f"error: {GRACE_SECONDS:.0f} s after {self.cause} the step and its checkpoint are still "
                    "unfinished",
                    128 + signal.SIGTERM,
                )

    def _note_signal(self, number: signal.Signals) -> None:
        if number not in self._handled:
            return
        if number in URGENT:
            if self.give_up is None:
                self.give_up = time.monotonic() + GRACE_SECONDS
            self._note(number.name, code=128 + number)
        elif self.cause is None:
            self.cause = number.name

    def _note_lost_output(self) -> None:
        self.cause = self.cause or "the loss of its output"

    def _note(self, cause: str, code: int) -> None:
        """A cause that does not wait for the first step."""
        if not self.stepping:
            self._leave(f"stopped before the first step by {cause}", code)
        self.cause = cause

    def _safe(self) -> str:
        folder = None if self.run is None else checkpoint.newest(self.run, part=checkpoint.NONE)[0]
        if folder is None:
            return "no checkpoint was written; the same command starts again"
        return f"{folder} is whole; the same command continues from there"

    def _leave(self, what: str, code: int) -> None:
        """Ends the process: a rank that waits for a dead one would wait until killed."""
        try:
            if self.first:
                print(f"{what}; {self._safe()}", file=self._stderr, flush=True)
        finally:
            os._exit(code)


class _Output:
    """Standard output or error of a rank that does not fail when nobody reads it any more.

    The end of a launcher, a terminal, `tee` or `head` meets the next line that is printed, perhaps before the
    checkpoint. What cannot be written is dropped.
    """

    def __init__(self, stream: TextIO, lost: Callable[[], None]) -> None:
        self._stream, self._lost = stream, lost

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        """From now on, and with what the stream still holds."""
        self._lost()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
