"""Writes a run's checkpoints, each whole or absent, and deletes old ones.

Training pauses while the state is copied to memory (on CUDA it only waits before the next optimizer step); a
background thread on each rank writes the files.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save as to_safetensors

from common.errors import error_line
from common.files import write_file, writing_failed
from pretrain import heartbeat
from pretrain.checkpoint import (
    BUFFERS,
    CHECKPOINTS,
    LATEST,
    MANIFEST,
    STATE,
    Checkpointed,
    CheckpointError,
    TrainingState,
    seal,
    steps,
    together,
)

REMOVING = "removing-"  # before the name of a checkpoint that is being deleted


class Saver:
    """Writes the checkpoints of a run in the background, one at a time; all ranks call it together.

    Args:
        run: the run's folder.
        keep_last: newest checkpoints to keep; older ones are deleted once a new one is whole.
        keep_every: also keep checkpoints whose step is a multiple of this; 0: none.
        warn: takes a line about something that does not end the run, on any thread.
    """

    def __init__(
        self,
        engine: Checkpointed,
        run: Path,
        keep_last: int,
        keep_every: int,
        rank: int,
        warn: Callable[[str], None] = print,
    ) -> None:
        self.engine, self.run, self.rank, self.warn = engine, run, rank, warn
        self.keep_last, self.keep_every = keep_last, keep_every
        # Python waits for the thread at exit, whatever ended the run, so a save that has begun finishes.
        self.thread = ThreadPoolExecutor(1, initializer=heartbeat.saves_checkpoints)
        self.pending: Future[None] | None = None
        self.in_use: int | None = None  # step of a checkpoint being read, which is kept as well

    def save(self, state: TrainingState, before: Callable[[], None] = lambda: None) -> None:
        """Copies the training state and returns; the checkpoint is whole some time later.

        Args:
            before: puts on disk, on rank 0, what the checkpoint must not be without; may raise OSError.

        Raises:
            CheckpointError: the previous checkpoint could not be written.
        """
        self.wait()
        files = self.engine.snapshot()
        if self.rank == 0:
            buffers = {
                name: b.detach().cpu().contiguous() for name, b in self.engine.checkpoint_buffers().items()
            }
            files[BUFFERS] = to_safetensors(buffers)
            files[STATE] = json.dumps(asdict(state), indent=2).encode()
        self.pending = self.thread.submit(self._write, state.step, files, before)

    def wait(self) -> None:
        """Returns when the last checkpoint is whole.

        Raises:
            CheckpointError: it could not be written, on some rank.
        """
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def idle(self) -> bool:
        """Whether the last checkpoint is whole."""
        return self.pending is None or (self.pending.done() and self.pending.exception() is None)

    def failed(self) -> bool:
        """Whether this rank knows that the last checkpoint could not be written; `wait` says why."""
        return self.pending is not None and self.pending.done() and self.pending.exception() is not None

    def _write(self, step: int, files: dict[str, Any], before: Callable[[], None]) -> None:
        heartbeat.note("write of the checkpoint", step)
        self.engine.copied()
        folder = self.run / CHECKPOINTS / f"step-{step}"
        first, created = self.rank == 0, False
        try:
            together(self.engine, lambda: before() if first else None)
            together(self.engine, lambda: _recreate(folder) if first else None)
            created = True
            written = together(
                self.engine, lambda: {name: _write_digested(folder / name, files[name]) for name in files}
            )
            manifest = {name: entry for part in written for name, entry in part.items()}
            together(self.engine, lambda: seal(folder, manifest) if first else None)
        except CheckpointError as error:
            if first and created:
                shutil.rmtree(folder, ignore_errors=True)  # a partial checkpoint only wastes disk space
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written: {error}; older ones are untouched: "
                "free disk space or make the folder writable, then run the same command again"
            ) from error
        if first:  # the checkpoint is whole: nothing from here on ends the run
            for line in _name_latest(folder):
                self.warn(f"warning: {line}")
            self.rotate(step)
        heartbeat.note(heartbeat.IDLE)

    def rotate(self, step: int) -> None:
        """Deletes what is not kept beside the whole checkpoint of that step, such as a killed run's rest."""
        for line in rotate(self.run, step, self.keep_last, self.keep_every, self.in_use):
            self.warn(f"warning: {line}")


def _recreate(folder: Path) -> None:
    """An empty folder, instead of an earlier attempt at this step or one from before a resume."""
    try:
        if folder.is_symlink():
            folder.unlink()  # what it links to is not ours
        elif folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
            if folder.exists():  # a file in it cannot be deleted; rotate warns
                folder.rename(folder.with_name(f"{REMOVING}{folder.name}"))
        folder.mkdir(parents=True)
    except OSError as error:
        raise writing_failed(error, folder, "nothing was written") from error


class _Digesting:
    """A file that hashes what is written to it.

    An error is kept until the end: torch's writer crashes on one in the middle.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self.bytes = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
            self.sha256.update(data)
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        """torch calls this; _write_digested flushes at the end."""


def _write_digested(path: Path, content: Any) -> dict[str, Any]:
    """Writes bytes as they are and anything else with torch.save; on disk on return.

    Returns:
        Its entry in the manifest.
    """
    target: Any = None
    try:
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            target = _Digesting(file)
            if isinstance(content, bytes):
                target.write(content)
            else:
                torch.save(content, target)
            if target.error is not None:
                raise target.error
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        needed = "nothing was written" if target is None else f"the file needs {target.bytes:,} bytes"
        raise writing_failed(error, path, needed) from error
    return {"bytes": target.bytes, "sha256": target.sha256.hexdigest()}


def _name_latest(folder: Path) -> list[str]:
    """Names the newest checkpoint for people; the code reads manifests. Returns warnings."""
    try:
        write_file(folder.parent / LATEST, f"{folder.name}\n".encode())
    except OSError as error:
        return [f"{error_line(error)}; {folder} is whole all the same"]
    return []


def rotate(run: Path, step: int, keep_last: int, keep_every: int, in_use: int | None = None) -> list[str]:
    """Deletes checkpoints older than the newest keep_last up to `step`, and leftovers older than `step`.

    The checkpoint of step `in_use` stays until a later call, and so does one that cannot be deleted. A link
    is the user's: it is neither counted nor deleted.

    Returns:
        Warnings.
    """
    problems = []
    try:
        for folder in _outdated(run, step, keep_last, keep_every, in_use):
            try:  # renamed first: it is a whole checkpoint or none
                folder.rename(folder.with_name(f"{REMOVING}{folder.name}"))
            except OSError as error:
                problems.append(_stays(folder, error))
        for folder in sorted((run / CHECKPOINTS).glob(f"{REMOVING}step-*")):
            try:
                shutil.rmtree(folder)
            except OSError as error:
                problems.append(_stays(folder, error))
                shutil.rmtree(folder, ignore_errors=True)  # its other files
    except OSError as error:
        problems.append(_stays(run / CHECKPOINTS, error))
    return problems


def _outdated(run: Path, step: int, keep_last: int, keep_every: int, in_use: int | None) -> list[Path]:
    folders = [run / CHECKPOINTS / f"step-{n}" for n in steps(run) if n <= step]
    folders = [folder for folder in folders if not folder.is_symlink()]
    sealed = [folder for folder in folders if (folder / MANIFEST).exists()]
    kept = set(sealed[:keep_last])
    for folder in sealed:
        number = int(folder.name[5:])
        if number == in_use or (keep_every > 0 and number % keep_every == 0):
            kept.add(folder)
    return [folder for folder in folders if folder not in kept]


def _stays(folder: Path, error: OSError) -> str:
    reason = f"{Path(error.filename).name}: {error.strerror}" if error.filename else str(error)
    return f"{folder} cannot be deleted ({reason}); the next checkpoint tries again"
