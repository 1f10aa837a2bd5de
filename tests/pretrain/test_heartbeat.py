"""Ranks that others wait for: named, with their last action, and not given up while they work."""

import json
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from pretrain import heartbeat
from pretrain.heartbeat import ALIVE, FOLDER, SAVING, TRAINING, Heartbeat, Watcher, path_of, read
from pretrain.patience import gather_when_done

from .conftest import finish

WORKER = Path(__file__).with_name("heartbeat_worker.py")


def test_a_stopped_rank_is_named_by_the_others_and_a_busy_one_is_waited_for(begin, tmp_path):
    """A real group of three: rank 2 is stopped, then rank 0, who is the one that watches."""
    (tmp_path / "heartbeats").mkdir()
    (tmp_path / "heartbeats" / "rank-7").write_text("of a killed run")
    heartbeat.clear(tmp_path)
    launched = begin(3, WORKER, tmp_path, "0.6")
    for stopped, speaker, step in ((2, 0, 2), (0, 1, 4)):
        wanted = (
            rf"^rank {speaker}: warning: 2 of 3 ranks wait for rank {stopped} \(rank {stopped}: stopped, "
            rf'dead or cut off\), whose last action, \d+ s ago, was "forward" in step {step}; theirs is '
            rf'"sum of losses" in step {step}$'
        )
        deadline = time.monotonic() + 100
        while not re.search(wanted, launched.out.read_text(), re.M):
            assert launched.poll() is None, finish(launched)
            assert time.monotonic() < deadline, launched.out.read_text()
            time.sleep(0.02)
        launched.rank(stopped).send_signal(signal.SIGCONT)
    finish(launched)
    assert not (tmp_path / FOLDER).exists()


class Ranks:
    """The files of some ranks, written by hand."""

    def __init__(self, folder: Path, number: int) -> None:
        self.all = [Heartbeat(folder, rank) for rank in range(number)]

    def live(self, but: tuple[int, ...] = ()) -> None:
        for rank in self.all:
            if rank.rank not in but:
                rank.note(ALIVE, "runs")

    def step(self, step: int, but: tuple[int, ...] = ()) -> None:
        for rank in self.all:
            rank.note(TRAINING, "forward", step)
        for rank in self.all:
            if rank.rank not in but:
                rank.note(TRAINING, "sum of losses")


def test_a_standstill_is_told_once_and_again_after_progress(tmp_path):
    ranks = Ranks(tmp_path / FOLDER, 10)
    watcher = Watcher(tmp_path / FOLDER, 0, 10, limit=60, now=0)
    ranks.step(5, but=(3, 4))
    told = []
    for now in range(10, 200, 10):
        ranks.live()
        told.append(watcher.look(now))
    line = (
        'warning: 8 of 10 ranks wait for ranks 3, 4, whose last action, 60 s ago, was "forward" in step 5; '
        'theirs is "sum of losses" in step 5'
    )
    assert [text for text in told if text] == [line]
    assert told[6] == line  # seen at 10, not moved until 70
    for rank in (3, 4):
        ranks.all[rank].note(TRAINING, "sum of losses")
    ranks.step(6)
    quiet = [watcher.look(now) for now in range(200, 260, 10)]
    ranks.live()
    again = watcher.look(260)
    assert quiet == [None] * 6
    assert again is not None
    assert again.startswith(
        'warning: none of the 10 ranks moves; their last action, 60 s ago, was "sum of losses" in step 6: '
    )


def test_a_rank_that_works_on_is_no_standstill(tmp_path):
    """Others may wait long for rank 0, who does one thing after another."""
    ranks = Ranks(tmp_path / FOLDER, 2)
    watcher = Watcher(tmp_path / FOLDER, 0, 2, limit=60, now=0)
    ranks.step(1)
    for now in range(10, 300, 10):
        ranks.live()
        ranks.all[0].note(TRAINING, f"file {now}")
        assert watcher.look(now) is None


def test_a_checkpoint_that_one_rank_cannot_write_names_that_rank(tmp_path):
    ranks = Ranks(tmp_path / FOLDER, 3)
    watcher = Watcher(tmp_path / FOLDER, 0, 3, limit=60, now=0)
    for rank in ranks.all:
        rank.note(TRAINING, "save", 8)
        rank.note(SAVING, "write of the checkpoint", 4)
        if rank.rank != 1:
            rank.note(SAVING, "wait for the other ranks")
    told = []
    for now in range(10, 80, 10):
        ranks.live()
        told.append(watcher.look(now))
    assert told[-1] == (
        'warning: 2 of 3 ranks wait for rank 1, whose last action, 60 s ago, was "save" in step 8, and '
        '"write of the checkpoint" in step 4; theirs is "save" in step 8, and "wait for the other ranks" in '
        "step 4"
    )


def test_only_the_lowest_rank_that_runs_speaks_and_only_if_rank_0_does_not(tmp_path):
    ranks = Ranks(tmp_path / FOLDER, 4)
    watchers = {rank: Watcher(tmp_path / FOLDER, rank, 4, limit=60, now=0) for rank in (1, 2, 3)}
    ranks.step(3, but=(0, 1))
    told = {rank: [] for rank in watchers}
    for now in range(10, 250, 10):
        ranks.live(but=(0, 1))
        for rank in (2, 3):  # 1 is dead too
            told[rank].append(watchers[rank].look(now))
    assert not any(told[3])
    [line] = [text for text in told[2] if text]
    assert "2 of 4 ranks wait for ranks 0, 1 (ranks 0, 1: stopped, dead or cut off), whose last" in line


def test_a_watcher_that_was_stopped_itself_blames_nobody(tmp_path):
    ranks = Ranks(tmp_path / FOLDER, 2)
    watcher = Watcher(tmp_path / FOLDER, 0, 2, limit=60, now=0)
    ranks.step(3, but=(0,))
    assert watcher.look(10) is None
    assert watcher.look(5000) is None


def test_a_file_is_read_whole_or_not_at_all(tmp_path):
    own = Heartbeat(tmp_path, 3)
    own.note(ALIVE, "runs")
    own.note(TRAINING, "x" * 500, 7)
    own.note(TRAINING, "backward 2/4", 10**9)
    training, saving, alive = read(path_of(tmp_path, 3))
    assert training is not None
    assert (training["action"], training["step"], training["count"]) == ("backward 2/4", 10**9, 2)
    assert saving is None
    assert alive is not None
    text = path_of(tmp_path, 3).read_bytes()
    for cut in range(0, len(text), 7):
        path_of(tmp_path, 3).write_bytes(text[:cut])
        assert all(line is None or json.dumps(line) for line in read(path_of(tmp_path, 3)))
    assert read(tmp_path / "rank-8") == [None] * 3


def test_a_folder_that_cannot_be_written_ends_nothing(tmp_path):
    (tmp_path / FOLDER).write_text("a file")
    own = Heartbeat(tmp_path / FOLDER, 0)
    own.note(TRAINING, "forward", 1)
    own.close()
    assert (tmp_path / FOLDER).read_text() == "a file"


def test_a_rank_that_is_lost_while_another_works_ends_the_work_with_an_error():
    asked = threading.Event()

    def gather(value):
        asked.set()
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(RuntimeError, match="closed by peer"):
        gather_when_done(gather, lambda: asked.wait(60), patience=0.0)
