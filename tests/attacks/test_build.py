"""Attacks on builds: wrong recipes and manifests, damaged work, kills and a full disk at every point."""

import errno
import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.locks import FolderInUseError
from data_pipeline import build as build_module
from data_pipeline.build import build
from data_pipeline.errors import DataError
from data_pipeline.recipe import Recipe, load_recipe, source_options
from data_pipeline.shards.manifest import open_manifest
from data_pipeline.sources.registry import read_unit, unit_files
from data_pipeline.tokenization.tokenizer import Tokenizer
from data_pipeline.verify import verify

from .mutations import byte_mutations, config_mutations

few_or_all = pytest.mark.parametrize("share", [0.1, pytest.param(1.0, marks=pytest.mark.slow)])
RECIPE: dict[str, Any] = {
    "name": "attacked",
    "seed": 1,
    "validation_fraction": 0.2,
    "tokenizer": {"vocab_size": 320, "train_bytes": 5000, "model_type": "bpe"},
    "cleaning": {"near_threshold": 0.8, "quality": {"min_words": 1}},
    "sources": [
        {"name": "prose", "kind": "text", "weight": 1, "files": ["prose.txt"], "max_bytes": 9000},
        {
            "name": "rows",
            "kind": "jsonl",
            "weight": 0.5,
            "files": ["rows.jsonl"],
            "cleaning": ["exact", "near"],
            "prompt": "q",
            "completion": "a",
            "mask_prompt": True,
        },
        {"name": "hop", "kind": "p_hop", "weight": 1, "num_samples": 20, "seed": 3, "split": "train"},
    ],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    (folder / "prose.txt").write_text(
        "".join(f"Chapter {i}. " + "water under the bridge.\n" * 90 + "\n" for i in range(6))
    )
    rows = ({"q": f"How much is {i}?", "a": f" {i} and 東京, a row of alpha beta {i}"} for i in range(20))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def recipe(root: Path) -> Recipe:
    return read(RECIPE, root.parent / "recipe.yaml")


@pytest.fixture(scope="module")
def whole(root: Path, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    build(recipe, root, out)
    return out


def read(values: dict[str, Any], path: Path) -> Recipe:
    path.write_text(yaml.safe_dump(values))
    return load_recipe(path)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def one_line(error: BaseException) -> None:
    assert len(str(error).splitlines()) == 1, error


# ---- wrong values


@few_or_all
def test_wrong_recipes_end_in_one_line(share: float, root: Path, tmp_path: Path) -> None:
    """400 recipes with one thing wrong: refused, or built."""
    refused = built = 0
    for number, (what, values) in enumerate(config_mutations(RECIPE, int(400 * share), seed=28)):
        try:
            changed = read(values, tmp_path / "recipe.yaml")
            if build_is_long(changed):
                first_documents(changed, root)
            else:
                build(changed, root, tmp_path / str(number))
                verify(tmp_path / str(number))
            built += 1
        except (DataError, OSError) as error:
            one_line(error)
            refused += 1
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
    assert refused > built > 0


def build_is_long(recipe: Recipe) -> bool:
    """A valid one that asks for very many samples."""
    asked = [source.get("num_samples") for source in recipe.sources]
    return any(isinstance(number, int) and number > 10**6 for number in asked)


def first_documents(recipe: Recipe, root: Path) -> None:
    for source in recipe.sources:
        files = unit_files(source["kind"], source_options(source), root)
        for number in range(len(files)):
            documents = read_unit(source["kind"], source_options(source), files, number)
            assert list(itertools.islice(documents, 2)) is not None


@few_or_all
def test_wrong_manifests_end_in_one_line(share: float, whole: Path, tmp_path: Path) -> None:
    """300 manifests with one thing wrong: refused, or of the same tokens."""
    out = shutil.copytree(whole, tmp_path / "out")
    values = json.loads((whole / "manifest.json").read_text())
    refused = 0
    for what, changed in config_mutations(values, int(300 * share), seed=28):
        (out / "manifest.json").write_text(json.dumps(changed))
        try:
            verify(out)
        except DataError as error:
            one_line(error)
            refused += 1
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
    assert refused > 150 * share


@few_or_all
def test_damaged_tokenizers_are_refused_or_lose_nothing(share: float, whole: Path, tmp_path: Path) -> None:
    texts = [
        "",
        " a  b ",
        "\x00\x01\t\r\n",
        "naïve 東京 \u2581 e\u0301 ﬁ 😀",
        "water under the bridge. 0123456789",
    ]
    model = (whole / "tokenizer.model").read_bytes()
    refused = 0
    for what, damaged in byte_mutations(model, int(500 * share), seed=28):
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        try:
            tokenizer = Tokenizer(tmp_path / "tokenizer.model")
        except DataError as error:
            one_line(error)
            refused += 1
            continue
        assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts, what
    assert refused > 100 * share


# ---- interruptions

STAGES = ("_plan", "write_shard", "write_manifest", "publish")


def interrupted(stage: str, recipe: Recipe, root: Path, out: Path) -> None:
    """A build into `out` that ended before `stage`."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module, stage, interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(recipe, root, out)


@few_or_all
@pytest.mark.parametrize("stage", STAGES)
def test_damaged_work_is_named_or_harmless(
    stage: str, share: float, root: Path, recipe: Recipe, whole: Path, tmp_path: Path
) -> None:
    """400 damages, to every file that an interrupted build has left. What gets into a shard, verify finds."""
    interrupted(stage, recipe, root, tmp_path / "left")
    files = sorted(path for path in (tmp_path / "left/work").rglob("*") if path.is_file())
    each = max(1, int(100 * share) // len(files))
    found = 0
    for number, path in enumerate(files):
        for what, damaged in byte_mutations(path.read_bytes() or b"\0", each, seed=number):
            out = shutil.copytree(tmp_path / "left", tmp_path / "out")
            victim = out / path.relative_to(tmp_path / "left")
            victim.write_bytes(damaged)
            refusal = None
            try:
                build(recipe, root, out)
                if contents(out) != contents(whole):
                    verify(out)
                    raise AssertionError(f"{victim}: {what}")
            except DataError as error:
                refusal = str(error)
            if refusal is not None:
                found += 1
                assert victim.stem in refusal, (refusal, victim, what)
                assert "\n" not in refusal
            shutil.rmtree(out)
    assert found > 0


class Faults:
    """Does something at the n-th change that this process makes below a folder."""

    def __init__(self) -> None:
        self.folder, self.at, self.count = "", 0, 0
        self.act: Callable[[], None] = lambda: None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.folder or event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            return
        written = event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if written and str(arguments[0]).startswith(self.folder):
            self.count += 1
            if self.count == self.at:
                self.act()

    @contextmanager
    def below(self, folder: Path, at: int, act: Callable[[], None]) -> Iterator[None]:
        self.at, self.count, self.act, self.folder = at, 0, act, str(folder)
        try:
            yield
        finally:
            self.folder = ""


FAULTS = Faults()


def number_of_changes(recipe: Recipe, root: Path, out: Path) -> int:
    with FAULTS.below(out, 0, lambda: None):
        build(recipe, root, out)
    return FAULTS.count


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@few_or_all
def test_disk_full_at_every_write(
    share: float, root: Path, recipe: Recipe, whole: Path, tmp_path: Path
) -> None:
    count = number_of_changes(recipe, root, tmp_path / "count")
    assert count > 120
    for at in range(1, count + 1, int(1 / share)):
        out = tmp_path / str(at)
        with FAULTS.below(out, at, disk_full), pytest.raises(OSError, match="No space left") as full:
            build(recipe, root, out)
        one_line(full.value)
        assert str(full.value.filename).startswith(str(out))
        safe = f"bytes free); nothing was replaced, and what is done is kept in {out / 'work'}: free some"
        assert safe in str(full.value)
        build(recipe, root, out)
        assert contents(out) == contents(whole), at
        shutil.rmtree(out)


@few_or_all
def test_killed_at_every_change(
    share: float, root: Path, recipe: Recipe, whole: Path, tmp_path: Path
) -> None:
    """SIGKILL before one change of the folder after the other; then the build goes on."""
    count = number_of_changes(recipe, root, tmp_path / "count")
    for at in range(2, count + 1, int(1 / share)):
        out = tmp_path / str(at)
        process = os.fork()
        if not process:
            with FAULTS.below(out, at, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                build(recipe, root, out)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL, at
        build(recipe, root, out)
        assert contents(out) == contents(whole), at
        shutil.rmtree(out)


@pytest.mark.slow
def test_killed_with_workers(root: Path, recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    """The parent alone is killed: no worker goes on writing beside the next build."""
    for at in range(4, 64, 4):
        out = tmp_path / str(at)
        process = os.fork()
        if not process:
            with FAULTS.below(out, at, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                build(recipe, root, out, workers=3)
            os._exit(0)
        os.waitpid(process, 0)
        while True:
            try:
                build(recipe, root, out)
                break
            except FolderInUseError:  # until the workers have noticed
                continue
        assert contents(out) == contents(whole), at


@pytest.mark.parametrize("processes", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_builds_at_once_into_one_folder(
    processes: int, root: Path, recipe: Recipe, whole: Path, tmp_path: Path
) -> None:
    out, children = tmp_path / "out", []
    for _ in range(processes):
        child = os.fork()
        if not child:
            try:
                build(recipe, root, out)
                os._exit(0)
            except FolderInUseError:
                os._exit(3)
            finally:
                os._exit(1)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert set(codes) <= {0, 3}
    assert 0 in codes
    assert contents(out) == contents(whole)
    assert open_manifest(out).build_hash == open_manifest(whole).build_hash
