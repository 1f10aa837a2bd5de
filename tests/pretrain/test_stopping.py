"""Runs stopped from outside: all ranks stop together, with a checkpoint, and nothing is lost."""

import json
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from .conftest import finish, start, unlink_buffer

STEPS = 20


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Returns once the run has logged that step, which it has then finished."""
    path, deadline = run / "metrics.jsonl", time.monotonic() + 400  # on a busy machine
    while not path.exists() or path.read_text().count("\n") < step:
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def processes(launcher: subprocess.Popen[str], name: str) -> list[psutil.Process]:
    """The launched processes with `name` in their command lines."""
    children = psutil.Process(launcher.pid).children(recursive=True)
    return [child for child in children if any(name in part for part in child.cmdline())]


@pytest.fixture(scope="module")
def undisturbed(train, tmp_path_factory) -> list[float]:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(run, f"max_steps={STEPS}")
    return losses(run)


def test_a_run_stopped_in_every_way_ends_as_if_undisturbed(begin, launch, training, undisturbed, tmp_path):
    run = tmp_path / "run"
    command = training(run, f"max_steps={STEPS}", "save_every=1000")

    def signal_rank(launcher):
        launcher.rank(1).send_signal(signal.SIGUSR1)

    def signal_launcher(launcher):
        processes(launcher, "deepspeed.launcher.launch")[0].send_signal(signal.SIGTERM)

    ways = (
        (begin, lambda _: (run / "STOP").touch(), f"by the file {run / 'STOP'}", 0),
        (begin, signal_rank, "by another rank's request", 0),
        (start, signal_launcher, "by SIGTERM", 1),  # the launcher fails whatever its ranks do
    )
    done = 0
    for go, stop, reason, code in ways:
        launcher = go(2, *command)
        wait_for_step(run, done + 2, launcher)
        stop(launcher)
        asked = time.monotonic()
        result = finish(launcher, check=False)
        assert time.monotonic() - asked < 25
        assert result.returncode == code, result.stderr
        stopped = len(losses(run))
        assert f"stopped after step {stopped} {reason}; the same command continues" in result.stdout
        assert done + 2 <= stopped < STEPS
        assert (run / "checkpoints" / "latest").read_text() == f"step-{stopped}\n"
        assert not (run / "DONE").exists()
        done = stopped
    launch(2, *command)
    assert losses(run) == undisturbed
    assert (run / "DONE").exists()


def test_a_dead_rank_ends_the_run_with_one_error(training, tmp_path):
    run = tmp_path / "run"
    launcher = start(2, *training(run, "max_steps=100000"))
    wait_for_step(run, 2, launcher)
    processes(launcher, "--local_rank=1")[0].kill()
    killed = time.monotonic()
    result = finish(launcher, check=False)
    unlink_buffer(launcher)
    assert time.monotonic() - killed < 30
    assert result.returncode
    assert "Traceback" not in result.stderr, result.stderr
    assert result.stderr.count("error: ") == 1, result.stderr


def test_a_time_limit_stops_the_run(train, tmp_path):
    run = tmp_path / "run"
    output = train(run, "max_steps=100000", "time_limit_minutes=0.02", "ep_size=1", ranks=1).stdout
    assert f"stopped after step {len(losses(run))} by time_limit_minutes" in output
