"""Old checkpoints are deleted without breaking one; foreign files beside them do no harm."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from pretrain import checkpoint
from pretrain.checkpoint import CheckpointError
from pretrain.saver import rotate

from .conftest import seal
from .one_rank import save_step, saver, step_held


def sealed(run: Path, step: int) -> Path:
    folder = run / f"checkpoints/step-{step}"
    folder.mkdir(parents=True)
    (folder / checkpoint.STATE).write_text("{}")
    (folder / checkpoint.BUFFERS).write_bytes(b"buffers")
    seal(folder)
    return folder


@pytest.fixture
def undeletable(monkeypatch) -> set[str]:
    """Names of files that cannot be deleted, as on a file system that says so only then."""
    names, unlink = set(), os.unlink

    def checked(path, **more):
        if Path(path).name in names:
            raise OSError(errno.EBUSY, "Device or resource busy", path)
        unlink(path, **more)

    monkeypatch.setattr(os, "unlink", checked)
    return names


def test_rotation_keeps_the_last_and_every_nth(tmp_path):
    for step in range(1, 13):
        if step in (7, 12):  # 7 was left behind by a kill, 12 is being written
            (tmp_path / f"checkpoints/step-{step}").mkdir(parents=True)
        else:
            sealed(tmp_path, step)
    assert rotate(tmp_path, step=11, keep_last=2, keep_every=4) == []
    assert checkpoint.steps(tmp_path) == [12, 11, 10, 8, 4]
    assert checkpoint.newest(tmp_path)[0] == tmp_path / "checkpoints/step-11"
    assert rotate(tmp_path, step=11, keep_last=1, keep_every=0) == []
    assert checkpoint.steps(tmp_path) == [12, 11]


def test_a_checkpoint_that_cannot_be_deleted_is_named_at_every_save_until_it_can(tmp_path, undeletable):
    told: list[str] = []
    writer = saver(tmp_path, keep_last=1, warn=told.append)
    undeletable.add("weights.pt")
    for step in (1, 2, 3):
        save_step(writer, step)
    stuck = [tmp_path / f"checkpoints/removing-step-{step}" for step in (1, 2)]
    line = (
        "warning: {} cannot be deleted (weights.pt: Device or resource busy); the next checkpoint tries again"
    )
    assert told == [line.format(folder) for folder in (stuck[0], *stuck)]
    assert all(
        [path.name for path in folder.iterdir()] == ["weights.pt"] for folder in stuck
    )  # no more than it
    assert checkpoint.newest(tmp_path) == (tmp_path / "checkpoints/step-3", {})
    undeletable.clear()
    save_step(writer, 4)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-4"]


def test_what_a_kill_during_the_last_rotation_left_is_deleted_at_the_next_start(tmp_path):
    writer = saver(tmp_path, keep_last=1)
    for step in (1, 2, 3):
        save_step(writer, step)
        shutil.copytree(tmp_path / f"checkpoints/step-{step}", tmp_path / str(step))
    shutil.copytree(tmp_path / "1", tmp_path / "checkpoints/removing-step-1")
    shutil.copytree(tmp_path / "2", tmp_path / "checkpoints/step-2")
    saver(tmp_path, keep_last=1).rotate(3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-3"]


def test_a_checkpoint_that_cannot_be_renamed_stays_whole(tmp_path, monkeypatch):
    told: list[str] = []
    writer = saver(tmp_path, keep_last=1, warn=told.append)
    save_step(writer, 1)
    rename = Path.rename

    def refused(self, target):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(self))

    monkeypatch.setattr(Path, "rename", refused)
    save_step(writer, 2)
    (warning,) = told
    assert "step-1 cannot be deleted (step-1: Operation not permitted)" in warning
    assert step_held(tmp_path / "checkpoints/step-1") == 1
    monkeypatch.setattr(Path, "rename", rename)
    save_step(writer, 3)
    assert checkpoint.steps(tmp_path) == [3]


def test_a_damaged_attempt_at_a_step_that_cannot_be_deleted_is_set_aside(tmp_path, undeletable):
    told: list[str] = []
    writer = saver(tmp_path, warn=told.append)
    save_step(writer, 2)
    (tmp_path / "checkpoints/step-2/manifest.json").write_text("{")
    undeletable.add("weights.pt")
    save_step(writer, 2)
    assert step_held(tmp_path / "checkpoints/step-2") == 2
    assert "removing-step-2 cannot be deleted" in told[0]


def test_foreign_names_and_links_beside_checkpoints_are_left_alone(tmp_path):
    writer = saver(tmp_path, keep_last=1)
    save_step(writer, 1)
    folder = tmp_path / "checkpoints"
    for name in ("step-07", "step-1e3", "step-²", "step-", "step-+2", "step--1", "step-0x3"):
        (folder / name).mkdir()
    (folder / "step-9").write_text("a file of the user")
    elsewhere = tmp_path / "elsewhere"
    (folder / "step-1").rename(elsewhere)
    (folder / "step-1").symlink_to(elsewhere)
    before = {path.name for path in folder.iterdir()}
    assert checkpoint.steps(tmp_path) == [1]
    assert checkpoint.newest(tmp_path) == (folder / "step-1", {})  # a linked one can be resumed from
    for step in (2, 3):
        save_step(writer, step)
    assert {path.name for path in folder.iterdir()} == before | {"step-3"}
    assert step_held(folder / "step-3") == 3
    save_step(writer, 1)  # a step that has a link's name replaces the link alone
    assert checkpoint.damage(elsewhere) is None
    assert not (folder / "step-1").is_symlink()


def test_a_full_disk_at_latest_does_not_fail_the_save(tmp_path):
    told: list[str] = []
    (tmp_path / "checkpoints/latest").mkdir(parents=True)  # cannot be replaced by a file
    save_step(saver(tmp_path, warn=told.append), 1)
    assert step_held(tmp_path / "checkpoints/step-1") == 1
    (warning,) = told
    assert warning.startswith(f"warning: {tmp_path}/checkpoints/latest: Is a directory (")
    assert warning.endswith("step-1 is whole all the same")


def test_a_checkpoint_is_not_saved_without_the_metrics_up_to_it(tmp_path):
    def before() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    writer = saver(tmp_path)
    save_step(writer, 1)
    with pytest.raises(CheckpointError, match="of step 2 could not be written: metrics.jsonl: No space left"):
        save_step(writer, 2, before=before)
    assert checkpoint.newest(tmp_path) == (tmp_path / "checkpoints/step-1", {})


def test_a_failed_save_is_known_before_it_is_waited_for(tmp_path):
    writer = saver(tmp_path)
    assert not writer.failed()
    save_step(writer, 1)
    assert not writer.failed()
    (tmp_path / "checkpoints/step-2").write_text("a file")
    with pytest.raises(CheckpointError, match=r"step-2: File exists \(.* bytes free\); nothing was written"):
        save_step(writer, 2)
    writer.save(checkpoint.read(tmp_path / "checkpoints/step-1")[0])
    writer.thread.shutdown()
    assert not writer.failed()
    assert writer.idle()


def test_an_unreadable_folder_of_checkpoints_is_not_an_empty_one(tmp_path):
    folder = tmp_path / "checkpoints"
    assert checkpoint.steps(tmp_path) == []
    folder.symlink_to(tmp_path / "unmounted")
    with pytest.raises(FileNotFoundError, match="checkpoints is a link to nothing; mount what it links to"):
        checkpoint.steps(tmp_path)
    folder.unlink()
    folder.write_text("a file")
    with pytest.raises(NotADirectoryError):
        checkpoint.steps(tmp_path)


def test_a_file_that_cannot_be_read_is_damage(tmp_path, monkeypatch):
    folder = sealed(tmp_path, 1)
    (folder / "shard.pt").write_bytes(b"state")
    seal(folder)
    assert checkpoint.damage(folder) is None
    opened = Path.open

    def failing(self, *arguments, **more):
        if self.name == "shard.pt":
            raise OSError(errno.EIO, "Input/output error", str(self))
        return opened(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", failing)
    assert checkpoint.damage(folder) == "shard.pt cannot be read: Input/output error"
