"""Everything that only a GPU can show, in one command of at most 8 minutes: a table and a JSON file.

    python bench/gpu_check.py [--config YAML] [--ds_config JSON] [--only NAME,...]      (make gpu-check)
    python bench/gpu_check.py --device cpu       all but the CUDA kernels at tiny sizes, in a minute or two

Checks run one after the other, the most important first, each in a process of its own with its own share of
the time; what it leaves goes to the next. The JSON file is rewritten after each, and whatever a check found
stays if it fails, runs out of time or is interrupted. The exit status is 1 if a line says FAILED.

It needs no `make setup` where torch has CUDA: bring these packages as wheels, put them and the root of
this checkout on PYTHONPATH, and start it from there. DeepSpeed has no wheel: `DS_BUILD_OPS=0 pip wheel
--no-deps deepspeed==0.19.8` makes one. Beside torch and numpy:
    deepspeed, with einops, hjson, msgpack, ninja, packaging, psutil, py-cpuinfo, tqdm, and pydantic with
    annotated-types, pydantic-core, typing-inspection
    omegaconf, with PyYAML; webdataset, with braceexpand
    rensa, safetensors, sentencepiece, xxhash
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import gpu_parity
import gpu_speed
import gpu_training
import torch
from gpu_rows import FAILED, NOT_RUN, OK, CheckError, Row, Setting, rows_file
from measuring import check_choices, check_device, listed, print_table

from common.errors import error_line, user_errors
from common.files import read_json_lines, write_json
from pretrain.metrics import environment

ROOT = Path(__file__).parents[1]
INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Check:
    name: str
    share: float  # of the whole command's time
    function: Callable[[Setting], None]


CHECKS = (
    Check("parity", 0.14, gpu_parity.check),
    Check("waits", 0.12, gpu_training.waits),
    Check("real size", 0.26, gpu_training.real_size),
    Check("fp8", 0.17, gpu_training.fp8),
    Check("resume", 0.14, gpu_training.resume),
    Check("decode", 0.08, gpu_speed.decode),
    Check("backends", 0.09, gpu_speed.backends),
)
NAMES = tuple(check.name for check in CHECKS)


def main() -> None:
    arguments = _parse()
    with user_errors(ValueError, OSError):
        check_device(arguments.device)
        check_choices("only", arguments.only, NAMES)
        if arguments.child is not None:
            run_child(arguments)
            return
        _prepare(arguments.work)
        checks = [check for check in CHECKS if check.name in arguments.only]
        rows = run(checks, arguments.work, arguments.out, 60 * arguments.minutes, _machine(arguments))
    sys.exit(any(row.verdict == FAILED for row in rows))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What only a GPU can show, in one table.")
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: at tiny sizes, to test this command")
    add("--config", default="pretrain/configs/sizes/1b_moe.yaml", help="run whose real size is measured")
    add("--ds_config", default="ds_configs/zero1_bf16.json", help="its DeepSpeed JSON")
    add("--only", type=listed, default=list(NAMES), help=f"comma-separated, of {', '.join(NAMES)}")
    add("--minutes", type=float, default=8, help="for everything together (default: 8)")
    add("--work", type=Path, default=Path("runs/gpu_check"), help="folder of its data and runs")
    add("--out", type=Path, default=Path("runs/gpu_check.json"), metavar="FILE.json")
    add("--child", choices=NAMES, help="carry out this one check in this process")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        arguments.config = gpu_training.DEMO
    return arguments


def _prepare(work: Path) -> None:
    """An empty folder; what an earlier check left there would count as this one's."""
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)


def _machine(arguments: argparse.Namespace) -> dict[str, Any]:
    cuda = arguments.device == "cuda"
    return {
        **environment(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "capability": torch.cuda.get_device_capability() if cuda else None,
        "cuda": torch.version.cuda,
        "config": arguments.config,
        "ds_config": arguments.ds_config,
    }


def run(checks: Sequence[Check], work: Path, out: Path, seconds: float, machine: dict[str, Any]) -> list[Row]:
    """Carries out the checks until the time is over or a signal comes; writes `out` after each.

    Returns:
        All lines, after printing them.
    """
    rows, problem, end = list[Row](), "", time.monotonic()
    previous = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for check in checks:
            end += check.share * seconds
            started = time.monotonic()
            if problem != INTERRUPTED:
                print(f"{check.name}: at most {end - started:.0f} s", flush=True)
                try:
                    problem = in_own_process(check.name, work, end - started)
                except KeyboardInterrupt:
                    problem = INTERRUPTED
            rows += found(check.name, work, problem, time.monotonic() - started)
            write_json(out, {"machine": machine, "rows": [asdict(row) for row in rows]}, indent=2)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    print()
    print_table(
        [("check", "what", "verdict", "result"), *((r.check, r.what, r.verdict, r.result) for r in rows)]
    )
    return rows


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def found(check: str, work: Path, problem: str, seconds: float) -> list[Row]:
    """A check's lines; the last says how it ended."""
    path = rows_file(work, check)
    rows = [Row(**record) for record in read_json_lines(path).records] if path.exists() else []
    if problem:
        return [*rows, Row(check, "finished", NOT_RUN if problem == INTERRUPTED else FAILED, problem)]
    return [*rows, Row(check, "finished", OK, f"{seconds:.0f} s", {"seconds": seconds})]


def in_own_process(name: str, work: Path, seconds: float) -> str:
    """Carries out a check in its own process group, all of which is killed in the end.

    Returns:
        Why it did not finish, in one line; empty if it did.
    """
    log = work / f"{name}.log"
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with log.open("w") as output:
        child = subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--child", name],
            env={**os.environ, "PYTHONPATH": path},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"did not finish in {seconds:.0f} s; what it printed is in {log}"
        finally:
            if child.poll() is None or _group_runs(child.pid):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if child.returncode == 0:
        return ""
    said = log.read_text().strip().splitlines() or [f"it ended with code {child.returncode}"]
    return f"{said[-1].removeprefix('error: ')} (see {log})"


def _group_runs(group: int) -> bool:
    """Whether a process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def run_child(arguments: argparse.Namespace) -> None:
    """Carries out one check; its lines go to a file as they come."""
    check = next(check for check in CHECKS if check.name == arguments.child)
    setting = Setting(
        check.name, arguments.device, arguments.config, arguments.ds_config, arguments.work.absolute()
    )
    try:
        check.function(setting)
    except CheckError as error:
        sys.exit(f"error: {error_line(error)}")
    except Exception as error:
        traceback.print_exc()
        sys.exit(f"{type(error).__name__}: {error_line(error)}")


if __name__ == "__main__":
    main()
