"""What gpu_check.py asks of training: pretrain/main.py on packed rows, watched through metrics.jsonl."""

import math
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from unittest.mock import patch

import torch
from gpu_rows import ABSENT, MEASURED, CheckError, Setting

from common.files import read_json_lines
from data_pipeline.build import build
from data_pipeline.recipe import load_recipe
from data_pipeline.shards.manifest import MANIFEST
from data_pipeline.tokenization.tokenizer import Tokenizer
from pretrain import checkpoint
from pretrain.depths import deepest
from pretrain.dry_run import layout_of
from pretrain.main import main as train
from pretrain.metrics import DROPPED, METRICS
from pretrain.planning.layout import Hardware
from pretrain.planning.search import LayoutPlan, plan
from pretrain.run_config import load_run_config
from pretrain.setup import prepare

ROOT = Path(__file__).parents[1]
DEMO, TOY_VOCABULARY = "pretrain/configs/demo.yaml", 316
STEPS, SETTLED = 20, 5  # steps of the real configuration; those before the fifth compile and tune
FP8_DISTANCE = 0.02  # of any of the 20 losses from bf16's, relative
RESUMED_DISTANCE = 1e-3  # of a repeated step's loss: atomic additions on a GPU come in any order
TINY = (
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.moe_intermediate_size=32",
    "data.sequence_length=64",
)


def waits(setting: Setting) -> None:
    """Steps under torch.cuda.set_sync_debug_mode: where the host waits for the device, and how often."""
    steps = 8
    overrides = (*_toy(setting), f"max_steps={steps}", "model.num_nextn_predict_layers=1")
    arguments = command(setting, "waits", DEMO, overrides)
    counted = Waits()
    with patch.object(sys, "argv", arguments), counted:
        if not setting.small:
            torch.cuda.set_sync_debug_mode("warn")
        train()
    if setting.small:
        setting.note("waits per step", ABSENT, f"{steps} steps ran; only CUDA counts waits")
        return
    per_step = {place: n / steps for place, n in counted.places.items() if n >= steps - 1}
    own = {place: n for place, n in per_step.items() if " > " not in place}
    setting.judge("waits per step of our code", not own, f"{sum(own.values()):.1f} in {len(own)} places")
    for place, n in sorted(per_step.items(), key=lambda item: -item[1]):
        setting.note(f"  {place}", MEASURED, f"{n:.1f} per step", per_step=n)


class Waits:
    """Counts CUDA's warnings of synchronisation by the place in our code, and the library it called."""

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()
        self._restore = warnings.catch_warnings()

    def __enter__(self) -> Self:
        self._restore.__enter__()
        warnings.simplefilter("always", UserWarning)
        self._shown, warnings.showwarning = warnings.showwarning, self._show
        return self

    def __exit__(self, *error: Any) -> None:
        self._restore.__exit__(*error)

    def _show(self, message: Warning | str, *rest: Any, **more: Any) -> None:
        if "called a synchronizing CUDA operation" not in str(message):
            self._shown(message, *rest, **more)
            return
        self.places[place_of(traceback.extract_stack()[:-1])] += 1


def place_of(stack: Iterable[traceback.FrameSummary]) -> str:
    """`model/moe.py:12`, the innermost line of ours; followed by ` > deepspeed/x.py:34` inside DeepSpeed."""
    place = "outside model/ and pretrain/"
    for frame in stack:
        path = Path(frame.filename)
        if path.is_relative_to(ROOT / "model") or path.is_relative_to(ROOT / "pretrain"):
            place = f"{path.relative_to(ROOT)}:{frame.lineno}"
        elif "deepspeed" in path.parts:
            inside = "/".join(path.parts[path.parts.index("deepspeed") :])
            place = f"{place.split(' > ')[0]} > {inside}:{frame.lineno}"
    return place


def real_size(setting: Setting) -> None:
    """The first 20 steps of a real configuration: speed, MFU, and memory against the plan."""
    overrides = _real(setting)
    with Training(setting, "bf16", setting.config, overrides) as run:
        started = time.perf_counter()
        run.wait(lambda lines: len(lines) > 0)
        first = time.perf_counter() - started
        lines = run.wait(lambda lines: len(lines) >= STEPS)[:STEPS]
    losses = [line["loss"] for line in lines]
    good = all(line.get("skipped") is None and line["loss"] is not None for line in lines)
    setting.judge("20 steps", good, f"loss {losses[0]:.3f} to {losses[-1]:.3f}", losses=losses)
    predicted = _plan(setting, overrides)
    rate = _settled(lines, "tokens_per_second")
    setting.note(
        "tokens/s",
        MEASURED,
        f"{rate:,.0f}; the plan for an H100, unverified: {predicted.tokens_per_second:,.0f}",
        tokens_per_second=rate,
        predicted=predicted.tokens_per_second,
    )
    if lines[-1]["mfu"] is None:
        setting.note("MFU", ABSENT, "the device's peak is unknown")
    else:
        mfu, hfu = _settled(lines, "mfu"), _settled(lines, "hfu")
        setting.note("MFU", MEASURED, f"{mfu:.1%} (with recomputation {hfu:.1%})", mfu=mfu, hfu=hfu)
    _memory(setting, max(line["memory_bytes"] for line in lines), predicted.memory_bytes)
    setting.note("start to first step", MEASURED, f"{first:.1f} s", seconds=first)
    waited = _settled(lines, "data_wait_fraction")
    setting.note("waiting for data", MEASURED, f"{waited:.1%} of a step", share=waited)


def _memory(setting: Setting, peak: int, predicted: int) -> None:
    result = f"{peak / 1e9:.2f} GB at the peak, the plan says {predicted / 1e9:.2f}"
    figures = {"bytes": peak, "predicted": predicted}
    if setting.small:  # a process's memory, most of it torch's libraries
        setting.note("memory", MEASURED, result, **figures)
    else:
        setting.judge("memory, within 10% of the plan", abs(peak / predicted - 1) <= 0.1, result, **figures)


def fp8(setting: Setting) -> None:
    """The same 20 steps with execution.precision=fp8: distance of the losses, and speed."""
    bf16 = _lines(setting.work / "bf16")[:STEPS]
    if len(bf16) < STEPS:
        raise CheckError("there are no 20 steps in bf16 to compare with: see the check `real size`")
    with Training(setting, "fp8", setting.config, (*_real(setting), "execution.precision=fp8")) as run:
        try:
            lines = run.wait(lambda lines: len(lines) >= STEPS)[:STEPS]
        except CheckError as error:
            if "execution.precision=fp8 needs" not in str(error):
                raise
            setting.note("losses in FP8", ABSENT, str(error))
            return
    distance = farthest(lines, bf16)
    text = f"at most {distance:.2%} from bf16 in 20 steps, allowed {FP8_DISTANCE:.0%}"
    setting.judge("losses in FP8", distance <= FP8_DISTANCE, text, distance=distance)
    rate, usual = (_settled(found, "tokens_per_second") for found in (lines, bf16))
    setting.note(
        "tokens/s in FP8", MEASURED, f"{rate:,.0f}, {rate / usual:.2f} of bf16's", tokens_per_second=rate
    )


def resume(setting: Setting) -> None:
    """A run killed with SIGKILL between two checkpoints, then started again: the repeated steps' losses."""
    every = 4 if setting.small else 50
    overrides = (*_toy(setting), f"save_every={every}", "max_steps=100000")
    with Training(setting, "resume", DEMO, overrides) as run:
        killed = run.wait(lambda lines: len(lines) > every + 1 and run.saved())
    started = time.perf_counter()
    with Training(setting, "resume", DEMO, overrides) as run:
        # The lines of steps that run again are set aside when the run begins; a later step is new.
        run.wait(lambda lines: run.set_aside() and lines[-1]["step"] > run.set_aside()[-1]["step"])
        seconds = time.perf_counter() - started
        again, before = run.lines(), run.set_aside()
    by_step = {line["step"]: line for line in again}
    repeated = [by_step[line["step"]] for line in before]
    distance, allowed = farthest(repeated, before), 0.0 if setting.small else RESUMED_DISTANCE
    setting.judge(
        "losses after kill -9",
        distance <= allowed,
        f"{len(before)} steps repeated, at most {distance:.1e} apart, allowed {allowed:.1e}",
        distance=distance,
        steps=len(before),
        killed_after=killed[-1]["step"],
    )
    setting.note("restart to the killed step", MEASURED, f"{seconds:.1f} s", seconds=seconds)
    paused = [line["save_seconds"] for line in again if "save_seconds" in line]
    if paused:
        setting.note("training paused per checkpoint", MEASURED, f"{max(paused):.3f} s", seconds=max(paused))


class Training:
    """A run of pretrain/main.py on one device. Leaving the context kills it."""

    def __init__(self, setting: Setting, name: str, config: str, overrides: Iterable[str]) -> None:
        self.folder, self.log = setting.work / name, setting.work / f"{name}.training.log"
        self.command = [sys.executable, *command(setting, name, config, overrides)]

    def __enter__(self) -> Self:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self.command, cwd=ROOT, stdout=log, stderr=log)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def lines(self) -> list[dict[str, Any]]:
        return _lines(self.folder)

    def set_aside(self) -> list[dict[str, Any]]:
        """Lines of the steps that a resumed run repeats."""
        path = self.folder / DROPPED
        return read_json_lines(path).records if path.exists() else []

    def saved(self) -> bool:
        """Whether a checkpoint is whole."""
        folders = [self.folder / checkpoint.CHECKPOINTS / f"step-{n}" for n in checkpoint.steps(self.folder)]
        return any((folder / checkpoint.MANIFEST).exists() for folder in folders)

    def wait(self, reached: Callable[[list[dict[str, Any]]], Any]) -> list[dict[str, Any]]:
        """The run's metrics once they satisfy `reached`.

        Raises:
            CheckError: the run ended before.
        """
        while True:
            ended, lines = self.process.poll() is not None, self.lines()
            if lines and reached(lines):
                return lines
            if ended:
                said = self.log.read_text().strip().splitlines() or ["it printed nothing"]
                errors = [line for line in said if line.startswith("error: ")] or said
                raise CheckError(f"{self.folder.name} ended early: {errors[-1].removeprefix('error: ')}")
            time.sleep(0.02)


def command(setting: Setting, name: str, config: str, overrides: Iterable[str]) -> list[str]:
    """Arguments that train `config` on one device."""
    vocabulary = load_run_config(config, list(overrides)).model.get("vocab_size", TOY_VOCABULARY)
    run = (f"output_dir={setting.work / name}", f"data.path={data(setting, vocabulary)}")
    fixed = ("ep_size=1", "eval_every=0", "evaluation.every_steps=0", "log_every=1")
    return [
        *("pretrain/main.py", "--config", config, "--ds_config", setting.ds_config),
        *(*fixed, *overrides, *run),
    ]


def _toy(setting: Setting) -> tuple[str, ...]:
    """The demo's model with packed rows and two micro-batches per step; tiny on a CPU."""
    return ("global_batch_size=8", "micro_batch_size=4", *(TINY if setting.small else ()))


def _real(setting: Setting) -> tuple[str, ...]:
    """The real configuration with two micro-batches per step, and no checkpoint in the first 20."""
    if setting.small:
        return (*_toy(setting), "peak_tflops=1", "save_every=100000", "max_steps=100000")
    rows = load_run_config(setting.config, ["data.path=unread"]).micro_batch_size
    return (f"global_batch_size={2 * rows}", "save_every=100000")


def _plan(setting: Setting, overrides: tuple[str, ...]) -> LayoutPlan:
    """What pretrain/planning predicts for the run."""
    _, _, config, _, ds_config, *given = command(setting, "planned", setting.config, overrides)
    outline = prepare(config, ds_config, given, dry_run=True)
    return plan(deepest(outline.model_config), layout_of(outline), Hardware())


def data(setting: Setting, vocabulary: int) -> Path:
    """A folder of short programs as data, in a vocabulary of exactly this many pieces."""
    folder = setting.work / f"data-{vocabulary}"
    if (folder / MANIFEST).exists():
        return folder
    setting.work.mkdir(parents=True, exist_ok=True)
    trained = data(setting, TOY_VOCABULARY) / "tokenizer.model" if vocabulary != TOY_VOCABULARY else None
    overrides = ["sources.0.num_samples=2000"]
    if trained is not None:
        wide = setting.work / f"tokenizer-{vocabulary}.model"
        wide.write_bytes(widened(trained.read_bytes(), vocabulary - Tokenizer(trained).vocab_size))
        overrides += ["tokenizer.vocab_size=null", f"tokenizer.file={wide}"]
    build(load_recipe(ROOT / "data_pipeline/recipes/demo.yaml", overrides), ROOT, folder)
    return folder


def widened(model: bytes, more: int) -> bytes:
    """A sentencepiece model with `more` pieces that no text contains.

    Its file is a protocol buffer, in which what is appended to field 1, the pieces, joins that list
    (sentencepiece_model.proto: a piece is a string, field 1, and a score, field 2).
    """
    added = b""
    for number in range(more):
        text = f"\u2047unused{number}\u2047".encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15\x00\x00\xc8\xc2"  # score -100
        added += b"\x0a" + bytes([len(piece)]) + piece
    return model + added


def _lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / METRICS
    return [line for line in read_json_lines(path).records if "loss" in line] if path.exists() else []


def _settled(lines: list[dict[str, Any]], key: str) -> float:
    return statistics.median(line[key] for line in lines[SETTLED:])


def farthest(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> float:
    """The largest relative distance of two runs' losses, step by step; inf where one has none."""
    pairs = [(a["loss"], b["loss"]) for a, b in zip(found, expected, strict=True)]
    return max(math.inf if None in pair else abs(pair[0] / pair[1] - 1) for pair in pairs)
