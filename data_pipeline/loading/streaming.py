"""Data folders on object stores: any URL that remote.py reads, with a cache on the local disk.

Manifest, tokenizer and indices are fetched at start, shards when they are needed: whole, compared with the
manifest's sha256, and renamed when complete, so that every file in the cache is good. The ranks of a node
share the cache; a shard that several want is fetched by one of them, while the others wait for its lock.
"""

import hashlib
import io
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from threading import Thread

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.shards.manifest import MANIFEST, TOKENIZER, Manifest, Shard, open_manifest, parse_manifest
from data_pipeline.shards.token_stream import DamagedError, ShardFiles
from data_pipeline.sources.remote import download, is_url, unfinished

ATTEMPTS = 2  # at a file that arrives damaged


def open_data(
    path: str | Path, cache: str | Path | None = None, cache_bytes: int | None = None
) -> tuple[Manifest, ShardFiles]:
    """The checked manifest of a data folder or URL, and its shards.

    A URL's files go to `cache`/HASH OF THE MANIFEST; beyond `cache_bytes` of shards (None: no limit) the
    oldest are deleted. Raises DataError as `open_manifest` does, for a URL that cannot be read or is refused
    (see remote.is_url) and for one without a cache.
    """
    if not is_url(str(path)):
        manifest = open_manifest(path)
        return manifest, ShardFiles(manifest.path, manifest.dtype)
    url = str(path).rstrip("/")
    if cache is None:
        raise DataError(f"data.path={url} is remote: set data.cache to a local folder for its shards")
    with tempfile.TemporaryDirectory() as folder_name:
        copy = Path(folder_name) / MANIFEST
        with copy.open("a+b", buffering=0) as file:
            download(f"{url}/{MANIFEST}", file)
        data = copy.read_bytes()
    folder = Path(cache) / hashlib.sha256(data).hexdigest()[:16]
    manifest = parse_manifest(folder, data)
    files = ShardCache(url, manifest, cache_bytes)
    files.fetch(MANIFEST, len(data), manifest.sha256)
    files.fetch(TOKENIZER, manifest.tokenizer_bytes, manifest.tokenizer_sha256)
    for shard in manifest.shards():
        files.fetch(shard.index_file, shard.index_bytes, shard.index_sha256)
    return manifest, files


class ShardCache(ShardFiles):
    """The shards of a URL, each fetched when first used, or earlier by `prefetch`."""

    fix = "delete it from the cache to fetch it again"

    def __init__(self, url: str, manifest: Manifest, cache_bytes: int | None) -> None:
        super().__init__(manifest.path, manifest.dtype)
        self.cache_bytes = cache_bytes
        self._url = url
        self._prefetching: Thread | None = None

    def array(self, shard: Shard) -> np.ndarray:
        """As in ShardFiles. Beyond `cache_bytes` the least recently used shards are unmapped, because a
        deleted file occupies the disk while it is mapped. Also raises DamagedError for a shard that does not
        arrive whole.
        """
        array = self._arrays.pop(shard.file, None)
        if array is None:
            path = self._newest(shard)
            array = self._map(path, shard)
            self._delete_oldest(keep=path)
        self._arrays[shard.file] = array  # the last one is the newest
        if self.cache_bytes is not None:
            while sum(a.nbytes for a in self._arrays.values()) > self.cache_bytes:
                del self._arrays[next(iter(self._arrays))]
        return array

    def _newest(self, shard: Shard) -> Path:
        """The shard's file, marked as used now."""
        while True:
            path = self.fetch(shard.file, shard.bytes, shard.sha256)
            try:
                os.utime(path)
            except FileNotFoundError:  # another rank made room in between
                continue
            return path

    def prefetch(self, shards: Iterable[Shard]) -> None:
        """Fetch in a thread what is missing, unless the previous such thread is still running."""
        if self._prefetching is not None and self._prefetching.is_alive():
            return
        missing = [shard for shard in shards if not (self.folder / shard.file).exists()]
        if missing:
            # A daemon: a process that ends does not wait for shards it will not read.
            self._prefetching = Thread(target=self._prefetch, args=(missing,), daemon=True)
            self._prefetching.start()

    def _prefetch(self, shards: list[Shard]) -> None:
        for shard in shards:
            try:
                self._delete_oldest(keep=self.fetch(shard.file, shard.bytes, shard.sha256))
            except (DataError, OSError):
                return  # the reader of the shard tries again and reports it

    def fetch(self, name: str, size: int, sha256: str) -> Path:
        """The file of that name in the cache, from the URL if it is not there. Raises DamagedError if
        it is not what the manifest says, DataError if it cannot be read.
        """
        path = self.folder / name
        with unfinished(path) as file:
            if file:
                self._transfer(f"{self._url}/{name}", file, size, sha256)
        return path

    def _transfer(self, url: str, file: io.FileIO, size: int, sha256: str) -> None:
        for _ in range(ATTEMPTS):
            download(url, file)
            file.seek(0)
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if found == sha256:
                return
        raise DamagedError(
            f"{url} has {file.tell()} bytes and sha256 {found[:16]}..., the manifest says {size} and "
            f"{sha256[:16]}...: upload the built file again"
        )

    def _delete_oldest(self, keep: Path) -> None:
        """Delete the least recently used shards until the rest fits."""
        if self.cache_bytes is None:
            return
        found = []
        for path in self.folder.glob("*.tar"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another rank was faster
                continue
            found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total > self.cache_bytes and path != keep:
                path.unlink(missing_ok=True)
                total -= size
