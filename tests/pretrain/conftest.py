"""A small data folder, and real launches of two ranks."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
Launch = Callable[..., subprocess.CompletedProcess[str]]

# Sizes that make a step take milliseconds.
TINY = [
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.moe_intermediate_size=32",
    "data.sequence_length=64",
    "global_batch_size=8",
    "optimizer.warmup_steps=2",
]


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from data_pipeline.build import build
    from data_pipeline.recipe import load_recipe

    folder = tmp_path_factory.mktemp("data") / "built"
    overrides = ["sources.0.num_samples=300", "sources.0.levels=[1,3]", "validation_fraction=0.1"]
    build(load_recipe(ROOT / "data_pipeline/recipes/demo.yaml", overrides), ROOT, folder)
    return folder


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
