"""Whose an output folder is: two builds at once, what a resumed build compares, and files of the user."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from common.locks import FolderInUseError
from data_pipeline import build as build_module
from data_pipeline.build import build, main
from data_pipeline.cleaning import cleaner
from data_pipeline.errors import DataError
from data_pipeline.recipe import Recipe, load_recipe
from data_pipeline.staging import claim, inputs
from data_pipeline.staging.claim import held, held_by_task
from data_pipeline.staging.units import Units
from data_pipeline.tokenization.tokenizer import train_tokenizer

TEXT = "".join(f"Chapter {i}. " + "water under the bridge.\n" * 90 + "\n" for i in range(6))
RECIPE = {
    "name": "folder",
    "validation_fraction": 0.2,
    "tokenizer": {"vocab_size": 300, "train_bytes": 5000, "model_type": "bpe"},
    "sources": [
        {"name": "prose", "kind": "text", "weight": 1, "files": ["prose.txt"]},
        {"name": "hop", "kind": "p_hop", "weight": 1, "num_samples": 20},
    ],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/prose.txt").write_text(TEXT)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path / "raw"


@pytest.fixture
def recipe(root: Path) -> Recipe:
    return load_recipe(root.parent / "recipe.yaml")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop_before(stage: str, recipe: Recipe, root: Path, out: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module, stage, interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(recipe, root, out)


# ---- two at once


def test_a_build_is_alone(root, recipe, out, capsys):
    with held(out, None):
        with pytest.raises(FolderInUseError, match="in use by a build, process .* choose another --out"):
            build(recipe, root, out)
        with pytest.raises(FolderInUseError, match="in use by a build"):
            build(recipe, root, out, task=(0, 2))
        command = ["--recipe", root.parent / "recipe.yaml", "--data", root, "--out", out]
        with pytest.raises(SystemExit, match="2"):
            main(list(map(str, command)))
    assert capsys.readouterr().err.startswith(f"error: {out} is in use by a build")
    assert build(recipe, root, out) is not None
    assert not [name for name in contents(out) if "lock" in name]


def test_tasks_share_a_folder_but_no_share(root, recipe, out):
    build(recipe, root, out, task=(0, 2))
    with held(out, (0, 2)), held_by_task(out / "work", (0, 2)):
        for other, message in (
            ((0, 2), "task 0 of 2 of a build, process .* give every task its own --task"),
            ((1, 3), "tasks of a build, the last to start being 0 of 2, .* give every task the same --of"),
            (None, "tasks of a build, the last to start being .* choose another --out"),
        ):
            with pytest.raises(FolderInUseError, match=message):
                build(recipe, root, out, task=other)
        with pytest.raises(FolderInUseError, match="choose another --out"):
            build(recipe, root, out, plan_only=True)
        build(recipe, root, out, task=(1, 2))
    build(recipe, root, out)
    build(recipe, root, out.with_name("alone"))
    assert contents(out) == contents(out.with_name("alone"))


def test_a_file_as_folder(root, recipe, out):
    out.write_text("mine")
    with pytest.raises(DataError, match="--out .*out is a file: give a folder"):
        build(recipe, root, out)


# ---- what a resumed build compares


def change_content(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same size, and with the times that it had."""
    path = root / "prose.txt"
    before = path.stat()
    path.write_text(TEXT.replace("water", "paper"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def change_code(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "LIBRARIES", ("numpy",))


def change_test_set(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (root / "gsm8k/test.jsonl").open("a") as file:
        file.write("\n")


def change_tokenizer(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "own.model").write_bytes(train_tokenizer([TEXT], 300, "bpe"))


def rename_input(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "prose.txt").rename(root / "prosa.txt")


@pytest.mark.parametrize("task", [None, (0, 1)])
@pytest.mark.parametrize("stage", ["_plan", "_merge"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_content, "prose.txt has changed since this build read it: restore it, or delete"),
        (change_code, r"a part of another build \(different: code\)"),
        (change_test_set, r"different: test sets\)"),
        (change_tokenizer, r"different: tokenizer.file\)"),
        (rename_input, r"different: names of the input files\)"),
    ],
)
def test_what_the_bytes_depend_on_is_compared(
    stage: str,
    task: tuple[int, int] | None,
    change: Callable[[Path, pytest.MonkeyPatch], None],
    message: str,
    root: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(inputs, "EVALUATION_FILES", ("gsm8k/test.jsonl",))
    finds_nothing = SimpleNamespace(match=lambda text: None)
    monkeypatch.setattr(cleaner, "_decontaminator", lambda root, words: finds_nothing)
    (root / "gsm8k").mkdir()
    (root / "gsm8k/test.jsonl").write_text("{}")
    (root / "own.model").write_bytes(train_tokenizer([TEXT], 310, "bpe"))
    (root.parent / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    pattern = ["sources.0.files=[pros*.txt]", "sources.0.cleaning=[decontaminate]"]
    own = [f"tokenizer.file={root / 'own.model'}", "tokenizer.vocab_size=null"]
    recipe = load_recipe(root.parent / "recipe.yaml", [*pattern, *own])
    stop_before(stage, recipe, root, out)
    change(root, monkeypatch)
    if task or change is change_content:
        with pytest.raises(DataError, match=message):
            build(recipe, root, out, task=task)
        return
    build(recipe, root, out)
    assert re.search(message + ": it is deleted, and this one starts", capsys.readouterr().err)
    build(recipe, root, out.with_name("fresh"))
    assert contents(out) == contents(out.with_name("fresh"))


def test_a_touched_file_is_the_same(root, recipe, out):
    stop_before("_plan", recipe, root, out)
    (root / "prose.txt").touch()
    shutil.copytree(root, root.with_name("elsewhere"))
    build(recipe, root.with_name("elsewhere"), out)
    build(recipe, root, out.with_name("fresh"))
    assert contents(out) == contents(out.with_name("fresh"))


def test_a_file_that_changes_while_it_is_read(root, recipe, out, monkeypatch):
    read = build_module.read_unit

    def changing(kind, *rest):
        yield from read(kind, *rest)
        (root / "prose.txt").touch()

    monkeypatch.setattr(build_module, "read_unit", changing)
    with pytest.raises(DataError, match="prose.txt changed while it was read: start the build again"):
        build(recipe, root, out)
    monkeypatch.undo()
    assert build(recipe, root, out) is not None


# ---- files of the user


@pytest.mark.parametrize("name", ["work/thesis.txt", "tokenizer.model", "prose-train-00000.tar"])
def test_files_that_were_there_before(root, recipe, out, name):
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    with pytest.raises(DataError, match="choose another --out, or move it away"):
        build(recipe, root, out)
    assert (out / name).read_text() == "mine"


def test_the_named_tokenizer_in_out(root, recipe, out):
    out.mkdir()
    model = train_tokenizer([TEXT], 300, "bpe")
    (out / "tokenizer.model").write_bytes(model)
    own = [f"tokenizer.file={out / 'tokenizer.model'}", "tokenizer.vocab_size=null"]
    with pytest.raises(DataError, match=r"out holds 'tokenizer.model' and no finished build"):
        build(load_recipe(root.parent / "recipe.yaml", own), root, out)
    assert (out / "tokenizer.model").read_bytes() == model


def test_files_that_come_while_it_works(root, recipe, out, capsys):
    """Into the work folder, and where a result goes."""
    stop_before("publish", recipe, root, out)
    (out / "work/notes.txt").write_text("mine")
    (out / "tokenizer.model").write_text("mine")
    with pytest.raises(DataError, match=r"tokenizer.model is in the way of the build: move it away"):
        build(recipe, root, out)
    assert (out / "tokenizer.model").read_text() == "mine"
    (out / "tokenizer.model").unlink()
    assert build(recipe, root, out) is not None
    assert "notes.txt is not the build's and stays there" in capsys.readouterr().err
    assert (out / "work/notes.txt").read_text() == "mine"
    assert build(recipe, root, out) is not None
    assert (out / "work/notes.txt").read_text() == "mine"


def test_another_builds_work_is_not_deleted_with_a_users_file(root, recipe, out):
    stop_before("_merge", recipe, root, out)
    (out / "work/prose-00000/notes.txt").write_text("mine")
    other = load_recipe(root.parent / "recipe.yaml", ["seed=5"])
    with pytest.raises(DataError, match="notes.txt, which is not its own"):
        build(other, root, out)
    (out / "work/prose-00000/notes.txt").unlink()
    assert build(other, root, out) is not None


def test_a_link_as_work(root, recipe, out):
    (out.parent / "elsewhere").mkdir()
    out.mkdir()
    (out / "work").symlink_to(out.parent / "elsewhere")
    with pytest.raises(DataError, match="work is not the work folder of a build"):
        build(recipe, root, out)


# ---- torn work


@pytest.mark.parametrize("name", ["texts.bin", "documents.npy", "about.json"])
def test_a_unit_of_another_size_is_named(root, recipe, out, name):
    stop_before("_plan", recipe, root, out)
    path = out / "work/prose-00000" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{name} is damaged .*: delete the folder work/ of this build"):
        build(recipe, root, out)


def test_a_text_that_was_overwritten_is_named(root, recipe, out):
    stop_before("_plan", recipe, root, out)
    path = out / "work/prose-00000/texts.bin"
    path.write_bytes(bytes(path.stat().st_size))
    units = Units([out / "work/prose-00000"])
    with pytest.raises(DataError, match=r"texts.bin is damaged \(the checksum of document 0 differs\)"):
        units[0]
    path.unlink()
    with pytest.raises(DataError, match=r"texts.bin is damaged \(it has None bytes"):
        build(recipe, root, out)
