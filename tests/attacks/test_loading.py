"""Attacks on loading: damaged and hostile bytes, files that change under a run, wrong arguments."""

import hashlib
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from data_pipeline.errors import DataError
from data_pipeline.loading.loader import Loader
from data_pipeline.loading.sample_order import Stage
from data_pipeline.shards import shard_files
from data_pipeline.shards.manifest import open_manifest
from data_pipeline.shards.token_stream import TokenStream
from data_pipeline.show_step import main as show_step
from data_pipeline.tokenization.tokenizer import Tokenizer
from tests.conftest import ROOT
from tests.data_pipeline.conftest import make_folder as make_folder  # a fixture
from tests.data_pipeline.conftest import random_documents

from .mutations import byte_mutations, config_mutations

few_or_all = pytest.mark.parametrize("share", [0.1, pytest.param(1.0, marks=pytest.mark.slow)])
KINDS = {"tar": "long-train-00000.tar", "idx": "long-train-00000.idx", "tokenizer": "tokenizer.model"}
STEPS = 40  # more than an epoch of 8 rows


@pytest.fixture(scope="module")
def built(tmp_path_factory, make_folder) -> Path:
    documents = {
        "short": {"train": random_documents(0, 300, 12), "validation": random_documents(1, 9, 12)},
        "long": {"train": random_documents(2, 40, 200), "validation": random_documents(3, 5, 200)},
    }
    return make_folder(tmp_path_factory.mktemp("built") / "data", documents)


@pytest.fixture
def folder(tmp_path, built) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(built, tmp_path / "data"))


def seen(loader: Loader) -> bytes:
    """The hash of what a run sees, its tokenizer included."""
    digest = hashlib.sha256()
    for step in range(STEPS):
        batch = loader.batch(step)
        digest.update(batch.tokens.tobytes() + batch.targets.tobytes() + batch.cu_seqlens.tobytes())
    digest.update(str(Tokenizer(loader.tokenizer_path).encode("some text")).encode())
    return digest.digest()


def batches(path: str | Path, **options: Any) -> bytes:
    return seen(Loader(path, 32, 8, 1, packing="best_fit", **options))


def outcome(function: Callable[[], Any]) -> Any:
    """What the function returns, or the line of the DataError that it raises."""
    try:
        return function()
    except DataError as error:
        line = str(error)
    assert "\n" not in line
    return line


# ---- damaged bytes


@few_or_all
@pytest.mark.parametrize("where", ["folder", "cache"])
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_bytes_are_refused_or_never_read(tmp_path, folder, kind, where, share):
    """What is accepted gives the same batches: padding of the tar, which nothing reads."""
    source: dict[str, Any] = {"path": folder}
    if where == "cache":
        source = {"path": Path(shutil.copytree(folder, tmp_path / "store")).as_uri(), "cache": tmp_path / "c"}
    good = batches(**source)
    (path,) = (folder if where == "folder" else tmp_path / "c").rglob(KINDS[kind])
    data = path.read_bytes()
    fix = "build it again" if where == "folder" else "delete it from the cache"
    accepted = []
    for what, damaged in byte_mutations(data, round(600 * share), seed=28):
        path.write_bytes(damaged)
        found = outcome(lambda: batches(**source))
        if isinstance(found, str):
            assert path.name in found, (what, found)
            assert fix in found, (what, found)
        else:
            assert found == good, what
            accepted.append(what)
    path.write_bytes(data)
    assert batches(**source) == good
    if kind != "tar":
        assert not accepted


@few_or_all
def test_a_damaged_manifest_is_refused_or_another_data_set(folder, share):
    """It has no checksum of its own: what is still a manifest has another fingerprint. No resume takes it."""
    path = folder / "manifest.json"
    data, known = path.read_bytes(), Loader(folder, 32, 8, 1).fingerprint

    def fingerprint() -> str:
        loader = Loader(folder, 32, 8, 1)
        for step in range(3):
            loader.batch(step)
        return loader.fingerprint

    for what, damaged in byte_mutations(data, round(3000 * share), seed=28):
        path.write_bytes(damaged)
        assert outcome(fingerprint) != known, what


# ---- hostile bytes: a data set from elsewhere whose checksums fit


@few_or_all
def test_an_index_that_does_not_fit_its_shard_reads_nothing_else(folder, share):
    """Any number in it is another one; the manifest was made for that index."""
    draw = random.Random(28)
    manifest = open_manifest(folder)
    path = folder / manifest.sources["long"].splits["train"].shards[0].index_file
    with path.open("rb") as file:
        good = np.load(file), np.load(file)
    stream = TokenStream(manifest, "long", "train")
    tokens = stream.read(0, stream.tokens).tolist()

    def read() -> list[int]:
        stream = TokenStream(manifest, "long", "train")
        return stream.read(0, stream.tokens).tolist()

    for _ in range(round(1000 * share)):
        arrays = [array.copy() for array in good]
        changed = draw.choice(arrays)
        changed[draw.choice(changed.dtype.names)][draw.randrange(len(changed))] = draw.choice(
            [0, 1, 7, 2**31, 2**32 - 1]
        )
        with path.open("wb") as file:
            for array in arrays:
                np.save(file, array)
        found = outcome(read)
        assert isinstance(found, str) or found == tokens  # the length of a prompt, or no change


def test_a_token_beyond_the_vocabulary_is_named(built):
    """On a GPU it would be an assertion of the device."""
    manifest = replace(open_manifest(built), vocab_size=100)
    stream = TokenStream(manifest, "long", "train")
    with pytest.raises(DataError, match=r"member 000000: it holds token \d+ of 100, it is damaged"):
        stream.read(0, stream.tokens)


# ---- files that change under a run


def test_a_change_after_the_check_is_found_at_the_next_read(folder):
    """Every byte of the tokens, long after their member was checked."""
    loader = Loader(folder, 32, 8, 1)
    before = [loader.batch(step).tokens for step in range(STEPS)]
    (shard, *_) = open_manifest(folder).sources["long"].splits["train"].shards
    with (folder / shard.file).open("r+b") as file:
        file.seek(2000)  # in the first member
        old = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([old[0] ^ 1]))
        file.flush()
        with pytest.raises(DataError, match=f"{shard.file} member 00000.: its checksum differs"):
            [loader.batch(step) for step in range(STEPS)]
        file.seek(-1, os.SEEK_CUR)
        file.write(old)
        file.flush()
        assert all((loader.batch(step).tokens == before[step]).all() for step in range(STEPS))


def test_a_shard_replaced_by_another_file_is_read_on(folder):
    """The open file is still the good one."""
    loader = Loader(folder, 32, 8, 1, packing="best_fit")
    good = seen(loader)
    for path in folder.glob("*.tar"):
        path.unlink()
        path.write_bytes(b"another build")
    assert seen(loader) == good


CUT = """
import os, sys
from pathlib import Path
from common.errors import user_errors
from data_pipeline.errors import DataError
from data_pipeline.loading.loader import Loader
from data_pipeline.shards import token_stream
folder, when, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
loader = Loader(folder, 32, 8, 1)
if when != "before":
    [loader.batch(step) for step in range(40)]
def cut():
    for path in folder.glob("long-train-*.tar"):
        os.truncate(path, size)
def while_reading(gatherer, parts, size, gather=token_stream.Gatherer.gather):
    cut()  # after the last look at the file, before it is read
    return gather(gatherer, parts, size)
if when == "while":
    token_stream.Gatherer.gather = while_reading
else:
    cut()
with user_errors(DataError):
    [loader.batch(step) for step in range(40)]
"""


@pytest.mark.parametrize("when", ["before", "between", "while"])
@pytest.mark.parametrize("size", [0, 700, 4096])
def test_a_shard_cut_short_under_a_run_is_one_line_and_no_signal(folder, when, size):
    done = subprocess.run(
        [sys.executable, "-c", CUT, str(folder), when, str(size)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert done.stderr.startswith(f"error: {folder}/long-train-0000")
    assert done.stderr.count("\n") == 1


def test_a_disk_that_fails_is_one_line(folder, monkeypatch):
    loader = Loader(folder, 32, 8, 1)

    def fails(*_: Any) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shard_files.os, "pread", fails)
    with pytest.raises(DataError, match=r"-0000\d.tar cannot be read \(Input/output error\)"):
        loader.batch(0)


def test_more_shards_than_a_process_may_open(tmp_path, make_folder):
    documents = {"short": {"train": random_documents(0, 400, 12), "validation": random_documents(1, 9, 12)}}
    folder = make_folder(tmp_path / "data", documents, shard_bytes=60)
    expected = batches(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
    try:
        assert len(list(folder.glob("short-train-*.tar"))) > 40
        assert batches(folder) == expected
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---- wrong arguments


ARGUMENTS: dict[str, Any] = {
    "path": "",
    "sequence_length": 32,
    "global_batch_size": 8,
    "seed": 1,
    "rank": 0,
    "world_size": 1,
    "split": "train",
    "packing": "concat",
    "stages": [
        {"tokens": 0, "weights": {"short": 1.0}},
        {"tokens": 5000, "weights": {"long": 1.0, "short": 2.0}},
    ],
    "shuffle_shards": 0,
    "max_damaged_rows": 0,
    "cache": None,
    "cache_bytes": None,
}


def stages_of(given: Any) -> Any:
    """As a caller in Python makes them."""
    try:
        return [Stage(**stage) for stage in given]
    except TypeError:
        return given


@few_or_all
def test_wrong_arguments_are_one_line(built, share, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    known = set(ARGUMENTS)
    for what, mutated in config_mutations({**ARGUMENTS, "path": str(built)}, round(2000 * share), seed=28):
        if set(mutated) != known:  # a keyword that is missing or unknown is an error of Python
            continue
        mutated["stages"] = stages_of(mutated["stages"])

        def three(arguments: dict[str, Any] = mutated) -> int:
            loader = Loader(**arguments)
            return sum(len(loader.batch(step).tokens) for step in (0, 1, 10**9))

        with suppress(OSError):  # of a path that is too long
            assert outcome(three), what


@pytest.mark.parametrize("step", [2**53, 2**58])
def test_a_far_step_has_its_rows(built, step):
    assert Loader(built, 32, 8, 1).batch(step).tokens.shape == (8, 32)


@pytest.mark.parametrize("step", [2**59, 2**60, 2**62, 2**64, 10**30])
def test_a_step_beyond_counting_is_one_line(built, step):
    with pytest.raises(DataError, match="beyond the last sample"):
        Loader(built, 32, 8, 1).batch(step)


@few_or_all
def test_a_wrong_config_of_a_run_is_one_line(built, tmp_path, capsys, share, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = {key: value for key, value in ARGUMENTS.items() if key not in ("rank", "world_size", "split")}
    del data["global_batch_size"], data["seed"]
    config = {
        "seed": 1,
        "global_batch_size": 8,
        "model": {"preset": "nano"},
        "data": {**data, "path": str(built), "tokenizer": None},
    }
    texts = [
        (what, yaml.safe_dump(mutated, allow_unicode=True))
        for what, mutated in config_mutations(config, round(800 * share), seed=28)
    ]
    texts += [
        (what, damaged.decode(errors="replace"))
        for what, damaged in byte_mutations(yaml.safe_dump(config).encode(), round(400 * share), seed=29)
    ]
    for what, text in texts:
        (tmp_path / "config.yaml").write_text(text)
        with suppress_exit() as stop:
            show_step(["--run", str(tmp_path), "--step", "2"])
        error = capsys.readouterr().err
        assert (stop, error) == ([], "") or (
            stop == [2] and error.startswith("error: ") and error.count("\n") == 1
        ), (what, error)


@contextmanager
def suppress_exit() -> Iterator[list[Any]]:
    """The exit code, if there is one."""
    codes: list[Any] = []
    try:
        yield codes
    except SystemExit as stop:
        codes.append(stop.code)
