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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [BIN / "deepspeed", "--num_accelerators", ranks, "--master_port", port]
    return subprocess.Popen(
        [str(part) for part in (*launcher, *command)],
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
    """Runs a script under the deepspeed launcher."""
    return lambda ranks, *command, check=True: finish(start(ranks, *command), check)


@pytest.fixture(scope="session")
def train(launch: Launch, training: Training) -> Launch:
    """`train(output_dir, "max_steps=3", ...)`: that command on two ranks."""
    return lambda output_dir, *overrides, ranks=2, check=True: launch(
        ranks, *training(output_dir, *overrides), check=check
    )
