"""Attacks on launches: killed launchers and ranks, two runs in one folder, signals at every phase."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.locks import FolderLock
from pretrain.launch import free_port
from pretrain.stopping import StopRequests

from ..conftest import ROOT
from ..pretrain.conftest import BIN, finish, start
from ..pretrain.test_stopping import losses, processes, wait_for_step

DEADLINE = 400.0  # seconds on a busy machine, far more than anything here takes
STEPS = 20
NEVER = ("save_every=1000", "eval_every=0")  # only stopping saves a checkpoint


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, what
        threading.Event().wait(0.05)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- launchers


def torchrun(ranks: int, *command: Any) -> subprocess.Popen[str]:
    call = [BIN / "torchrun", f"--nproc_per_node={ranks}", "--master_port", free_port(), *command]
    return subprocess.Popen([str(part) for part in call], cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("launcher", "victim"),
    [
        (start, "bin/deepspeed"),
        pytest.param(start, "deepspeed.launcher.launch", marks=pytest.mark.slow),
        pytest.param(torchrun, "bin/torchrun", marks=pytest.mark.slow),
    ],
    ids=["deepspeed", "launch", "torchrun"],
)
def test_ranks_whose_launcher_is_killed_stop_and_the_same_command_resumes(
    launcher, victim, launch, train, training, tmp_path
):
    """While they still train, a second run of the command is refused."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    command = training(run, f"max_steps={STEPS}", *NEVER)
    train(whole, f"max_steps={STEPS}", *NEVER)
    process = launcher(2, *command)
    wait_for_step(run, 2, process)
    started = processes(process, "pretrain/main.py")
    ranks = [rank for rank in started if rank.cmdline()[2] == "pretrain/main.py"]
    assert len(ranks) == 2
    for rank in ranks:
        rank.suspend()
    next(p for p in (psutil.Process(process.pid), *started) if victim in " ".join(p.cmdline())).kill()
    before = contents(run)
    second = launch(2, *command, check=False)
    assert second.stderr.count("error: ") == 1, second.stderr
    assert f"error: {run} is in use by a training run, process {ranks[0].pid} on " in second.stderr
    assert contents(run) == before
    for rank in ranks:
        rank.resume()
    out = finish(process, check=False).stdout
    stopped = len(losses(run))
    assert 2 <= stopped < STEPS
    assert f"stopped after step {stopped} by the end of its launcher; the same command continues" in out
    assert not any(rank.is_running() and rank.status() != "zombie" for rank in ranks)
    assert (run / f"checkpoints/step-{stopped}").is_dir()
    assert f"resuming from {run}/checkpoints/step-{stopped}" in launch(2, *command).stdout
    assert losses(run) == losses(whole)


def waiting_rank(folder: Path, training, run: Path, variables: dict[str, str]) -> subprocess.Popen[str]:
    """A launcher named deepspeed, which only starts this rank of two and waits for it."""
    script = folder / "deepspeed"
    script.write_text("import subprocess, sys\nsys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))\n")
    command = [sys.executable, script, *training(run, "max_steps=3")]
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=os.environ | {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"} | variables,
        stderr=subprocess.PIPE,
        text=True,
    )


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("attack", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow), "launcher"])
def test_a_rank_that_waits_for_the_others_ends_with_a_line(attack, training, tmp_path):
    """It waits inside torch, where no Python code runs."""
    port = free_port()
    launcher = waiting_rank(tmp_path, training, tmp_path / "run", {"RANK": "0", "MASTER_PORT": str(port)})
    until(lambda: listens(port), "rank 0 waits")
    (rank,) = psutil.Process(launcher.pid).children()
    if attack == "launcher":
        launcher.kill()
    else:
        rank.send_signal(getattr(signal, attack))
    cause = "the end of its launcher" if attack == "launcher" else attack
    error = launcher.communicate(timeout=DEADLINE)[1]
    line = f"stopped before the first step by {cause}; no checkpoint was written; the same command starts"
    assert line in error, error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


# ---- one run per folder


def test_a_second_run_in_a_folder_changes_nothing(six_steps, train, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(six_steps, run)
    (run / "STOP").touch()  # a request to the run that holds the folder
    with FolderLock(run, "a training run", "-"):
        before = contents(run)
        done = train(run, "max_steps=8", "save_every=2", check=False)
        assert contents(run) == before
    assert done.returncode
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert f"{run} is in use by a training run, process {os.getpid()} on " in done.stderr
    assert "wait until it ends, or choose another output_dir" in done.stderr


def test_a_dry_run_takes_no_lock_and_makes_no_folder(train, tmp_path):
    assert "layout" in train(tmp_path / "run", "max_steps=8", "--dry-run").stdout
    assert not (tmp_path / "run").exists()
    with FolderLock(tmp_path / "run", "a training run", "-"):
        assert "layout" in train(tmp_path / "run", "max_steps=8", "--dry-run").stdout


@pytest.mark.parametrize(
    "case", ["file", pytest.param("below a file", marks=pytest.mark.slow), "read-only", "STOP"]
)
def test_a_folder_that_cannot_be_used_is_one_line(case, train, tmp_path):
    run = tmp_path / "run"
    if case == "STOP":
        (run / "STOP").mkdir(parents=True)
        message = f"{run / 'STOP'} is a folder, but a file of that name stops the run; remove or rename it"
    elif case == "read-only":
        run = Path("/sys/run")  # not even root can create a folder there
        message = "output_dir=/sys/run cannot be used (/sys/run: "
    else:
        run.write_text("")
        run = run / "below" if case == "below a file" else run
        message = f"output_dir={run} cannot be used ({run}"
    done = train(run, "max_steps=2", "ep_size=1", ranks=1, check=False)
    assert done.returncode
    assert done.stderr.count("error: ") == 1, done.stderr
    assert f"error: {message}" in done.stderr
    assert "Traceback" not in done.stderr


def test_ranks_with_different_configs_are_refused(begin, training, tmp_path):
    """Two launches on one port, or two machines with different files, must not train together."""
    command = training(tmp_path / "run", "max_steps=2")
    differing = [
        "import os, runpy, sys",
        "sys.argv = sys.argv[2:] + (['optimizer.lr=0.5'] if os.environ['RANK'] == '1' else [])",
        "runpy.run_path(sys.argv[0], run_name='__main__')",
    ]
    script = tmp_path / "differing.py"
    script.write_text("\n".join(differing))
    done = finish(begin(2, script, *command), check=False)
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "error: the ranks have different configs, data or DeepSpeed JSONs; give all" in done.stderr


# ---- requests to stop


def test_a_request_during_validation_stops_there_and_validation_is_made_up_for(
    begin, train, training, tmp_path
):
    run = tmp_path / "run"
    options = ("max_steps=3", "save_every=1000", "eval_every=2")
    process = begin(2, *training(run, *options, "eval_batches=1000000"))
    wait_for_step(run, 1, process)  # the next thing is the validation of step 2
    process.rank(1).send_signal(signal.SIGUSR1)
    done = finish(process)
    assert "stopped after step 2 by another rank's request; the same command continues" in done.stdout
    assert "val_loss" not in records(run)[-1]
    whole = tmp_path / "whole"
    train(whole, *options, "eval_batches=2")
    again = train(run, *options, "eval_batches=2").stdout
    assert "validation of step 2: val_loss " in again
    by_step = {r["step"]: r["val_loss"] for r in records(run) if "val_loss" in r}
    assert by_step == {r["step"]: r["val_loss"] for r in records(whole) if "val_loss" in r}


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_stop_file_from_before_the_first_step_is_honoured_and_then_removed(train, tmp_path):
    """It may have come while the ranks were starting."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "STOP").touch()
    options = ("max_steps=100000", *NEVER, "ep_size=1")
    done = train(run, *options, ranks=1)
    assert f"by the file {run / 'STOP'}; the same command continues" in done.stdout
    assert not (run / "STOP").exists()
    assert losses(run)


def test_ignored_signals_stay_ignored(tmp_path):
    """As under nohup."""
    code = (
        "import os, signal\nfrom pretrain.stopping import StopRequests\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "stop = StopRequests(0)\nstop.install()\nstop.stepping = True\n"
        "os.kill(os.getpid(), signal.SIGHUP)\nos.kill(os.getpid(), signal.SIGUSR1)\n"
        "while stop.reason() is None: pass\n"
        "print(stop.reason())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "SIGUSR1\n"


def test_an_urgent_request_that_cannot_be_met_names_the_safe_checkpoint(six_steps, tmp_path):
    """A rank that waits for a dead one inside torch; here, inside a lock."""
    code = (
        "import os, signal, sys, threading\nfrom pathlib import Path\nfrom pretrain import stopping\n"
        "stopping.GRACE_SECONDS = 0.0\n"
        "stop = stopping.StopRequests(0)\nstop.install()\nstop.begin(Path(sys.argv[1]), None)\n"
        "stop.stepping = True\nos.kill(os.getpid(), signal.SIGTERM)\nthreading.Lock().acquire()\n"
        "lock = threading.Lock()\nlock.acquire()\nlock.acquire()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(six_steps)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 128 + signal.SIGTERM
    safe = f"{six_steps}/checkpoints/step-6 is whole; the same command continues from there\n"
    assert done.stderr == f"error: 0 s after SIGTERM the step and its checkpoint are still unfinished; {safe}"


def test_a_run_whose_output_nobody_reads_stops_with_a_checkpoint(training, tmp_path):
    """`| head`, or Ctrl-C for `| tee`."""
    run = tmp_path / "run"
    command = [sys.executable, *training(run, "max_steps=100000", "log_every=1", *NEVER, "ep_size=1")]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_buffered()
    )
    assert process.stdout is not None
    assert process.stderr is not None
    wait_for_step(run, 2, process)
    process.stdout.close()
    assert process.wait(DEADLINE) == 0, process.stderr.read()
    assert "Traceback" not in process.stderr.read()
    assert (run / f"checkpoints/step-{len(losses(run))}/manifest.json").is_file()


def _buffered() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def test_a_forked_process_is_no_part_of_the_run():
    """A signal to it is not one to the rank, and ends it, however early it comes."""
    code = (
        "import os, signal\nfrom pretrain.stopping import StopRequests\n"
        "stop = StopRequests(0)\nstop.install()\nstop.stepping = True\n"
        "for _ in range(100):\n"
        "    child = os.fork()\n"
        "    if not child:\n        signal.pause()\n"
        "    os.kill(child, signal.SIGTERM)\n"
        "    assert os.waitpid(child, 0)[1] == signal.SIGTERM\n"
        "print(stop.reason())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"


def test_reasons_concern_this_rank(tmp_path):
    (tmp_path / "STOP").touch()
    for rank, reason in ((0, f"the file {tmp_path / 'STOP'}"), (1, None)):
        requests = StopRequests(rank)
        requests.begin(tmp_path, None)
        assert requests.reason() == reason
    requests.begin(tmp_path, 0.0)
    assert requests.reason() == "time_limit_minutes"
