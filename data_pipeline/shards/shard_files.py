"""The shards of a data folder as open, mapped files, and reading them without SIGBUS.

A process that touches a map of a file that another one has cut short is killed by SIGBUS. The operating
system itself is not: it reports a bad address. So it is the operating system that copies from the maps.
"""

import errno
import mmap
import os
import resource
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.shards.manifest import REBUILD, Shard

IOV_MAX = os.sysconf("SC_IOV_MAX")  # pieces that one system call takes
Version = tuple[int, int, int]  # device, inode, time of the last change in ns


class DamagedError(DataError):
    """Part of a shard is not what was written."""


class OpenShard:
    """One shard, open until nothing refers to it any more.

    `view`: the whole file, to be touched by `Gatherer` alone.
    """

    def __init__(self, path: Path, shard: Shard, fix: str) -> None:
        """Raises DamagedError for a file of another size, and FileNotFoundError."""
        self.path, self.bytes, self._fix = path, shard.bytes, fix
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.seen = self._version()
        try:
            self.view = memoryview(mmap.mmap(self._descriptor, self.bytes, prot=mmap.PROT_READ))
        except ValueError as error:  # it was cut since
            raise self._unreadable(str(error)) from error
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def changed(self) -> bool:
        """Whether it was written to since it was opened or last asked. Raises DamagedError if it was cut."""
        before, self.seen = self.seen, self._version()
        return self.seen != before

    def _version(self) -> Version:
        try:
            status = os.fstat(self._descriptor)
        except OSError as error:
            raise self._unreadable(error.strerror) from error
        if status.st_size != self.bytes:
            raise DamagedError(
                f"{self.path} has {status.st_size} bytes, the manifest says {self.bytes}: {self._fix}"
            )
        return status.st_dev, status.st_ino, status.st_mtime_ns

    def read(self, offset: int, size: int) -> bytes:
        """Without the map. Raises DamagedError where the file ends too early or cannot be read."""
        data = b""
        while len(data) < size:
            try:
                more = os.pread(self._descriptor, size - len(data), offset + len(data))
            except OSError as error:
                raise self._unreadable(error.strerror) from error
            if not more:
                raise DamagedError(f"{self.path} ends before byte {offset + size}: {self._fix}")
            data += more
        return data

    def damaged(self, member: int, reason: str) -> DamagedError:
        return DamagedError(f"{self.path} member {member:06d}: {reason}, it is damaged: {self._fix}")

    def _unreadable(self, reason: str | None) -> DamagedError:
        return DamagedError(f"{self.path} cannot be read ({reason}): {self._fix}")


class Gatherer:
    """Copies parts of maps one after another, in one system call."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("gathered")

    def __del__(self) -> None:
        os.close(self._descriptor)

    def gather(self, parts: Sequence[memoryview | bytes], size: int) -> np.ndarray | None:
        """The parts, `size` bytes in all, as (size,) uint8; None if part of a map is not there."""
        written = 0
        try:
            for first in range(0, len(parts), IOV_MAX):
                written += os.pwritev(self._descriptor, parts[first : first + IOV_MAX], written)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
        if written != size:
            return None
        out = np.empty(size, dtype=np.uint8)
        return out if os.preadv(self._descriptor, (out.data,), 0) == size else None


class ShardFiles:
    """The shards of a data folder, each opened at first use; the least recently used ones are closed.

    `limit`: how many are kept open, and how many a reader may hold. `fix`: what its errors advise.
    """

    fix = REBUILD

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, OpenShard] = {}  # the last one is the newest
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        # A quarter of what the process may open, by two for each: a job has other files and sockets.
        self.limit = max(limit // 8, 1) if limit != resource.RLIM_INFINITY else 1 << 16

    def open(self, shard: Shard) -> OpenShard:
        """Raises DamagedError for a file that is gone or of another size."""
        file = self._open.pop(shard.file, None)
        if file is None:
            file = self._opened(shard)
            while self._open and self._too_many(file.bytes + sum(f.bytes for f in self._open.values())):
                del self._open[next(iter(self._open))]
        self._open[shard.file] = file
        return file

    def _too_many(self, total: int) -> bool:
        """Whether one must be closed before one more is kept open; all of them have `total` bytes."""
        return len(self._open) >= self.limit

    def _opened(self, shard: Shard) -> OpenShard:
        path = self.folder / shard.file
        try:
            return OpenShard(path, shard, self.fix)
        except FileNotFoundError as error:
            raise DamagedError(f"{path} is missing: {self.fix}") from error
