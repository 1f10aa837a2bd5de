"""Locks of folders: across processes, after crashes, and under contention."""

import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from common.locks import LOCK_NAME, FolderInUseError, FolderLock

HOLD = """
import sys, pathlib
from common.locks import FolderLock
lock = FolderLock(pathlib.Path(sys.argv[1]), "a test", "choose another", shared=sys.argv[2] == "shared")
print("held", flush=True)
sys.stdin.read()
"""


def _holder(folder: Path, how: str = "alone") -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_second_process_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    process = _holder(tmp_path)
    with pytest.raises(FolderInUseError) as refusal:
        FolderLock(tmp_path, "a second", "choose another output_dir")
    line = str(refusal.value)
    assert f"{tmp_path} is in use by a test, process {process.pid} on " in line
    assert line.endswith("choose another output_dir")
    process.communicate()
    FolderLock(tmp_path, "a second", "choose another output_dir").release()


def test_killed_holder_leaves_the_folder_free(tmp_path: Path) -> None:
    process = _holder(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert (tmp_path / LOCK_NAME).exists()
    FolderLock(tmp_path, "the next", "-").release()
    assert not (tmp_path / LOCK_NAME).exists()


def test_shared_locks_exclude_only_exclusive_ones(tmp_path: Path) -> None:
    process = _holder(tmp_path, "shared")
    shared = FolderLock(tmp_path, "another task", "-", shared=True)
    with pytest.raises(FolderInUseError):
        FolderLock(tmp_path, "a whole build", "-")
    process.communicate()
    with pytest.raises(FolderInUseError):
        FolderLock(tmp_path, "a whole build", "-")
    shared.release()
    FolderLock(tmp_path, "a whole build", "-").release()


def test_child_processes_do_not_keep_the_lock(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path, "a parent", "-")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    lock.release()
    FolderLock(tmp_path, "the next", "-").release()
    child.communicate(b"\n")


def _count(folder: str, times: int) -> None:
    """Adds 1 to a number in a file, `times` times, each under the lock."""
    done = 0
    while done < times:
        try:
            with FolderLock(Path(folder), "a counter", "-"):
                file = Path(folder) / "number"
                number = int(file.read_text())
                file.write_text(str(number + 1))
                done += 1
        except FolderInUseError:
            continue


def test_deleting_the_file_never_lets_two_processes_in(tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_count, args=(str(tmp_path), 200)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "number").read_text() == "600"


def _wait(lock: object, ready: Connection, go: Connection) -> None:
    ready.send(None)
    go.recv()


def test_a_spawned_process_holds_the_lock_too(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, child_ready = context.Pipe()
    go, child_go = context.Pipe()
    lock = FolderLock(tmp_path, "a test", "-", shared=True)
    process = context.Process(target=_wait, args=(lock, child_ready, child_go))
    process.start()
    ready.recv()
    lock.release()
    with pytest.raises(FolderInUseError, match="in use by a test"):
        FolderLock(tmp_path, "the next", "-")
    go.send(None)
    process.join()
    FolderLock(tmp_path, "the next", "-").release()
