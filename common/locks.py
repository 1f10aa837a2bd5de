"""One writer per folder: a lock that ends with the process that holds it, however it ends."""

import errno
import fcntl
import multiprocessing.reduction
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from common.files import writing_failed

LOCK_NAME = ".lock"
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class FolderInUseError(ValueError):
    """Another process holds the folder: one line that names it."""


class FolderLock:
    """Holds a folder until `release`, the end of a `with` block or the end of the process.

    The operating system drops the lock (flock) with its holder, so that a crash never leaves a folder locked.
    On NFS, Linux turns it into a lock on the server, which other machines see too. A file system without
    locks is named in a warning. The file `name` exists while the lock is held, and after a crash, when it
    means nothing. A lock among the arguments of a process that multiprocessing spawns is held by that process
    too: the folder is free when all of them have ended (not on NFS, whose locks belong to one process).

    Args:
        folder: created if it is missing.
        purpose: what uses the folder, for the message of the next one: `a training run`.
        fix: what to do instead of waiting, for the same message: `choose another output_dir`.
        shared: others may hold the same lock as shared too.
        name: of the file; different names are different locks.

    Raises:
        FolderInUseError: another process holds it.
        OSError: the folder cannot be written.
    """

    def __init__(
        self, folder: Path, purpose: str, fix: str, shared: bool = False, name: str = LOCK_NAME
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self._shared = folder / name, shared
        self._file: IO[str] | None = None
        while self._file is None:
            self._file = self._acquire(folder, fix)
        try:
            if not shared:
                self._file.truncate(0)
            self._file.write(f"{purpose}, process {os.getpid()} on {socket.gethostname()}, since {_now()}\n")
            self._file.flush()
        except OSError as error:
            with suppress(OSError):  # closing writes once more
                self._file.close()
            raise writing_failed(error, self.path, "nothing was written") from error

    def _acquire(self, folder: Path, fix: str) -> IO[str] | None:
        """The locked file; None if its last holder deleted it before this process had the lock."""
        file = self.path.open("a+")
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = (file.read().splitlines() or ["another process"])[-1]
            file.close()
            raise FolderInUseError(f"{folder} is in use by {holder}; wait until it ends, or {fix}") from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                file.close()
                raise
            print(
                f"warning: the file system of {folder} has no locks ({error.strerror}): nothing stops a "
                "second process that writes there",
                file=sys.stderr,
            )
            return file
        try:
            current = os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except FileNotFoundError:
            current = False
        if current:
            return file
        file.close()
        return None

    def release(self) -> None:
        """Gives the folder back; does nothing the second time."""
        file, self._file = self._file, None
        if file is None:
            return
        try:
            if not self._shared:  # deleted while it is held: whoever opened it meanwhile opens it again
                self.path.unlink(missing_ok=True)
        finally:
            file.close()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        assert self._file is not None, "a released lock"
        return _inherited, (multiprocessing.reduction.DupFd(self._file.fileno()),)

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


def _inherited(copy: Any) -> int:
    """The file descriptor through which a spawned process holds the lock, to the end of the process."""
    descriptor: int = copy.detach()
    return descriptor


def _now() -> str:
    return datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
