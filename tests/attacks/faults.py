"""Faults at every point where a process changes files: kill -9, or a failure as on a full disk."""

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_FREES = {"os.remove", "os.rmdir"}  # works on a full disk too


class Faults:
    """Counts the changes of files below `root` from `install` on; at number `at` the fault happens.

    Args:
        kind: kill: SIGKILL. fail: this change fails with ENOSPC. full: so do all later ones that need room.
        at: from 1; 0: never, to count.
    """

    def __init__(self, root: Path, kind: str, at: int) -> None:
        self.root, self.kind, self.at, self.count = str(root), kind, at, 0

    def install(self) -> None:
        """For the rest of this process: audit hooks cannot be removed."""
        sys.addaudithook(self._hook)
        fsync = os.fsync

        def counted(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if path.startswith(self.root):
                self.point("fsync", path)
            fsync(descriptor)

        os.fsync = counted

    def in_writes_of(self, kind: type) -> None:
        """Counts the writes of a class that wraps its attribute `file`; writes have no audit event."""
        begin = kind.__init__

        def wrapped(this: Any, file: Any) -> None:
            begin(this, _Counted(file, self))

        kind.__init__ = wrapped  # type: ignore[misc]

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str) and path.startswith(self.root) and flags & _WRITING:
                self.point(event, path)
        elif event in _CHANGES:
            path, *others = map(str, arguments)
            if path.startswith(self.root) or not path.startswith("/"):  # relative: below a folder of rmtree
                self.point(event, path)

    def point(self, event: str, path: str) -> None:
        self.count += 1
        if self.at == 0 or self.count < self.at or (self.count > self.at and self.kind != "full"):
            return
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "full" and event in _FREES:
            return
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), None if event == "fsync" else path)


class _Counted:
    def __init__(self, file: Any, faults: Faults) -> None:
        self.file, self.faults = file, faults

    def write(self, data: Any) -> int:
        self.faults.point("write", self.file.name)
        return self.file.write(data)


def in_child(work: Callable[[], str]) -> tuple[int, str]:
    """Runs `work` in a fork of this process; returns the exit code (-9: killed) and what `work` returned."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.close(reader)
            os.write(writer, work().encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as said:
        text = said.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text
