"""Attacks by servers: what arrives is the file that lies there, or one line says why not."""

import gzip
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.loading.loader import Loader
from data_pipeline.sources import http_download
from data_pipeline.sources.remote import download, fetch, is_url
from tests.conftest import ROOT
from tests.data_pipeline.conftest import make_folder as make_folder  # a fixture
from tests.data_pipeline.http_server import serving

OLD, NEW = bytes(range(256)) * 8, bytes(reversed(range(256))) * 8  # two versions of one length
Answer = Callable[[int, dict[str, str]], bytes]  # (number of the request, its headers) -> all that is sent


@contextmanager
def server(answer: Answer) -> Iterator[str]:
    """Sends exactly these bytes to each request, then closes; yields the address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for number in range(1000):
                try:
                    connection, _ = listener.accept()
                except OSError:  # closed: the test is over
                    return
                with connection, connection.makefile("rb") as stream:
                    lines = iter(lambda: stream.readline().decode().strip(), "")
                    headers = dict(line.lower().split(": ", 1) for line in lines if ": " in line)
                    connection.sendall(answer(number, headers))
                    connection.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(timeout=30)


def reply(status: str, body: bytes = b"", **headers: object) -> bytes:
    lines = [f"HTTP/1.1 {status}"] + [f"{key.replace('_', '-')}: {value}" for key, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def whole(body: bytes = OLD, cut: int | None = None, **headers: object) -> bytes:
    return reply("200 OK", body[:cut], Content_Length=len(body), **headers)


def chunked(body: bytes, *, end: bool = True) -> bytes:
    parts = [body[i : i + 500] for i in range(0, len(body), 500)]
    sent = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    return reply("200 OK", sent if end else sent[:-700], Transfer_Encoding="chunked")


def rest(headers: dict[str, str], body: bytes, **more: object) -> bytes:
    start = int(headers["range"].removeprefix("bytes=").removesuffix("-"))
    ranged = f"bytes {start}-{len(body) - 1}/{len(body)}"
    given = {"Content_Range": ranged, "Content_Length": len(body) - start, **more}
    return reply("206 Partial Content", body[start:], **given)


def first_then(first: bytes, then: Callable[[dict[str, str]], bytes]) -> Answer:
    return lambda number, headers: then(headers) if number else first


CUT = {"strong": whole(cut=700, ETag='"1"'), "weak": whole(cut=700, ETag='W/"1"'), "none": whole(cut=700)}


def again(headers: dict[str, str]) -> bytes:
    """A server that keeps ranges but not conditions: another version's rest, if it is asked for one."""
    return rest(headers, NEW) if "range" in headers else whole(NEW)


EMPTY_416 = reply("416 No", Content_Length=0)
MIDDLE = reply("206 P", OLD[700:800], Content_Range="bytes 700-799/2048", Content_Length=100, ETag='"1"')
WHOLE: dict[str, tuple[Answer, bytes]] = {
    "200": (lambda *_: whole(), OLD),
    "chunked": (lambda *_: chunked(OLD), OLD),
    "empty": (lambda *_: whole(b""), b""),
    "bytes after the announced end": (lambda *_: whole() + b"more", OLD),
    "resumed by ETag": (first_then(CUT["strong"], lambda h: rest(h, OLD, ETag='"1"')), OLD),
    "200 to a range": (first_then(CUT["strong"], lambda h: whole(NEW, ETag='"2"')), NEW),
    "206 of another ETag": (first_then(CUT["strong"], lambda h: again(h)), NEW),
    "206 without ETag": (first_then(CUT["strong"], again), NEW),
    "weak ETag, other version": (first_then(CUT["weak"], again), NEW),
    "no ETag, other version": (first_then(CUT["none"], again), NEW),
    "206 of another length": (
        first_then(
            CUT["strong"], lambda h: rest(h, NEW + b"x", ETag='"1"') if "range" in h else whole(NEW + b"x")
        ),
        NEW + b"x",
    ),
    "416 although it is not complete": (
        first_then(CUT["strong"], lambda h: EMPTY_416 if "range" in h else whole(NEW)),
        NEW,
    ),
    "206 of part of the rest": (
        first_then(CUT["strong"], lambda h: MIDDLE if "range" in h else whole()),
        OLD,
    ),
    "chunked, cut in the middle": (
        lambda number, headers: chunked(OLD, end=bool(number)),
        OLD,
    ),
}  # fmt: skip
REFUSED: dict[str, tuple[Answer, str]] = {
    "cut": (lambda *_: whole(cut=700), "cut after 700 bytes (2048 bytes were announced)"),
    "cut after the header": (lambda *_: whole(cut=0), "2048 bytes were announced"),
    "no length": (lambda *_: reply("200 OK", OLD), "announces no length"),
    "no length, cut": (lambda *_: reply("200 OK", OLD[:700]), "announces no length"),
    "chunked, cut": (lambda *_: chunked(OLD, end=False), "IncompleteRead"),
    "a bad chunk size": (
        lambda *_: reply("200 OK", b"-5\r\nabc\r\n0\r\n\r\n", Transfer_Encoding="chunked"),
        "cannot be fetched (",
    ),
    "Content-Length abc": (lambda *_: reply("200 OK", OLD, Content_Length="abc"), "Content-Length 'abc'"),
    "Content-Length -1": (lambda *_: reply("200 OK", OLD, Content_Length=-1), "Content-Length '-1'"),
    "Content-Length 1_0": (lambda *_: reply("200 OK", OLD, Content_Length="1_0"), "Content-Length '1_0'"),
    "two lengths": (
        lambda *_: reply("200 OK", OLD, Content_Length=5, content_length=2048),
        "is not one number",
    ),
    "gzip": (lambda *_: whole(gzip.compress(OLD), Content_Encoding="gzip"), "sent compressed (gzip)"),
    "a part nobody asked for": (
        lambda *_: reply("206 P", OLD[:9], Content_Range="bytes 0-8/9", Content_Length=9),
        "a part that was not asked for",
    ),
    "202": (lambda *_: reply("202 Accepted", b"later", Content_Length=5), "202 Accepted"),
    "404": (lambda *_: reply("404 Not Found", Content_Length=0), "404 Not Found: fix the URL"),
    "429": (lambda *_: reply("429 Slow", Content_Length=0), "run it again later"),
    "503": (lambda *_: reply("503 \x1b[31mBusy", Content_Length=0), "503 [31mBusy: run it again later"),
    "a redirect to itself": (
        lambda *_: reply("302 Found", Location="/x.txt", Content_Length=0),
        "302 ",
    ),
    "a redirect to a file": (
        lambda *_: reply("302 Found", Location="file:///etc/passwd", Content_Length=0),
        "302 ",
    ),
    "a redirect to ftp": (
        lambda *_: reply("302 Found", Location="ftp://127.0.0.1/x", Content_Length=0),
        "unknown url type: ftp",
    ),
    "a redirect to nowhere": (
        lambda *_: reply("302 Found", Location="http://[bad/", Content_Length=0),
        "cannot be fetched (",
    ),
    "no HTTP": (lambda *_: b"SSH-2.0-x\r\nmore\r\n", "SSH-2.0-x"),
    "nothing": (lambda *_: b"", "cannot be fetched ("),
    "a header too long": (lambda *_: reply("200 OK", X="x" * 70_000), "cannot be fetched ("),
    "too many headers": (lambda *_: reply("200 OK", **{f"X{i}": i for i in range(200)}), "headers"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_arrives_is_whole_and_of_one_version(tmp_path, name):
    answer, expected = WHOLE[name]
    with server(answer) as url:
        assert fetch(f"{url}/x.txt", tmp_path).read_bytes() == expected
    assert [path.suffix for path in tmp_path.iterdir()] == [".txt"]


def refusal(url: str, cache: Path) -> str:
    with pytest.raises(DataError) as error:
        fetch(url, cache)
    assert not [path for path in cache.iterdir() if path.suffix != ".part"]
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize("name", REFUSED)
def test_what_may_be_short_or_spliced_is_one_line(tmp_path, name):
    answer, message = REFUSED[name]
    with server(answer) as url:
        assert message in refusal(f"{url}/x.txt", tmp_path)


def test_a_gz_file_that_is_sent_as_gzip_is_itself(tmp_path):
    data = gzip.compress(OLD)
    with server(lambda *_: whole(data, Content_Encoding="gzip")) as url:
        assert fetch(f"{url}/x.gz", tmp_path).read_bytes() == data


def test_a_stalled_server_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(http_download, "TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # never answers
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x.txt"
        assert "timed out" in refusal(url, tmp_path)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/é", "http://127.0.0.1:1/a b", "http://127.0.0.1:x/", "http:///x"]
)
def test_bad_addresses_are_one_line(tmp_path, url):
    assert "cannot be fetched" in refusal(url, tmp_path)


def test_control_characters_in_an_address():
    with pytest.raises(DataError, match="has control characters"):
        is_url("http://\x1b[31m/")


@pytest.mark.parametrize("count", [150, pytest.param(3000, marks=pytest.mark.slow)])
def test_random_servers_never_give_a_spliced_or_short_file(tmp_path, count):
    """Sequences of answers drawn from everything above and from damaged ones; two versions of the file."""
    draw = random.Random(28)
    for number in range(count):
        seed = draw.randrange(2**32)

        def answer(request: int, headers: dict[str, str], seed: int = seed) -> bytes:
            choose = random.Random(f"{seed} {request}")
            body, tag = choose.choice([(OLD, '"old"'), (NEW, '"new"')])
            more = {} if choose.random() < 0.3 else {"ETag": choose.choice([tag, f"W/{tag}"])}
            if "range" in headers and choose.random() < 0.7:
                sent = rest(headers, body, **more)
            else:
                sent = choose.choice([whole(body, **more), chunked(body)])
            if choose.random() < 0.5:
                sent = sent[: choose.randrange(len(sent))]
            return sent

        with server(answer) as url:
            outcome = outcome_of(f"{url}/{number}.txt", tmp_path)
        assert outcome in ("whole", "refused"), (number, outcome)


def outcome_of(url: str, cache: Path) -> str:
    try:
        found = fetch(url, cache).read_bytes()
    except DataError as error:
        return "refused" if str(error).isprintable() else str(error)
    return "whole" if found in (OLD, NEW) else "spliced or short"


def test_a_checked_download_takes_what_it_can_and_leaves_the_rest_to_the_checksum(tmp_path):
    """Without an ETag or a length: continued from what an earlier process left."""
    part = tmp_path / "x.part"
    part.write_bytes(OLD[:100])
    with server(lambda _, headers: rest(headers, OLD)) as url, part.open("a+b", buffering=0) as file:
        download(f"{url}/x", file, checked=True)
    assert part.read_bytes() == OLD


# ---- a data folder behind a bad connection, two runs at once, kill -9 and a full disk

RUN = """
import resource, sys
from pathlib import Path
from common.errors import user_errors
from data_pipeline.errors import DataError
from data_pipeline.loading.loader import Loader
url, cache, steps, limit, cache_bytes = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
with user_errors(DataError, OSError):
    loader = Loader(url, 32, 8, 1, cache=cache, cache_bytes=cache_bytes or None, shuffle_shards=1)
    for step in range(steps):
        loader.batch(step)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory, make_folder) -> Path:
    rng = random.Random(0)
    texts = [[2, *(rng.randrange(4, 260) for _ in range(rng.randrange(300))), 3] for _ in range(300)]
    folder = tmp_path_factory.mktemp("remote") / "data"
    return make_folder(folder, {"long": {"train": texts, "validation": texts[:5]}}, 8000)


def command(url: str, cache: Path, steps: int, limit: int = 0, cache_bytes: int = 0) -> list[str]:
    return [sys.executable, "-c", RUN, url, str(cache), *map(str, (steps, limit, cache_bytes))]


@pytest.mark.parametrize("mode", ["hold", "holdtar"])
def test_kill_in_the_middle_of_a_file_then_the_same_batches(tmp_path, built, mode):
    """In the manifest, which is kept nowhere, and in a shard, which goes on where it was."""
    local = Loader(built, 32, 8, 1, shuffle_shards=1)
    with serving(built) as server:
        process = subprocess.Popen(command(server.url(mode), tmp_path, 1), cwd=ROOT)
        suffix = ".tar" if mode == "holdtar" else ".json"
        while not any(path.endswith(suffix) for path, _ in server.requests):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        server.go_on.set()
        remote = Loader(server.url("range"), 32, 8, 1, cache=tmp_path, shuffle_shards=1)
        for step in range(20):
            assert (remote.batch(step).tokens == local.batch(step).tokens).all()
        finish = remote._files._prefetching  # type: ignore[attr-defined]
        if finish is not None:
            finish.join(timeout=60)


def test_two_runs_share_a_cache_that_is_too_small_for_both(tmp_path, built):
    """Each deletes what the other uses; both go on."""
    sizes = sorted(path.stat().st_size for path in built.glob("long-train-*.tar"))
    with serving(built) as server:
        runs = [
            subprocess.Popen(
                command(server.url("range"), tmp_path, 150, 0, sum(sizes[-2:])),
                cwd=ROOT,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        assert [(run.communicate(timeout=120)[1], run.returncode) for run in runs] == [("", 0)] * 2


@pytest.mark.parametrize("limit", [0, 300, 5000])
def test_a_full_disk_in_the_cache_is_one_line_and_the_next_run_goes_on(tmp_path, built, limit):
    """Full at the manifest, at the tokenizer and at a shard (files of at most `limit` + 1 bytes)."""
    with serving(built) as server:
        full = subprocess.run(
            command(server.url("range"), tmp_path, 20, limit + 1), cwd=ROOT, capture_output=True, text=True
        )
        assert full.returncode == 2, full.stderr
        assert "File too large after" in full.stderr
        assert full.stderr.count("\n") == 1
        remote, local = Loader(server.url("range"), 32, 8, 1, cache=tmp_path), Loader(built, 32, 8, 1)
        assert (remote.batch(3).tokens == local.batch(3).tokens).all()
