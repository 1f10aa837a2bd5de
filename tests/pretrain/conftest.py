"""Real launches of two ranks."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..conftest import ROOT, TINY

BIN = Path(sys.executable).parent
Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def launch() -> Launch:
    """Runs a script under the deepspeed launcher on `ranks` ranks, on a free port; output is captured."""

    def run(ranks: int, *command: Any, check: bool = True) -> subprocess.CompletedProcess[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = [BIN / "deepspeed", "--num_accelerators", ranks, "--master_port", port]
        done = subprocess.run(
            [str(part) for part in (*launcher, *command)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"exit {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}")
        return done

    return run


@pytest.fixture(scope="session")
def train(launch: Launch, data_folder: Path) -> Launch:
    """`train(output_dir, "max_steps=3", ...)`: the shipped demo config at tiny size on two ranks."""

    def run(output_dir: Path, *overrides: str, ranks: int = 2, check: bool = True):
        paths = [f"output_dir={output_dir}", f"data.path={data_folder}"]
        return launch(
            ranks,
            "pretrain/main.py",
            *("--ds_config", "ds_configs/zero3_ep.json", "--config", "pretrain/configs/demo.yaml"),
            *(*TINY, *paths, *overrides),
            check=check,
        )

    return run
