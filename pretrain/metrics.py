"""What a run reports: metrics.jsonl (a line per step), the step line, the progress bar, wandb."""

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common.errors import error_line
from common.files import json_object, write_file, writing_failed
from model import ModelConfig
from pretrain.config import RunConfig
from pretrain.wandb_run import WandbRun

# Dense bf16 peaks in TFLOP/s, from the vendor's data sheets.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}
METRICS, DROPPED = "metrics.jsonl", "metrics.dropped.jsonl"


def peak_tflops(config: RunConfig, model_config: ModelConfig) -> float | None:
    """The device's peak in TFLOP/s, configured or looked up by its name; None: no MFU is reported.

    None where the peak is unknown, and where a step is not one pass over its tokens with gradients of all
    weights: a student's passes, LoRA, and frozen weights.
    """
    student = model_config.distillation is not None and model_config.distillation.student_pass
    if student or config.lora is not None or config.init.frozen:
        return None
    if config.peak_tflops is not None:
        return config.peak_tflops
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


def environment() -> dict[str, Any]:
    """Versions, machine and git commit, for environment.json."""
    root = Path(__file__).parent.parent
    commit = ""
    if shutil.which("git"):
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "python": platform.python_version(),
        "packages": {p: version(p) for p in ("torch", "deepspeed", "sentencepiece", "webdataset", "numpy")},
        "git_commit": commit or None,
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "command": sys.argv,
    }


def say(line: str) -> None:
    """Prints a line above the progress bar.

    A full disk under the output must not end a run that can still train and save.
    """
    with contextlib.suppress(OSError):
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


class MetricsLog:
    """Writes rank 0's metrics; resuming sets aside the lines of steps that will run again.

    Raises:
        OSError: metrics.jsonl cannot be written.
        ValueError: wandb cannot be started.
    """

    def __init__(self, config: RunConfig, run: Path, start_step: int) -> None:
        self.config, self.start_step, self.started = config, start_step, time.perf_counter()
        self.path = run / METRICS
        logged, told = set_aside(self.path, start_step)
        for line in told:
            say(line)
        self.file = self.path.open("ab", buffering=0)
        self.unwritten, self.problem = b"", None  # type: bytes, OSError | None
        self.wandb = None
        if config.wandb.mode != "disabled":
            self.wandb = WandbRun(config, run, start_step, logged, warn=say)
        self.bar = tqdm(total=config.max_steps, initial=start_step, unit="step", disable=None)

    def write(self, record: dict[str, Any]) -> None:
        """Records one optimizer step; see Trainer for the fields."""
        self._append(record)
        self.bar.update()
        step = record["step"]
        if (
            "skipped" in record
            or step % self.config.log_every == 0
            or step in (self.start_step + 1, self.config.max_steps)
        ):
            say(self._step_line(record))
        if self.wandb is not None:
            self.wandb.log(step, {k: v for k, v in record.items() if not isinstance(v, list)})

    def note(self, record: dict[str, Any]) -> None:
        """Records an evaluation's scores, or why there are none; see Evaluator for the fields."""
        step, scores = record["step"], record.get("eval", {})
        self._append({**record, "tokens": step * self.config.tokens_per_step})
        firsts = [f"{task} {next(iter(values.values())):.4g}" for task, values in scores.items() if values]
        text = ", ".join(firsts) if scores else f"eval_failed, {record['eval_failed']}"
        say(f"evaluation of step {step}: {text}")
        if self.wandb is not None:
            flat = {f"eval/{task}/{name}": v for task, values in scores.items() for name, v in values.items()}
            self.wandb.log(None, {**flat, "eval/step": step})

    def _append(self, record: dict[str, Any]) -> None:
        """Writes a line, after those that did not fit on the disk before it."""
        self.unwritten += (json.dumps(record) + "\n").encode()
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            if self.problem is None:
                safe = "its lines wait in memory, and no checkpoint is saved without them"
                say(f"warning: {error_line(writing_failed(error, self.path, safe))}")
            self.problem = error
            return
        self.problem = None

    def sync(self) -> None:
        """Puts the lines on disk; on any thread. Raises OSError if some cannot be written."""
        problem = self.problem  # the other thread may solve it in the meantime
        try:
            if problem is not None:
                raise problem
            os.fsync(self.file.fileno())
        except OSError as error:
            raise writing_failed(error, self.path, "a checkpoint needs the metrics up to its step") from error

    def has_validation(self, step: int) -> bool:
        """Whether metrics.jsonl holds the validation loss of a step."""
        with self.path.open("rb") as lines:
            own = [line for line in lines if line.startswith(b'{"step": %d,' % step)]
        return any(b'"val_loss": ' in line for line in own)

    def validated(self, step: int, loss: float | None) -> None:
        """Records a validation loss that the step's own line lacks."""
        record = {"step": step, "tokens": step * self.config.tokens_per_step, "val_loss": loss}
        self._append(record)
        say(f"validation of step {step}: {_validation(loss)}")
        if self.wandb is not None:
            self.wandb.log(None, {"val_loss": loss})

    def _step_line(self, r: dict[str, Any]) -> str:
        per_step = (time.perf_counter() - self.started) / (r["step"] - self.start_step)
        eta = round(per_step * (self.config.max_steps - r["step"]))
        load = r["expert_load_max"]
        parts = [
            f"step {r['step']}/{self.config.max_steps}",
            f"loss {_number(r['loss'], '.4f') if r['target_tokens'] else 'without targets'}",
            f"grad_norm {_number(r['grad_norm'], '.3f')}",
            f"lr {r['lr']:.2e}",
            f"tok/s {r['tokens_per_second']:,.0f}",
            f"data {100 * r['data_wait_fraction']:.0f}%",
            f"mem {r['memory_bytes'] / 2**30:.1f}G",
            f"depth {r['recurrence_depth']:.4g}",
            "load max/mean -" if load is None else f"load max/mean {load:.2f}",
        ]
        if r["mfu"] is not None:
            parts.append(f"mfu {100 * r['mfu']:.1f}% hfu {100 * r['hfu']:.1f}%")
        if "skipped" in r:
            parts.append(f"SKIPPED: {r['skipped']}")
        if "val_loss" in r:
            parts.append(_validation(r["val_loss"]))
        return " | ".join([*parts, f"eta {eta // 60}:{eta % 60:02d}"])

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        if self.unwritten:
            count = self.unwritten.count(b"\n")
            say(f"warning: the last {count} lines of {self.path} could not be written: {self.problem}")
        if self.wandb is not None:
            self.wandb.finish()


def _validation(loss: float | None) -> str:
    return f"val_loss {'none' if loss is None else format(loss, '.4f')}"


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def set_aside(path: Path, start_step: int) -> tuple[int, list[str]]:
    """Moves what a run that resumes at `start_step` cannot use to metrics.dropped.jsonl, as it is: the lines
    of later steps, damaged lines, and the half line that a killed run leaves at the end.

    Returns:
        The last step of which there was a line, and lines for the user.
    """
    if not path.exists():
        return 0, []
    last, kept, dropped, later, damaged = 0, b"", b"", 0, []
    *lines, end = path.read_bytes().split(b"\n")
    for number, line in enumerate([*lines, end] if end else lines, 1):
        step = (json_object(line) or {}).get("step")
        if type(step) is int:
            last = max(last, step)
        elif number <= len(lines):
            damaged.append(str(number))
        if type(step) is int and step <= start_step:
            kept += line + b"\n"
        else:
            dropped += line + b"\n"
            later += type(step) is int
    aside = path.with_name(DROPPED)
    if dropped:
        write_file(aside, (aside.read_bytes() if aside.exists() else b"") + dropped)
    if dropped or end:
        write_file(path, kept)
    told = []
    if later:
        told.append(f"{path}: {later} lines of steps after {start_step}, which run again, moved to {aside}")
    if damaged:
        which = ", ".join(damaged[:10]) + (f" and {len(damaged) - 10} more" if len(damaged) > 10 else "")
        told.append(f"warning: {path} is damaged in line {which}: moved to {aside}, and not used")
    return last, told
