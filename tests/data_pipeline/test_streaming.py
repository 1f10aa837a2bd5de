import functools
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.loader import Batch, Loader
from data_pipeline.shards import open_manifest

from ..conftest import ROOT

FIELDS = ("tokens", "targets", "cu_seqlens", "lengths", "sample_ids", "epochs")


class Server:
    """A folder over http, which notes what it was asked for and can stop to serve."""

    def __init__(self, folder: Path) -> None:
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:  # noqa: N802
                server.asked.append(self.path.lstrip("/"))
                super().do_GET()

            def log_message(self, *_: object) -> None:
                pass

        self.asked: list[str] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever)
        self._thread.start()

    def shards(self) -> list[str]:
        return [name for name in self.asked if name.endswith(".tar")]

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def serve() -> Iterator[object]:
    servers: list[Server] = []

    def start(folder: Path) -> Server:
        servers.append(Server(folder))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def finish_prefetch(loader: Loader) -> None:
    thread = loader._files._prefetching  # type: ignore[attr-defined]
    if thread is not None:
        thread.join(timeout=60)
        assert not thread.is_alive()


def same(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(getattr(a, field), getattr(b, field)) for field in FIELDS)


@pytest.mark.parametrize("protocol", ["http", "file", "memory"])
@pytest.mark.parametrize("shuffle_shards", [0, 2])
def test_the_same_batches_as_from_the_folder(tmp_path, folder, serve, protocol, shuffle_shards):
    url = {"http": lambda: serve(folder).url, "file": folder.as_uri, "memory": lambda: "memory://built"}[
        protocol
    ]()
    if protocol == "memory":
        for path in folder.iterdir():
            fsspec.filesystem("memory").pipe(f"/built/{path.name}", path.read_bytes())
    options = {"packing": "best_fit", "shuffle_shards": shuffle_shards}
    local = Loader(folder, 32, 8, 1, **options)
    remote = Loader(url, 32, 8, 1, cache=tmp_path / "cache", **options)
    assert remote.fingerprint == local.fingerprint
    assert remote.tokenizer_path.read_bytes() == local.tokenizer_path.read_bytes()
    for step in [*range(40), 10**6]:
        assert same(local.batch(step), remote.batch(step))
    finish_prefetch(remote)


def test_shards_come_when_needed_and_once(tmp_path, folder, serve):
    server = serve(folder)
    first = Loader(server.url, 32, 2, 1, cache=tmp_path, shuffle_shards=1)
    assert server.shards() == []
    first.batch(0)
    finish_prefetch(first)
    # of each of two sources at most: the first row's shard, one more, and the blocks to come
    assert 1 <= len(server.shards()) <= 4
    for step in range(2000):
        first.batch(step)
    finish_prefetch(first)
    every = {
        shard.file
        for source in open_manifest(folder).sources.values()
        for shard in source.splits["train"].shards
    }
    assert sorted(server.shards()) == sorted(every)
    again = Loader(server.url, 32, 2, 1, cache=tmp_path, shuffle_shards=1)
    assert same(again.batch(7), first.batch(7))
    assert len(server.shards()) == len(every)
    assert not list(tmp_path.rglob("*.part"))


RANK = """
import hashlib, sys
from data_pipeline.loader import Loader
url, cache, rank = sys.argv[1:]
loader = Loader(url, 32, 8, 1, int(rank), 2, cache=cache, shuffle_shards=2)
digest = hashlib.sha256()
for step in range(60):
    digest.update(loader.batch(step).tokens.tobytes())
print(digest.hexdigest())
"""


def test_ranks_share_a_cache(tmp_path, folder, serve):
    """Two processes at once: each shard is transferred once, and the global batches are the local ones."""
    import hashlib

    server = serve(folder)
    command = [sys.executable, "-c", RANK, server.url, str(tmp_path)]
    ranks = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for rank in range(2)
    ]
    found = [rank.communicate(timeout=120)[0].strip() for rank in ranks]
    for rank, digest in enumerate(found):
        loader, expected = Loader(folder, 32, 8, 1, rank, 2, shuffle_shards=2), hashlib.sha256()
        for step in range(60):
            expected.update(loader.batch(step).tokens.tobytes())
        assert digest == expected.hexdigest()
    assert len(server.shards()) == len(set(server.shards()))


def test_cache_stays_below_its_limit(tmp_path, folder, serve):
    server = serve(folder)
    sizes = [s.bytes for s in open_manifest(folder).sources["long"].splits["train"].shards]
    limit = 4 * max(sizes) + 40_000
    options = {"shuffle_shards": 1, "cache": tmp_path, "cache_bytes": limit}
    remote, local = Loader(server.url, 16, 4, 1, **options), Loader(folder, 16, 4, 1, shuffle_shards=1)
    for step in range(600):
        assert same(remote.batch(step), local.batch(step))
        if step % 20 == 0:
            finish_prefetch(remote)
            assert sum(path.stat().st_size for path in tmp_path.rglob("*.tar")) <= limit
    assert len(server.shards()) > len(set(server.shards()))  # deleted and fetched again


def test_a_cache_too_small_is_refused(tmp_path, folder, serve):
    url = serve(folder).url
    for shards in (0, 1):
        with pytest.raises(DataError, match=rf"cache_bytes=5000 is less than .*shuffle_shards={shards}"):
            Loader(url, 32, 8, 1, cache=tmp_path, cache_bytes=5000, shuffle_shards=shards)


def test_a_damaged_remote_shard_is_never_used(tmp_path, copy, serve):
    (shard, *_) = open_manifest(copy).sources["long"].splits["train"].shards
    data = bytearray((copy / shard.file).read_bytes())
    data[-1] ^= 1  # in the tar's own padding, which no member's checksum covers
    (copy / shard.file).write_bytes(data)
    loader = Loader(serve(copy).url, 32, 8, 1, cache=tmp_path)
    with pytest.raises(
        DataError, match=f"{shard.file} has .* the manifest says.*put the built file"
    ) as error:
        for step in range(100):
            loader.batch(step)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob(shard.file))


def test_a_damaged_file_in_the_cache_is_found(tmp_path, folder, serve):
    url = serve(folder).url
    Loader(url, 32, 8, 1, cache=tmp_path).batch(0)
    for path in tmp_path.rglob("*.tar"):
        data = bytearray(path.read_bytes())
        data[2000] ^= 1
        path.write_bytes(data)
    with pytest.raises(DataError, match="its checksum differs.*delete it from the cache"):
        for step in range(100):
            Loader(url, 32, 8, 1, cache=tmp_path).batch(step)


def test_a_store_that_goes_away_is_one_line(tmp_path, copy, serve):
    server = serve(copy)
    loader = Loader(server.url, 32, 8, 1, cache=tmp_path)
    for path in copy.glob("*.tar"):
        path.unlink()
    with pytest.raises(DataError, match=r"\.tar: 404") as error:
        loader.batch(0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("pipe:cat /etc/passwd", "refused"),
        ("simplecache::memory://built", "refused"),
        ("memory://nowhere", "manifest.json cannot be fetched"),
        ("nosuch://x", "cannot be fetched"),
        ("http://127.0.0.1:9/x", "manifest.json"),
    ],
)
def test_urls_that_are_refused(tmp_path, url, message):
    with pytest.raises(DataError, match=message) as error:
        Loader(url, 32, 8, 1, cache=tmp_path)
    assert "\n" not in str(error.value)


def test_a_url_without_a_cache(folder):
    with pytest.raises(DataError, match="set data.cache"):
        Loader(folder.as_uri(), 32, 8, 1)


def test_another_build_at_the_same_url_is_another_data_set(tmp_path, copy, folder, make_folder, documents):
    url = copy.as_uri()
    before = Loader(url, 32, 8, 1, cache=tmp_path / "cache")
    shutil.rmtree(copy)
    make_folder(copy, {"short": documents["short"]})
    after = Loader(url, 32, 8, 1, cache=tmp_path / "cache")
    assert before.fingerprint != after.fingerprint
    assert same(after.batch(3), Loader(copy, 32, 8, 1).batch(3))
