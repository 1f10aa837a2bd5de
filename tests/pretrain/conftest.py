"""Real launches of two ranks."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..conftest import ROOT, Training

BIN, RANKS = Path(sys.executable).parent, Path(__file__).with_name("ranks.py")
Launch = Callable[..., subprocess.CompletedProcess[str]]


def start(ranks: int, *command: Any) -> subprocess.Popen[str]:
    """Starts a script under the deepspeed launcher on `ranks` ranks, on a free port; output is piped."""
    return _start(BIN / "deepspeed", f"--num_accelerators={ranks}", "--master_port", free_port(), *command)


def start_quickly(ranks: int, *command: Any) -> subprocess.Popen[str]:
    """As `start` by a launcher without imports; one rank needs no launcher at all."""
    if ranks == 1:
        return _start(sys.executable, "-u", *command)
    return _start(sys.executable, RANKS, ranks, free_port(), *command)


def unlink_buffer(launcher: subprocess.Popen[str]) -> None:
    """Removes what a killed rank cannot."""
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{launcher.args[3]}_*"):
        left.unlink()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(*command: Any, **pipes: Any) -> subprocess.Popen[str]:
    pipes = pipes or {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    call = [str(part) for part in command]
    return subprocess.Popen(call, cwd=ROOT, env=_environment(), text=True, **pipes)


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def finish(process: subprocess.Popen[str], check: bool = True) -> subprocess.CompletedProcess[str]:
    """Waits for what `start` started; with `check` a failure is an AssertionError that shows the output."""
    out, err = process.communicate(timeout=400)
    return _checked(subprocess.CompletedProcess(process.args, process.returncode, out, err), check)


def _checked(done: subprocess.CompletedProcess[str], check: bool) -> subprocess.CompletedProcess[str]:
    if check and done.returncode:
        raise AssertionError(f"exit {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}")
    return done


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """Runs a script to its end on so many ranks, forked off one process."""
    server = _start(sys.executable, RANKS, "--serve", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdin
    assert server.stdout

    def run(ranks: int, *command: Any, check: bool = True) -> subprocess.CompletedProcess[str]:
        said = tmp_path_factory.mktemp("said")
        files = {"out": str(said / "out"), "err": str(said / "err")}
        call = [str(part) for part in command]
        asked = {"ranks": ranks, "port": str(free_port()), "command": call, "environment": _environment()}
        print(json.dumps({**asked, **files}), file=server.stdin, flush=True)
        failed = int(server.stdout.readline())
        out, err = (Path(file).read_text() for file in files.values())
        return _checked(subprocess.CompletedProcess(call, failed, out, err), check)

    yield run
    server.stdin.close()
    server.wait(60)


@pytest.fixture(scope="session")
def train(launch: Launch, training: Training) -> Launch:
    """`train(output_dir, "max_steps=3", ...)`: that command on two ranks."""
    return lambda output_dir, *overrides, ranks=2, check=True: launch(
        ranks, *training(output_dir, *overrides), check=check
    )


@pytest.fixture(scope="session")
def six_steps(train: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on two ranks, undisturbed, with the checkpoints of steps 2, 4 and 6."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(run, "max_steps=6", "save_every=2", "keep_last=3")
    return run
