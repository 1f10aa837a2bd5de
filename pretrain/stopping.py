"""What ends a run before max_steps: a signal, the stop file, the time limit.

Each rank only notes a request. The trainer sums the notes of all ranks in the exchange that every step makes
anyway, so that all ranks stop after the same step, with a checkpoint.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

STOP_FILE = "STOP"  # in the run's folder; `touch` ends the run
# Launchers and SLURM kill 30 s after SIGTERM: what is not saved by then is lost.
GRACE_SECONDS = 25.0


class StopRequests:
    """This rank's reason to stop, if it has one.

    Args:
        run: the run's folder.
        time_limit_minutes: wall-clock time from construction after which to stop; None: no limit.
        watches_file: whether this rank checks for the stop file; one rank is enough.
    """

    def __init__(self, run: Path, time_limit_minutes: float | None, watches_file: bool) -> None:
        self.file, self.watches_file = run / STOP_FILE, watches_file
        self.deadline = None if time_limit_minutes is None else time.monotonic() + 60 * time_limit_minutes
        self.signal: str | None = None

    def install(self) -> None:
        """Notes SIGTERM and SIGUSR1 from now on; removes the stop file of an earlier run."""
        if self.watches_file:
            self.file.unlink(missing_ok=True)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def reason(self) -> str | None:
        """What requests a stop, as far as this rank knows; None: nothing."""
        if self.signal is not None:
            return self.signal
        if self.watches_file and self.file.exists():
            return f"the file {self.file}"
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return "time_limit_minutes"
        return None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None and number == signal.SIGTERM:
            end = threading.Timer(GRACE_SECONDS, _give_up)
            end.daemon = True
            end.start()
        self.signal = signal.Signals(number).name


def _give_up() -> None:
    """Exits: a rank that waits for a dead one would wait until killed. The newest checkpoint is whole."""
    print(
        f"error: {GRACE_SECONDS:.0f} s after SIGTERM the step and its checkpoint are still unfinished; "
        "run the same command again to resume from the newest checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(128 + signal.SIGTERM)
