"""Downloads from a real server on loopback, the published files among them."""

import hashlib
import re
import resource
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import numpy as np
import pytest

from data_pipeline import download as download_module
from data_pipeline.download import DATA_SETS, DataSet, File, download
from data_pipeline.errors import DataError
from data_pipeline.sources.http_download import download_http
from data_pipeline.sources.registry import local_files, read_documents
from data_pipeline.sources.remote import expand, fetch, is_url
from tests.data_pipeline.http_server import CUT, Server, serving

SCRIPT = Path(download_module.__file__)
DATA = np.random.default_rng(0).bytes(3 * CUT + 5)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    root = tmp_path / "server"
    root.mkdir()
    (root / "x.bin").write_bytes(DATA)
    with serving(root) as server:
        yield server


def data_set(url: str, sha256: str = SHA256) -> DataSet:
    return DataSet("x", "MIT", "https://example.org", (File("d/x.bin", url, sha256),))


def error_of(*arguments: object) -> str:
    with pytest.raises(DataError) as error:
        download(*arguments)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    return str(error.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- the table


def test_the_table_has_the_published_checksums(data_root):
    """Against the files that are here: bAbI's is left out, a smaller archive of the same tasks lies there."""
    paths = [file.path for data_set in DATA_SETS for file in data_set.files]
    assert len(paths) == len(set(paths))
    here = {
        f.path: f for d in DATA_SETS for f in d.files if (data_root / f.path).exists() and d.name != "babi"
    }
    assert len(here) >= 15
    for path, file in here.items():
        assert hashlib.sha256((data_root / path).read_bytes()).hexdigest() == file.sha256, path


@pytest.mark.parametrize("data_set", DATA_SETS, ids=lambda data_set: data_set.name)
def test_the_table_is_well_formed(data_set):
    assert data_set.licence
    assert data_set.homepage.startswith("https://")
    archive = [data_set.archive] if data_set.archive else []
    for file in (*data_set.files, *archive):
        assert re.fullmatch(r"[0-9a-f]{64}", file.sha256)
        assert re.fullmatch(r"[a-z0-9]+/[A-Za-z0-9._-]+", file.path)
        url = urlsplit(file.source)
        assert url.scheme == ("" if archive and file not in archive else "https")
        assert Path(url.path).suffix == Path(file.path).suffix or data_set.name == "babi"


# ---- whole downloads


@pytest.mark.parametrize("mode", ["range", "plain", "cut", "silent"])
def test_the_file_is_whole_and_nothing_else_is_left(tmp_path, server, mode):
    out = tmp_path / "out"
    assert download(data_set(server.url(mode, "x.bin")), out) == 1
    assert contents(out) == {"d/x.bin": DATA}
    assert len(server.requests) == (4 if mode == "cut" else 1)
    before = (out / "d/x.bin").stat()
    assert download(data_set(server.url(mode, "x.bin")), out) == 0
    assert (out / "d/x.bin").stat() == before
    assert len(server.requests) == (4 if mode == "cut" else 1)


@pytest.mark.parametrize("mode", ["range", "plain", "cut"])
@pytest.mark.parametrize("have", [1, CUT, len(DATA) - 1, len(DATA), len(DATA) + 7])
def test_a_part_is_taken_up_where_it_stopped(tmp_path, server, mode, have):
    part = tmp_path / "d/x.bin.part"
    part.parent.mkdir()
    part.write_bytes((DATA + b"too long")[:have])
    assert download(data_set(server.url(mode, "x.bin")), tmp_path) == 1
    assert contents(tmp_path / "d") == {"x.bin": DATA}
    assert server.requests[0][1] == f"bytes={have}-"
    if mode == "range":
        assert len(server.requests) == (1 if have <= len(DATA) else 2)


@pytest.mark.parametrize("have", [len(DATA), len(DATA) + 7])
def test_a_range_behind_the_end_means_complete_or_another_file(tmp_path, server, have):
    part = tmp_path / "part"
    part.write_bytes((DATA + b"too long")[:have])
    with part.open("a+b", buffering=0) as file:
        download_http(server.url("range", "x.bin"), file, checked=True)
    assert part.read_bytes() == DATA


def test_a_part_of_another_version_costs_one_more_download(tmp_path, server):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/x.bin.part").write_bytes(bytes(CUT))
    assert download(data_set(server.url("range", "x.bin")), tmp_path) == 1
    assert contents(tmp_path / "d") == {"x.bin": DATA}
    assert [asked for _, asked in server.requests] == [f"bytes={CUT}-", None]


# ---- what goes wrong is one line, and no file gets its name


@pytest.mark.parametrize(
    ("mode", "name", "message"),
    [
        ("range", "absent", "absent: 404 Not Found: fix the URL, or give a mirror"),
        ("error", "x.bin", "x.bin: 503 Service Unavailable"),
        ("wrong", "x.bin", f"not {SHA256}: it has changed or is damaged"),
        ("cutplain", "x.bin", f"x.bin: cut after {CUT} bytes ({len(DATA)} bytes were announced)"),
    ],
)
def test_bad_answers(tmp_path, server, mode, name, message):
    out = tmp_path / "out"
    assert message in error_of(data_set(server.url(mode, name)), out)
    assert set(contents(out)) == {"d/x.bin.part"}
    if mode != "cutplain":
        assert contents(out)["d/x.bin.part"] == b""


def test_no_server_no_http_no_host(tmp_path):
    with serving(tmp_path) as server:
        gone = server.url("range", "x.bin")
    for url, message in {
        gone: "cannot be fetched ([Errno 111] Connection refused): check the network",
        "http://host.invalid/x": "cannot be fetched",
        f"file://{SCRIPT}": "is not an http or https URL",
    }.items():
        assert message in error_of(data_set(url), tmp_path / "out")


def test_a_file_of_another_content_is_never_overwritten(tmp_path, server):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/x.bin").write_bytes(b"mine")
    error = error_of(data_set(server.url("range", "x.bin")), tmp_path)
    assert f"d/x.bin has sha256 {hashlib.sha256(b'mine').hexdigest()}, not {SHA256}: move it away" in error
    assert (tmp_path / "d/x.bin").read_bytes() == b"mine"
    assert server.requests == []


def test_members_come_out_of_an_archive_and_nothing_else_does(tmp_path, server):
    archive = server.root / "a.zip"
    with zipfile.ZipFile(archive, "w") as members:
        for name in ("V/E/x.bin", "../evil", "/tmp/zeromodel-evil", "V/other"):
            members.writestr(name, DATA)
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    source = File("d/a.zip", server.url("cut", "a.zip"), sha256)
    files = (File("d/x.bin", "V/E/x.bin", SHA256),)
    out = tmp_path / "out"
    assert download(DataSet("x", "", "", files, source), out) == 1
    assert contents(out) == {"d/x.bin": DATA}
    assert not (tmp_path / "evil").exists()
    assert not Path("/tmp/zeromodel-evil").exists()
    (out / "d/x.bin").unlink()
    for name, sha, message in (
        ("V/none", SHA256, "no good member 'V/none'"),
        ("V/other", "0" * 64, f"V/other has sha256 {SHA256}, not 0000"),
    ):
        error = error_of(DataSet("x", "", "", (File("d/x.bin", name, sha),), source), out)
        assert message in error
        assert not (out / "d/x.bin").exists()


def test_two_at_once_in_one_folder(tmp_path, server):
    """Both take their files out of one archive, which each deletes when it is done."""
    names = [f"V/{i}.bin" for i in range(8)]
    with zipfile.ZipFile(server.root / "a.zip", "w") as members:
        for name in names:
            members.writestr(name, DATA)
    sha256 = hashlib.sha256((server.root / "a.zip").read_bytes()).hexdigest()
    source = File("d/a.zip", server.url("cut", "a.zip"), sha256)
    both = DataSet(
        "x", "", "", tuple(File(f"d/{i}.bin", name, SHA256) for i, name in enumerate(names)), source
    )
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: download(both, tmp_path / "out"), range(4)))
    assert contents(tmp_path / "out") == {f"d/{i}.bin": DATA for i in range(8)}


# ---- the command, as a process


def run(*arguments: object, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None,
    )


def test_the_command_brings_the_published_files_from_a_mirror(tmp_path, data_root):
    names = ["gsm8k", "arc", "tinyshakespeare"]
    with serving(data_root) as server:
        mirror = server.url("range")
        done = run(*names, "--out", tmp_path, "--mirror", mirror)
        assert (done.returncode, done.stderr) == (0, "")
        assert re.findall(r"^(\w+) .*licence: (.*?);.*; (\d) new, 0 already there$", done.stdout, re.M) == [
            ("gsm8k", "MIT", "3"), ("arc", "CC BY-SA 4.0", "6"), ("tinyshakespeare", "MIT", "1"),
        ]  # fmt: skip
        assert len(server.requests) == 10
        for name, data in contents(tmp_path).items():
            assert data == (data_root / name).read_bytes()
        assert "0 new, 3 already there" in run("gsm8k", "--out", tmp_path, "--mirror", mirror).stdout
        assert len(server.requests) == 10
        missing = run("logiqa", "--out", tmp_path, "--mirror", mirror)
        assert missing.returncode == 2
        assert missing.stderr == (
            f"error: {mirror}logiqa/Train.txt: 404 Not Found: fix the URL, or give a mirror\n"
        )


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(tmp_path, data_root):
    with serving(data_root) as server:
        arguments = ("tinyshakespeare", "--out", tmp_path, "--mirror", server.url("range"))
        full = run(*arguments, limit=300_000)
        assert full.returncode == 2
        assert re.fullmatch(
            f"error: {tmp_path}/text/tinyshakespeare.txt.part: File too large after 300000 bytes, "
            r"\d+ are free: free some space and run it again\n",
            full.stderr,
        )
        assert set(contents(tmp_path)) == {"text/tinyshakespeare.txt.part"}
        assert run(*arguments).returncode == 0
        assert [asked for _, asked in server.requests] == [None, "bytes=300000-"]
    assert set(contents(tmp_path)) == {"text/tinyshakespeare.txt"}


def test_a_killed_download_goes_on(tmp_path, data_root):
    part = tmp_path / "text/tinyshakespeare.txt.part"
    with serving(data_root) as server:
        arguments = ["tinyshakespeare", "--out", str(tmp_path), "--mirror", server.url("hold")]
        process = subprocess.Popen([sys.executable, str(SCRIPT), *arguments])
        deadline = time.monotonic() + 60
        while not part.exists() or part.stat().st_size < 1:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        size = part.stat().st_size
        assert run(*arguments).returncode == 0
        assert server.requests[1][1] == f"bytes={size}-"
    assert set(contents(tmp_path)) == {"text/tinyshakespeare.txt"}


def test_list_and_unknown_names():
    listed = run("--list")
    assert listed.returncode == 0
    for data_set in DATA_SETS:
        assert f"licence: {data_set.licence}; {data_set.homepage}\n" in listed.stdout
        assert all(f"  {file.path}\n" in listed.stdout for file in data_set.files)
    wrong = run("gsm9k")
    assert wrong.returncode == 2
    assert wrong.stderr == "error: unknown data set 'gsm9k'; did you mean 'gsm8k'?\n"


# ---- URLs in recipes


@pytest.mark.parametrize("mode", ["range", "plain", "cut"])
def test_a_url_is_fetched_once_into_the_cache(tmp_path, server, mode):
    url = server.url(mode, "x.bin")
    cache = tmp_path / "cache"
    path = fetch(url + "?token=1", cache)
    assert path.name == f"{hashlib.sha256(f'{url}?token=1'.encode()).hexdigest()[:16]}-x.bin"
    assert path.read_bytes() == DATA
    count = len(server.requests)
    assert fetch(url + "?token=1", cache) == path
    assert len(server.requests) == count
    assert fetch(url, cache) != path
    assert len(contents(cache)) == 2


def test_what_an_earlier_process_left_of_a_url_is_not_trusted(tmp_path, server):
    url = server.url("range", "x.bin")
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-x.bin"
    (tmp_path / f"{name}.part").write_bytes(b"older")
    assert fetch(url, tmp_path).read_bytes() == DATA
    assert server.requests == [("/range/x.bin", None)]


def test_a_file_that_changes_while_it_is_fetched_is_not_a_mixture(tmp_path, server):
    assert fetch(server.url("changed", "x.bin"), tmp_path).read_bytes() == DATA[::-1]
    assert [asked for _, asked in server.requests] == [None, f"bytes={CUT}-"]


def test_of_several_readers_one_fetches(tmp_path, server):
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: fetch(server.url("cut", "x.bin"), tmp_path / "cache"), range(8)))
    assert len(paths) == 1
    assert contents(tmp_path / "cache") == {paths.pop().name: DATA}
    assert len(server.requests) == 4


def test_a_source_of_urls_and_files(tmp_path, server):
    (server.root / "a b.jsonl").write_text('{"text": "one"}\n')
    memory = fsspec.filesystem("memory")
    memory.pipe({"/zm/part-10.jsonl": b'{"text": "three"}', "/zm/part-02.jsonl": b'{"text": "two"}'})
    for name in ("p1.jsonl", "p0.jsonl"):
        (tmp_path / name).write_text(f'{{"text": "{name}"}}\n')
    files = [server.url("range", "a%20b.jsonl"), "memory://zm/part-*.jsonl", "p?.jsonl"]
    options = {"files": files}
    texts = [document.text for document in read_documents("jsonl", tmp_path, options)]
    assert texts == ["one", "two", "three", "p0.jsonl", "p1.jsonl"]
    paths = local_files("jsonl", options, tmp_path)
    assert [path.parent for path in paths] == [tmp_path / "cache"] * 3 + [tmp_path] * 2
    count = len(server.requests)
    memory.pipe({"/zm/part-10.jsonl": b"changed: the cache is not compared again"})
    assert list(read_documents("jsonl", tmp_path, options))[2].text == "three"
    assert len(server.requests) == count
    memory.rm("/zm", recursive=True)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("pipe:cat x", "commands and chained protocols are refused"),
        ("zip://a.txt::http://127.0.0.1/x.zip", "commands and chained protocols are refused"),
        ("simplecache::memory://zm/x", "commands and chained protocols are refused"),
        ("http://[1/x", "is not a URL"),
        ("memory://zm/absent.txt", "memory://zm/absent.txt cannot be fetched (FileNotFoundError"),
        ("memory://zm/absent-*.txt", "memory://zm/absent-*.txt matches no file"),
        ("nosuch://x/y", "nosuch://x/y cannot be fetched (ValueError: Protocol not known: nosuch"),
        ("absent-*.txt", "absent-*.txt matches no file: "),
        ("absent.txt", "absent.txt does not exist"),
    ],
)
def test_files_that_cannot_be_had(tmp_path, file, message):
    with pytest.raises(DataError) as error:
        local_files("text", {"files": [file]}, tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert all(name.endswith(".part") for name in contents(tmp_path))


def test_names_of_urls_stay_in_the_cache(tmp_path):
    memory = fsspec.filesystem("memory")
    for name in ("/zm/..%2F..%2Fevil", "/zm/" + "n" * 300 + ".txt.gz"):
        memory.pipe({name: b"x"})
        path = fetch(f"memory:/{name}", tmp_path / "cache")
        assert path.parent == tmp_path / "cache"
        assert path.suffix == Path(name).suffix or "evil" in name
    assert set(tmp_path.iterdir()) == {tmp_path / "cache"}
    assert not is_url("a/b.txt")
    assert expand("https://host/x*.txt") == ["https://host/x*.txt"]
