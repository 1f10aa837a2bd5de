"""Data folders on object stores: any URL that remote.py reads, with a cache on the local disk.

Manifest, tokenizer and indices are fetched at start, shards when they are needed: whole, compared with the
manifest's sha256, and renamed when complete. Of what is in the cache already, manifest, tokenizer and indices
are compared again at every start, shards by size when opened and by member when read, as in a local folder.
The ranks of a node share the cache, and so may several runs; a shard that several want is fetched by one of
them, while the others wait for its lock.
"""

import hashlib
import io
import os
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from threading import Thread

from data_pipeline.errors import DataError
from data_pipeline.shards.manifest import MANIFEST, TOKENIZER, Manifest, Shard, open_manifest, parse_manifest
from data_pipeline.shards.shard_files import DamagedError, OpenShard, ShardFiles
from data_pipeline.sources.remote import download, is_url, unfinished, writing

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
        return manifest, ShardFiles(manifest.path)
    url = str(path).rstrip("/")
    if cache is None:
        raise DataError(f"data.path={url} is remote: set data.cache to a local folder for its shards")
    with tempfile.TemporaryDirectory() as folder_name:
        copy = Path(folder_name) / MANIFEST
        with copy.open("a+b", buffering=0) as file, writing(copy):
            download(f"{url}/{MANIFEST}", file)
        data = copy.read_bytes()
    folder = Path(cache) / hashlib.sha256(data).hexdigest()[:16]
    manifest = parse_manifest(folder, data)
    files = ShardCache(url, manifest, cache_bytes)
    files.fetch_compared(MANIFEST, len(data), manifest.sha256)
    files.fetch_compared(TOKENIZER, manifest.tokenizer_bytes, manifest.tokenizer_sha256)
    for shard in manifest.shards():
        files.fetch_compared(shard.index_file, shard.index_bytes, shard.index_sha256)
    return manifest, files


class ShardCache(ShardFiles):
    """The shards of a URL, each fetched when first used, or earlier by `prefetch`."""

    fix = "delete it from the cache to fetch it again"

    def __init__(self, url: str, manifest: Manifest, cache_bytes: int | None) -> None:
        super().__init__(manifest.path)
        self.cache_bytes = cache_bytes
        self._url = url
        self._prefetching: Thread | None = None

    def _too_many(self, total: int) -> bool:
        """Also beyond `cache_bytes`, because a deleted file occupies the disk while it is open."""
        return super()._too_many(total) or (self.cache_bytes is not None and total > self.cache_bytes)

    def _opened(self, shard: Shard) -> OpenShard:
        """From the URL, if it is not in the cache. Raises DamagedError also if it does not arrive whole."""
        while True:
            path = self.fetch(shard.file, shard.bytes, shard.sha256)
            try:
                file = OpenShard(path, shard, self.fix)
            except FileNotFoundError:  # another process made room in between
                continue
            with suppress(FileNotFoundError, PermissionError):  # deleted meanwhile, or another user's
                # The time of its last change stays: it tells whether checked members are still good.
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
            self._delete_oldest(keep=path)
            return file

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

    def fetch_compared(self, name: str, size: int, sha256: str) -> None:
        """`fetch` of a small file that is compared also if it was there. Raises DamagedError."""
        data = self.fetch(name, size, sha256).read_bytes()
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise DamagedError(
                f"{self.folder / name} has {len(data)} bytes and sha256 {found[:16]}..., the manifest says "
                f"{size} and {sha256[:16]}...: {self.fix}"
            )

    def _transfer(self, url: str, file: io.FileIO, size: int, sha256: str) -> None:
        for _ in range(ATTEMPTS):  # the first may continue what is of another version
            download(url, file, checked=True)
            file.seek(0)
            found, arrived = hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
            if found == sha256:
                return
            file.truncate(0)
        raise DamagedError(
            f"{url} has {arrived} bytes and sha256 {found[:16]}..., the manifest says {size} and "
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
            found.append((status.st_atime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total > self.cache_bytes and path != keep:
                path.unlink(missing_ok=True)
                total -= size
