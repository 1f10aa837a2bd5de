"""What every rank did last, in a file each, and a line that names the rank that the others wait for.

`heartbeats/rank-N` in the run's folder has three lines of fixed width, each overwritten in place by one
write: the last action of training, that of the thread that writes checkpoints, and a count that rises while
the process runs at all. Nothing is synced, and nothing is read from the device: on a GPU an action is what
the host has queued. An orderly end removes the files; those of a killed run stay until the next start.

All ranks do the same actions in the same order, so the rank that has done the fewest is the one that the
others wait for. Durations are measured by the reader: nodes need not agree on the time.
"""

import atexit
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import json_object

FOLDER, WIDTH = "heartbeats", 160
TRAINING, SAVING, ALIVE = range(3)  # the lines of a file
LOOKS = 10  # per limit
IDLE = "idle"  # what the thread that writes checkpoints does between two
_thread = threading.local()  # its `line`: SAVING in the thread that writes checkpoints
_own: "Heartbeat | None" = None


def note(action: str, step: int | None = None) -> None:
    """Says what this thread of the rank begins now; does nothing before `start`.

    Args:
        step: optimizer step that it belongs to; None: that of the action before.
    """
    if _own is not None:
        _own.note(getattr(_thread, "line", TRAINING), action, step)


def saves_checkpoints() -> None:
    """Gives the calling thread's actions the line of their own, beside those of training."""
    _thread.line = SAVING


def clear(run: Path) -> None:
    """Removes what a killed run left; before any rank starts."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)


def start(run: Path, rank: int, world_size: int, limit: float, say: Callable[[str], None]) -> None:
    """Writes this rank's file from now on, and watches the others' until the process ends.

    Args:
        limit: seconds without progress after which `say` gets a line; on one rank only.
    """
    global _own
    _own = Heartbeat(run / FOLDER, rank)
    if world_size > 1:
        watching = threading.Thread(target=_watch, args=(_own, world_size, limit, say), daemon=True)
        watching.start()
    atexit.register(stop)


def stop() -> None:
    """Removes this rank's file, and the folder after the last one."""
    global _own
    if _own is not None:
        _own.close()
        _own = None


class Heartbeat:
    """One rank's file. No method raises: a full or dead disk is no reason to end a run."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank, self.path = folder, rank, path_of(folder, rank)
        self.counts, self.steps, self.ended = [0, 0, 0], [0, 0, 0], threading.Event()
        self.file: int | None = None
        self.lock = threading.Lock()  # a closed file's number may soon be another file's
        with suppress(OSError):
            folder.mkdir(exist_ok=True)
            self.file = os.open(self.path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)

    def note(self, line: int, action: str, step: int | None = None) -> None:
        self.counts[line] += 1
        if step is not None:
            self.steps[line] = step
        # JSON by hand, several times as fast: an action is a few plain words.
        text = (
            f'{{"count": {self.counts[line]}, "step": {self.steps[line]}, "action": "{action}", '
            f'"time": {time.time():.3f}}}'
        )[: WIDTH - 1].ljust(WIDTH - 1) + "\n"
        with self.lock, suppress(OSError):
            if self.file is not None:
                os.pwrite(self.file, text.encode(), line * WIDTH)

    def close(self) -> None:
        self.ended.set()
        with self.lock, suppress(OSError):
            file, self.file = self.file, None
            if file is not None:
                os.close(file)
            self.path.unlink(missing_ok=True)
            self.folder.rmdir()  # fails while other ranks have files


def path_of(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}"


def read(path: Path) -> list[dict[str, Any] | None]:
    """The three lines; None for one that is not there, or half written at this moment."""
    try:
        text = path.read_bytes()
    except OSError:
        text = b""
    return [json_object(text[line * WIDTH : (line + 1) * WIDTH].strip(b"\0\n ")) for line in range(3)]


@dataclass
class _Seen:
    """A rank as its file last showed it."""

    lines: list[dict[str, Any]]
    moved: float  # when it last did something, by the watcher's clock
    alive: float  # when its process last ran

    def progress(self) -> tuple[int, int]:
        return self.lines[TRAINING].get("count", 0), self.lines[SAVING].get("count", 0)

    def action(self) -> str:
        """What it did last, in training and beside it."""
        training, saving = (
            f'"{line.get("action", IDLE)}" in step {line.get("step", 0)}'
            for line in (self.lines[TRAINING], self.lines[SAVING])
        )
        return training if saving.startswith(f'"{IDLE}"') else f"{training}, and {saving}"


class Watcher:
    """Finds the rank that the others wait for.

    Rank 0 looks at all files and the others only at rank 0's, since 512 ranks that read 512 files each would
    be a load. If rank 0 does not run, the lowest rank that does takes its place.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, limit: float, now: float) -> None:
        self.folder, self.rank, self.world_size, self.limit = folder, rank, world_size, limit
        self.seen: dict[int, _Seen] = {}
        self.told, self.looked = False, now
        self._observe(range(world_size) if rank == 0 else [0], now)

    def look(self, now: float) -> str | None:
        """The line to print, once per standstill.

        Args:
            now: in seconds, of a clock that never goes back.
        """
        slept, self.looked = now - self.looked > self.limit, now  # this process was stopped itself
        for rank, seen in self.seen.items():
            if slept:
                seen.moved = seen.alive = now
            self._update(seen, read(path_of(self.folder, rank)), now)
        if self.rank > 0:
            if self._runs(0, now):
                return None
            self._observe((r for r in range(self.world_size) if r not in self.seen), now)
        still = now - max(seen.moved for seen in self.seen.values())
        if still < self.limit:
            self.told = False
            return None
        if self.told or any(self._runs(rank, now) for rank in range(self.rank)):
            return None
        self.told = True
        return self._line(now)

    def _observe(self, ranks: Iterable[int], now: float) -> None:
        for rank in ranks:
            lines = read(path_of(self.folder, rank))
            self.seen[rank] = _Seen([line or {} for line in lines], now, now)

    def _update(self, seen: _Seen, lines: list[dict[str, Any] | None], now: float) -> None:
        for number, line in enumerate(lines):
            if line is None or line.get("count") == seen.lines[number].get("count"):
                continue
            seen.lines[number] = line
            if number == ALIVE:
                seen.alive = now
            else:
                seen.moved = now

    def _runs(self, rank: int, now: float) -> bool:
        return now - self.seen[rank].alive < self.limit

    def _line(self, now: float) -> str:
        fewest = min(seen.progress() for seen in self.seen.values())
        late = [rank for rank, seen in sorted(self.seen.items()) if seen.progress() == fewest]
        waiting = [rank for rank in sorted(self.seen) if rank not in late]
        first = self.seen[late[0]]
        since = f"{now - first.moved:.0f} s ago"
        if not waiting:
            return (
                f"warning: none of the {len(late)} ranks moves; their last action, {since}, was "
                f"{first.action()}: a device, the network or a disk hangs, or needs longer than usual"
            )
        stopped = [rank for rank in late if not self._runs(rank, now)]
        state = f" ({_numbers(stopped)}: stopped, dead or cut off)" if stopped else ""
        return (
            f"warning: {len(waiting)} of {self.world_size} ranks wait for {_numbers(late)}{state}, whose "
            f"last action, {since}, was {first.action()}; theirs is {self.seen[waiting[0]].action()}"
        )


def _numbers(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _watch(own: Heartbeat, world_size: int, limit: float, say: Callable[[str], None]) -> None:
    watcher = Watcher(own.folder, own.rank, world_size, limit, time.monotonic())
    while not own.ended.wait(limit / LOOKS):
        own.note(ALIVE, "runs")
        line = watcher.look(time.monotonic())
        if line is not None:
            say(line)
