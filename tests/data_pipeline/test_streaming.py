import hashlib
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import fsspec
import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.loading.loader import Batch, Loader
from data_pipeline.shards.manifest import open_manifest

from ..conftest import ROOT
from .http_server import Server, serving

FIELDS = ("tokens", "targets", "cu_seqlens", "lengths", "sample_ids", "epochs")


@pytest.fixture
def serve() -> Iterator[Callable[[Path], Server]]:
    """Serves folders over http."""
    with ExitStack() as servers:
        yield lambda folder: servers.enter_context(serving(folder))


def url_of(server: Server) -> str:
    return server.url("range")


def shards_asked(server: Server) -> list[str]:
    return [path.rsplit("/", 1)[-1] for path, _ in server.requests if path.endswith(".tar")]


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
    url = {"http": lambda: url_of(serve(folder)), "file": folder.as_uri, "memory": lambda: "memory://built"}[
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
    first = Loader(url_of(server), 32, 2, 1, cache=tmp_path, shuffle_shards=1)
    assert shards_asked(server) == []
    first.batch(0)
    finish_prefetch(first)
    # of each of two sources at most: the first row's shard, one more, and the blocks to come
    assert 1 <= len(shards_asked(server)) <= 4
    for step in range(2000):
        first.batch(step)
    finish_prefetch(first)
    sources = open_manifest(folder).sources.values()
    every = {shard.file for source in sources for shard in source.splits["train"].shards}
    assert sorted(shards_asked(server)) == sorted(every)
    again = Loader(url_of(server), 32, 2, 1, cache=tmp_path, shuffle_shards=1)
    assert same(again.batch(7), first.batch(7))
    assert len(shards_asked(server)) == len(every)
    assert not list(tmp_path.rglob("*.part"))


RANK = """
import hashlib, sys
from data_pipeline.loading.loader import Loader
url, cache, rank = sys.argv[1:]
loader = Loader(url, 32, 8, 1, int(rank), 2, cache=cache, shuffle_shards=2)
digest = hashlib.sha256()
for step in range(60):
    digest.update(loader.batch(step).tokens.tobytes())
if loader._files._prefetching:
    loader._files._prefetching.join()  # cut off by the end of the process, it would be asked for again
print(digest.hexdigest())
"""


def test_ranks_share_a_cache(tmp_path, folder, serve):
    """Two processes at once: each shard is transferred once, and the global batches are the local ones."""
    server = serve(folder)
    command = [sys.executable, "-c", RANK, url_of(server), str(tmp_path)]
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
    assert len(shards_asked(server)) == len(set(shards_asked(server)))


def test_cache_stays_below_its_limit(tmp_path, make_folder, documents, serve):
    """At the smallest limit that is not refused, which the refusal of a smaller one names."""
    folder = make_folder(tmp_path / "data", documents, shard_bytes=1500)
    server, cache = serve(folder), tmp_path / "cache"
    with pytest.raises(DataError, match="cache_bytes=1 is less") as error:
        Loader(url_of(server), 16, 4, 1, shuffle_shards=1, cache=cache, cache_bytes=1)
    limit = int(str(error.value).split("less than the ")[1].split()[0])
    remote = Loader(url_of(server), 16, 4, 1, shuffle_shards=1, cache=cache, cache_bytes=limit)
    local = Loader(folder, 16, 4, 1, shuffle_shards=1)
    for step in range(400):
        assert same(remote.batch(step), local.batch(step))
        if step % 20 == 0:
            finish_prefetch(remote)
            assert sum(path.stat().st_size for path in cache.rglob("*.tar")) <= limit
    asked = shards_asked(server)
    assert len(asked) > len(set(asked))  # deleted and fetched again


def test_a_cache_too_small_is_refused(tmp_path, folder, serve):
    url = url_of(serve(folder))
    for shards in (0, 1):
        with pytest.raises(DataError, match=rf"cache_bytes=5000 is less than .*shuffle_shards={shards}"):
            Loader(url, 32, 8, 1, cache=tmp_path, cache_bytes=5000, shuffle_shards=shards)


def test_a_damaged_remote_shard_is_never_used(tmp_path, copy, serve):
    (shard, *_) = open_manifest(copy).sources["long"].splits["train"].shards
    data = bytearray((copy / shard.file).read_bytes())
    data[-1] ^= 1  # in the tar's own padding, which no member's checksum covers
    (copy / shard.file).write_bytes(data)
    loader = Loader(url_of(serve(copy)), 32, 8, 1, cache=tmp_path / "cache")
    with pytest.raises(DataError, match=f"{shard.file} has .* says.*upload the built file") as error:
        deque((loader.batch(step) for step in range(100)), maxlen=0)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").rglob(shard.file))


def test_a_damaged_file_in_the_cache_is_found(tmp_path, folder, serve):
    url = url_of(serve(folder))
    Loader(url, 32, 8, 1, cache=tmp_path).batch(0)
    for path in tmp_path.rglob("*.tar"):
        data = bytearray(path.read_bytes())
        data[2000] ^= 1
        path.write_bytes(data)
    loader = Loader(url, 32, 8, 1, cache=tmp_path)
    with pytest.raises(DataError, match="its checksum differs.*delete it from the cache"):
        deque((loader.batch(step) for step in range(100)), maxlen=0)


def test_a_store_that_goes_away_is_one_line(tmp_path, copy, serve):
    server = serve(copy)
    loader = Loader(url_of(server), 32, 8, 1, cache=tmp_path)
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
