"""Data folders on object stores: any fsspec URL, with a cache on the local disk.

Manifest, tokenizer and indices are fetched at start, shards when they are needed: whole, compared with the
manifest's sha256, and renamed into place, so that a file in the cache is always a good one. The ranks of a
node share the cache; a shard that several want is fetched by one of them, while the others wait for its lock
(flock, which the kernel takes from a process that dies). http and https need nothing; the package of any
other protocol, such as s3fs for s3, has to be installed.
"""

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from threading import Thread
from typing import IO, Any
from urllib.request import urlopen

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.shards import (
    MANIFEST,
    TOKENIZER,
    Manifest,
    Shard,
    open_manifest,
    parse_manifest,
    write_file,
)
from data_pipeline.token_stream import DamagedError, ShardFiles

ATTEMPTS = 3  # of a transfer that breaks off or arrives damaged
TIMEOUT = 60  # seconds without a byte
NETWORK_ERRORS = (OSError, HTTPException)


def is_url(path: str | Path) -> bool:
    """Whether `path` is an URL, good or not, and no local folder."""
    return "::" in str(path) or re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", str(path)) is not None


def open_data(
    path: str | Path, cache: str | Path | None = None, cache_bytes: int | None = None
) -> tuple[Manifest, ShardFiles]:
    """The checked manifest of a data folder or URL and its shards.

    A URL's files come into `cache`/HASH OF THE MANIFEST; past `cache_bytes` of shards there (None: no limit)
    those fetched first are deleted. Raises DataError as `open_manifest` does, for a URL whose files cannot be
    read or that is refused (`pipe:` runs a shell, `::` chains protocols), and for a URL without a cache.
    """
    if not is_url(path):
        manifest = open_manifest(path)
        return manifest, ShardFiles(manifest.path, manifest.dtype)
    url = str(path).rstrip("/")
    if "::" in url or not re.fullmatch(r"[a-z][a-z0-9+.-]+://.+", url):
        raise DataError(
            f"data.path={url} is refused: give a folder or one PROTOCOL://PLACE, no pipe: and no chain (::)"
        )
    if cache is None:
        raise DataError(f"data.path={url} is remote: set data.cache to a local folder for its shards")
    try:
        with _open(f"{url}/{MANIFEST}") as file:
            data = file.read()
    except FileNotFoundError as error:
        raise DataError(f"{url} has no {MANIFEST}: mend data.path or finish its build") from error
    except (*NETWORK_ERRORS, ImportError, ValueError) as error:
        raise DataError(f"{url}/{MANIFEST} cannot be read: {_one_line(error)}") from error
    folder = Path(cache) / hashlib.sha256(data).hexdigest()[:16]
    manifest = parse_manifest(folder, data)
    (folder / "locks").mkdir(parents=True, exist_ok=True)
    files = ShardCache(url, manifest, cache_bytes)
    with files.locked(MANIFEST):
        write_file(folder / MANIFEST, data)
    files.fetch(TOKENIZER, manifest.tokenizer_bytes, manifest.tokenizer_sha256)
    for shard in manifest.shards():
        files.fetch(shard.index_file, shard.index_bytes, shard.index_sha256)
    return manifest, files


class ShardCache(ShardFiles):
    """The shards of a URL, each fetched when it is first asked for or before."""

    mend = "delete it from the cache, it is fetched again"

    def __init__(self, url: str, manifest: Manifest, cache_bytes: int | None) -> None:
        super().__init__(manifest.path, manifest.dtype)
        self.cache_bytes = cache_bytes
        self._url = url
        self._prefetching: Thread | None = None

    def array(self, shard: Shard) -> np.ndarray:
        """As of ShardFiles. Of the mapped shards those last used are let go past `cache_bytes`: a deleted
        file takes its place on the disk until then. Raises DamagedError also for a shard that cannot be
        fetched whole.
        """
        array = self._arrays.pop(shard.file, None)
        if array is None:
            path = self.fetch(shard.file, shard.bytes, shard.sha256)
            os.utime(path)
            array = self._map(path, shard)
            self._evict(path)
        self._arrays[shard.file] = array  # the last one is the newest
        if self.cache_bytes is not None:
            while len(self._arrays) > 1 and sum(a.nbytes for a in self._arrays.values()) > self.cache_bytes:
                del self._arrays[next(iter(self._arrays))]
        return array

    def prefetch(self, shards: Iterable[Shard]) -> None:
        """Fetch in a thread what is not here yet, unless the last such thread is still at it."""
        missing = [shard for shard in shards if not (self.folder / shard.file).exists()]
        if missing and (self._prefetching is None or not self._prefetching.is_alive()):
            # A daemon: a process that ends does not wait for shards it will not read.
            self._prefetching = Thread(target=self._prefetch, args=(missing,), daemon=True)
            self._prefetching.start()

    def _prefetch(self, shards: list[Shard]) -> None:
        for shard in shards:
            try:
                self._evict(self.fetch(shard.file, shard.bytes, shard.sha256))
            except (DataError, OSError):
                return  # whoever reads the shard tries again, and reports it

    def fetch(self, name: str, size: int, sha256: str) -> Path:
        """The file of that name in the cache, from the URL if it is not there. Raises DamagedError."""
        path = self.folder / name
        if path.exists():
            return path
        with self.locked(name):
            if path.exists():
                return path
            for _ in range(ATTEMPTS):
                problem = self._transfer(name, size, sha256)
                if problem is None:
                    return path
        raise DamagedError(f"{self._url}/{name}: {problem}, in {ATTEMPTS} attempts: mend it or the network")

    def _transfer(self, name: str, size: int, sha256: str) -> str | None:
        """Fetch, check, rename; what went wrong, or None."""
        part = self.folder / f"{name}.part"
        try:
            with _open(f"{self._url}/{name}") as source, part.open("w+b") as copy:
                shutil.copyfileobj(source, copy, 2**20)
                copy.flush()
                os.fsync(copy.fileno())
                copy.seek(0)
                found, length = hashlib.file_digest(copy, "sha256").hexdigest(), copy.tell()
        except NETWORK_ERRORS as error:
            return f"cannot be fetched ({_one_line(error)})"
        if length != size:
            return f"has {length} bytes, the manifest says {size}"
        if found != sha256:
            return f"has sha256 {found[:16]}..., the manifest says {sha256[:16]}..."
        os.replace(part, self.folder / name)
        return None

    def _evict(self, keep: Path) -> None:
        """Delete the shards used first until the rest fits, `keep` not among them."""
        if self.cache_bytes is None:
            return
        with self.locked("evict"):
            found = [(path.stat(), path) for path in self.folder.glob("*.tar")]
            total = sum(status.st_size for status, _ in found)
            for status, path in sorted(found, key=lambda item: (item[0].st_mtime_ns, item[1])):
                if total > self.cache_bytes and path != keep:
                    path.unlink()
                    total -= status.st_size

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Alone among the threads and processes that use this cache."""
        with (self.folder / "locks" / name).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _open(url: str) -> IO[bytes] | Any:
    """A readable file. http is read without fsspec, whose http needs aiohttp."""
    if url.startswith(("http://", "https://")):
        return urlopen(url, timeout=TIMEOUT)
    import fsspec  # here, because local folders do without

    return fsspec.open(url, "rb").open()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
