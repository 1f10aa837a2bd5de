"""What a run reports: metrics.jsonl (a line per step), the step line, the progress bar, wandb."""

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common.files import write_file
from model import ModelConfig
from pretrain.config import RunConfig

# Dense bf16 peaks in TFLOP/s, from the vendor's data sheets.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}


def peak_tflops(config: RunConfig, model_config: ModelConfig) -> float | None:
    """The device's peak, configured or looked up by its name; None: no MFU is reported.

    None where the peak is unknown, and where a step is not one pass over its tokens with gradients of all
    weights: a student's passes, and LoRA.
    """
    student = model_config.distillation is not None and model_config.distillation.student_pass
    if student or config.lora is not None:
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
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    git = subprocess.run(command, capture_output=True, text=True, check=False)
    return {
        "python": platform.python_version(),
        "packages": {p: version(p) for p in ("torch", "deepspeed", "sentencepiece", "webdataset", "numpy")},
        "git_commit": git.stdout.strip() or None,
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "command": sys.argv,
    }


class MetricsLog:
    """Writes rank 0's metrics; resuming drops the lines of steps that will run again."""

    def __init__(self, config: RunConfig, run: Path, start_step: int) -> None:
        self.config, self.start_step, self.started = config, start_step, time.perf_counter()
        path = run / "metrics.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= start_step]
        write_file(path, "".join(kept).encode())  # so that a run killed here keeps its history
        self.file = path.open("a")
        self.bar = tqdm(total=config.max_steps, initial=start_step, unit="step", disable=None)
        self.wandb = _start_wandb(config, run)

    def write(self, record: dict[str, Any]) -> None:
        """Records one optimizer step; see Trainer for the fields."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        self.bar.update()
        step = record["step"]
        if (
            "skipped" in record
            or step % self.config.log_every == 0
            or step in (self.start_step + 1, self.config.max_steps)
        ):
            tqdm.write(self._step_line(record), file=sys.stdout)
        if self.wandb is not None:
            self.wandb.log({k: v for k, v in record.items() if not isinstance(v, list)}, step=step)

    def note(self, record: dict[str, Any]) -> None:
        """Records an evaluation's scores, or why there are none; see Evaluator for the fields."""
        step, scores = record["step"], record.get("eval", {})
        self.file.write(json.dumps({**record, "tokens": step * self.config.tokens_per_step}) + "\n")
        self.file.flush()
        firsts = [f"{task} {next(iter(values.values())):.4g}" for task, values in scores.items() if values]
        text = ", ".join(firsts) if scores else f"eval_failed, {record['eval_failed']}"
        tqdm.write(f"evaluation of step {step}: {text}", file=sys.stdout)
        if self.wandb is not None:
            flat = {f"eval/{task}/{name}": v for task, values in scores.items() for name, v in values.items()}
            self.wandb.log({**flat, "eval/step": step})

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
            f"depth {r['recurrence_depth']}",
            "load max/mean -" if load is None else f"load max/mean {load:.2f}",
        ]
        if r["mfu"] is not None:
            parts.append(f"mfu {100 * r['mfu']:.1f}% hfu {100 * r['hfu']:.1f}%")
        if "skipped" in r:
            parts.append(f"SKIPPED: {r['skipped']}")
        if "val_loss" in r:
            parts.append(f"val_loss {'none' if r['val_loss'] is None else format(r['val_loss'], '.4f')}")
        return " | ".join([*parts, f"eta {eta // 60}:{eta % 60:02d}"])

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _lines(path: Path) -> list[str]:
    """The whole lines: a run killed while writing leaves half a line at the end."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _start_wandb(config: RunConfig, run: Path) -> Any:
    if config.wandb.mode == "disabled":
        return None
    import wandb  # takes seconds to import, and most runs do not use it

    mode: Any = config.wandb.mode
    return wandb.init(project=config.wandb.project, mode=mode, dir=run, name=run.name, config=asdict(config))
