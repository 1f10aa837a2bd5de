"""Real launches of two ranks."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from pretrain import checkpoint
from pretrain.launch import free_port

from ..conftest import ROOT, Training

BIN, RANKS = Path(sys.executable).parent, Path(__file__).with_name("ranks.py")
Begin = Callable[..., "Begun"]
Launch = Callable[..., subprocess.CompletedProcess[str]]


def start(ranks: int, *command: Any) -> subprocess.Popen[str]:
    """Starts a script under the deepspeed launcher on `ranks` ranks, on a free port; output is piped."""
    return _start(BIN / "deepspeed", f"--num_accelerators={ranks}", "--master_port", free_port(), *command)


def seal(folder: Path) -> None:
    """Makes a folder a whole checkpoint of the files that are in it."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != checkpoint.MANIFEST]
    manifest = {
        str(path.relative_to(folder)): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(files)
    }
    checkpoint.seal(folder, manifest)


@dataclass
class Begun:
    """Ranks forked from one process, with the parts of Popen that tests use."""

    args: list[str]
    port: str
    pids: list[int]
    answer: Future[str]
    out: Path
    err: Path

    @property
    def returncode(self) -> int | None:
        return int(self.answer.result()) if self.answer.done() else None

    def poll(self) -> int | None:
        return self.returncode

    def rank(self, number: int) -> psutil.Process:
        return psutil.Process(self.pids[number])

    def communicate(self, timeout: float) -> tuple[str, str]:
        self.answer.result(timeout)
        return self.out.read_text(), self.err.read_text()


def unlink_buffer(launch: subprocess.Popen[str] | Begun) -> None:
    """Removes the buffer that a killed rank leaves behind."""
    port = launch.port if isinstance(launch, Begun) else launch.args[3]
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        left.unlink()


def _start(*command: Any, **pipes: Any) -> subprocess.Popen[str]:
    pipes = pipes or {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    call = [str(part) for part in command]
    return subprocess.Popen(call, cwd=ROOT, env=_environment(), text=True, **pipes)


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def finish(process: subprocess.Popen[str] | Begun, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Waits for a launch; with `check` a failure is an AssertionError that shows the output."""
    out, err = process.communicate(timeout=400)
    return _checked(subprocess.CompletedProcess(process.args, process.returncode, out, err), check)


def _checked(done: subprocess.CompletedProcess[str], check: bool) -> subprocess.CompletedProcess[str]:
    if check and done.returncode:
        raise AssertionError(f"exit {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}")
    return done


@pytest.fixture(scope="session")
def begin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Begin]:
    """Starts a script on that many ranks, forked from one process that runs one launch at a time."""
    server = _start(sys.executable, RANKS, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdin
    assert server.stdout
    answers = ThreadPoolExecutor(1)

    def start(ranks: int, *command: Any) -> Begun:
        said, port, call = tmp_path_factory.mktemp("said"), str(free_port()), [str(part) for part in command]
        out, err = said / "out", said / "err"
        asked = {"ranks": ranks, "port": port, "command": call, "environment": _environment()}
        print(json.dumps({**asked, "out": str(out), "err": str(err)}), file=server.stdin, flush=True)
        pids = json.loads(server.stdout.readline())
        return Begun(call, port, pids, answers.submit(server.stdout.readline), out, err)

    yield start
    server.stdin.close()
    server.wait(60)


@pytest.fixture(scope="session")
def launch(begin: Begin) -> Launch:
    """Runs a script to its end on that many ranks."""
    return lambda ranks, *command, check=True: finish(begin(ranks, *command), check=check)


@pytest.fixture(scope="session")
def train(launch: Launch, training: Training) -> Launch:
    """`train(output_dir, "max_steps=3", ...)`: runs the training command on two ranks."""
    return lambda output_dir, *overrides, ranks=2, check=True: launch(
        ranks, *training(output_dir, *overrides), check=check
    )


@pytest.fixture(scope="session")
def six_steps(train: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on two ranks, undisturbed, with the checkpoints of steps 2, 4 and 6."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(run, "max_steps=6", "save_every=2", "keep_last=3")
    return run
