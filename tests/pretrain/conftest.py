"""Real launches of two ranks."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..conftest import ROOT, Training

BIN = Path(sys.executable).parent
Launch = Callable[..., subprocess.CompletedProcess[str]]


def start(ranks: int, *command: Any) -> subprocess.Popen[str]:
    """Starts a script under the deepspeed launcher on `ranks` ranks, on a free port; output is piped."""
    return _start(BIN / "deepspeed", f"--num_accelerators={ranks}", "--master_port", free_port(), *command)


def start_quickly(ranks: int, *command: Any) -> subprocess.Popen[str]:
    """As `start` by a launcher without imports; one rank needs no launcher at all."""
    if ranks == 1:
        return _start(sys.executable, "-u", *command)
    return _start(sys.executable, Path(__file__).with_name("ranks.py"), ranks, free_port(), *command)


def unlink_buffer(launcher: subprocess.Popen[str]) -> None:
    """Removes what a killed rank cannot."""
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{launcher.args[3]}_*"):
        left.unlink()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(*command: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], check: bool = True) -> subprocess.CompletedProcess[str]:
    """Waits for what `start` started; with `check` a failure is an AssertionError that shows the output."""
    out, err = process.communicate(timeout=400)
    if check and process.returncode:
        raise AssertionError(f"exit {process.returncode}\n{out[-6000:]}\n{err[-6000:]}")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="session")
def launch() -> Launch:
    """Runs a script on so many ranks."""
    return lambda ranks, *command, check=True: finish(start_quickly(ranks, *command), check)


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
