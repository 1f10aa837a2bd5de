"""Ours against transformers' DeepseekV3: the same weights, batch, dtype and machine, interleaved in one run.

    python bench/compare.py [--device cuda] [--dtypes bf16] [--tasks train,decode] [--out FILE.json]

train is a forward and a backward pass; prefill is the prompt up to its last logits; decode is
greedy generation with a cache after that; memory is the growth of a separate process over its first training
step, in whole pages and with the system's allocator, so it varies by a few percent. A missed target is
followed by a profile of both.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import (
    DEFAULTS,
    DTYPES,
    Seconds,
    check_at_least,
    check_choices,
    check_device,
    interleaved,
    json_object,
    listed,
    memory_growth,
    now,
    our_model,
    print_table,
    random_tokens,
    spread,
    train_step,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from common.errors import user_errors
from common.files import write_json
from model import ModelConfig, ZeroModel
from model.config.execution import ExecutionConfig
from model.counts import num_parameters
from model.hf.deepseek import hf_config, to_hf

TASKS = ("train", "prefill", "decode", "memory")
NAMES = ("ours", "transformers")
# Target ratios: speed at least this many times theirs, memory at most this share of theirs.
TARGETS = {
    ("train", "fp32"): 1.3,
    ("train", "bf16"): 2.0,
    ("decode", "fp32"): 3.0,
    ("decode", "bf16"): 3.0,
    ("memory", "fp32"): 0.6,
    ("memory", "bf16"): 0.6,
}
# If transformers' training step would take longer, both are timed on fewer rows.
SLOW_SECONDS = 30.0
MEMORY_RUNS = 3  # at most; each is a process that builds the model
PROFILED = 10  # number of operations shown


@dataclass
class Result:
    """One line of the table."""

    task: str
    dtype: str
    rows: int
    tokens: int  # per run; 0 for memory
    measured: dict[str, list[float]]  # by name: seconds, or bytes for memory
    profiles: dict[str, list[dict[str, Any]]] | None = None  # by name: see _profile

    def values(self, name: str) -> list[float]:
        """Tokens per second, or MiB."""
        if self.task == "memory":
            return [n / 2**20 for n in self.measured[name]]
        return [self.tokens / seconds for seconds in self.measured[name]]

    @property
    def ratio(self) -> float:
        """Median of ours over median of theirs."""
        ours, theirs = (statistics.median(self.values(name)) for name in NAMES)
        return ours / theirs

    @property
    def target(self) -> float | None:
        return TARGETS.get((self.task, self.dtype))

    @property
    def met(self) -> bool | None:
        """None where there is no target."""
        if self.target is None:
            return None
        return self.ratio <= self.target if self.task == "memory" else self.ratio >= self.target


def main() -> None:
    with user_errors(ValueError, OSError):
        _run(_parse())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare speed and memory with transformers' DeepseekV3.")
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtypes", type=listed, help="comma-separated (default: fp32,bf16; on a GPU bf16)")
    add("--tasks", type=listed, default=list(TASKS), help=f"comma-separated (default: {','.join(TASKS)})")
    add("--runs", type=int, default=5, help="counted runs of each (default: 5)")
    add("--threads", type=int, default=2, help="of the CPU (default: 2)")
    add("--batch", type=int, help="rows (default: 8)")
    add("--length", type=int, help="tokens per row, also of the prompt (default: 512; on a GPU 2048)")
    add("--new_tokens", type=int, default=33, help="tokens to generate; the first is prefill (default: 33)")
    add("--sizes", type=json_object, default={}, metavar="JSON", help="model config keys to change")
    add("--out", type=Path, metavar="FILE.json", help="machine, versions, command and every timing")
    add("--memory", choices=NAMES, help="only print, as JSON, the bytes that one of its training steps adds")
    arguments = parser.parse_args()
    sizes, batch, length = DEFAULTS[arguments.device]
    arguments.sizes = {**sizes, **arguments.sizes}
    arguments.batch = batch if arguments.batch is None else arguments.batch
    arguments.length = length if arguments.length is None else arguments.length
    arguments.dtypes = arguments.dtypes or (list(DTYPES) if arguments.device == "cpu" else ["bf16"])
    return arguments


def _check(arguments: argparse.Namespace) -> ModelConfig:
    """The model's config. Raises ValueError for a wrong flag."""
    check_device(arguments.device)
    check_choices("dtypes", arguments.dtypes, tuple(DTYPES))
    check_choices("tasks", arguments.tasks, TASKS)
    lowest = {"runs": 1, "threads": 1, "batch": 1, "length": 2, "new_tokens": 2}
    check_at_least({flag: (getattr(arguments, flag), limit) for flag, limit in lowest.items()})
    config = ModelConfig.from_dict(arguments.sizes)
    total, limit = arguments.length + arguments.new_tokens, config.max_position_embeddings
    if total > limit:
        raise ValueError(
            f"--length={arguments.length} and --new_tokens={arguments.new_tokens} exceed "
            f"max_position_embeddings={limit}; lower them or raise it in --sizes"
        )
    return config


def _run(arguments: argparse.Namespace) -> None:
    config = _check(arguments)
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    if arguments.memory:
        model = build(arguments.memory, config, arguments.device, arguments.dtypes[0])
        tokens = random_tokens(config, arguments.batch, arguments.length, arguments.device)
        print(json.dumps({"bytes": memory_growth(model, tokens)}))
        return
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    _check_same_network(config)
    results: list[Result] = []
    for dtype in arguments.dtypes:
        results += _compare(arguments, config, dtype)
    if arguments.out:
        report = {"machine": machine(), "arguments": vars(arguments) | {"out": str(arguments.out)}}
        rows = [asdict(r) | {"ratio": r.ratio, "target": r.target, "met": r.met} for r in results]
        write_json(arguments.out, {**report, "results": rows}, indent=2)
    _print_results(arguments, config, results)


def build(name: str, config: ModelConfig, device: str, dtype: str) -> nn.Module:
    """`ours` or `transformers`, the latter with its default experts, SDPA and the same weights."""
    if name == "ours":
        return our_model(config, device, dtype, ExecutionConfig())
    with tempfile.TemporaryDirectory() as folder:
        tensors = to_hf(config, ZeroModel(config).state_dict())
        # Copies: safetensors refuses tensors that share memory, as rows of stacked experts do.
        save_file({n: t.clone() for n, t in tensors.items()}, Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text(json.dumps(hf_config(config)))
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], attn_implementation="sdpa", trust_remote_code=False
        )
    model.generation_config.eos_token_id = None  # random weights may choose any token at any time
    model.to(device)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # some are memory-mapped: pages count when first read
    return model


def _check_same_network(config: ModelConfig) -> None:
    """Raises ValueError unless both give the same logits; otherwise the comparison would mean nothing."""
    tokens = random_tokens(config, 1, min(64, config.max_position_embeddings), "cpu")
    ours, theirs = (logits(build(name, config, "cpu", "fp32"), tokens) for name in NAMES)
    difference, limit = (ours - theirs).abs().max().item(), 1e-5 * max(1.0, theirs.abs().max().item())
    if not difference <= limit:
        raise ValueError(f"the two models' logits differ by {difference:.1e} in fp32, more than {limit:.1e}")
    print(f"the same network: in fp32 the logits differ by {difference:.1e}, less than {limit:.1e}")


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """(B, T, V) in fp32."""
    return model.eval()(tokens).logits.float()


def _compare(arguments: argparse.Namespace, config: ModelConfig, dtype: str) -> list[Result]:
    tasks, runs = arguments.tasks, arguments.runs
    results: list[Result] = []
    tokens = random_tokens(config, arguments.batch, arguments.length, arguments.device)
    if "memory" in tasks:
        measured: dict[str, list[float]] = {name: [] for name in NAMES}
        for _ in tqdm(range(min(runs, MEMORY_RUNS)), desc=f"{dtype} memory", unit="run"):
            for name in NAMES:
                measured[name].append(_memory_of(name, dtype))
        results.append(Result("memory", dtype, len(tokens), 0, measured))
    models = {name: build(name, config, arguments.device, dtype) for name in NAMES}
    if dtype != "fp32":
        ours, theirs = (logits(model, tokens[:1, :64]) for model in models.values())
        apart = (ours - theirs).abs()  # large where rounding changes a router's choice
        most, middle = apart.max().item(), apart.median().item()
        print(f"in {dtype} the logits differ by {most:.1e} at most, {middle:.1e} in the median")
    steps: dict[str, Callable[[], Seconds]] = {}
    if "train" in tasks or "memory" in tasks:
        rows = _affordable_rows(models["transformers"], tokens) if "train" in tasks else len(tokens)
        steps = {name: partial(train_step, model, tokens[:rows]) for name, model in models.items()}
    if "train" in tasks:
        seconds = interleaved(runs, f"{dtype} train", steps)["train"]
        results.append(Result("train", dtype, rows, rows * arguments.length, seconds))
    generations: dict[str, Callable[[], Seconds]] = {
        name: partial(generate, model, tokens, arguments.new_tokens) for name, model in models.items()
    }
    if {"prefill", "decode"} & set(tasks):
        both = interleaved(runs, f"{dtype} generate", generations)
        for task, length in (("prefill", arguments.length), ("decode", arguments.new_tokens - 1)):
            if task in tasks:
                results.append(Result(task, dtype, len(tokens), len(tokens) * length, both[task]))
    for result in results:
        if result.met is False:
            runners = steps if result.task in ("train", "memory") else generations
            result.profiles = {n: _profile(r, result.task, arguments.device) for n, r in runners.items()}
    return results


def _memory_of(name: str, dtype: str) -> float:
    """Bytes, from this script in a separate process.

    Raises:
        ValueError: the process failed; its stderr says why.
    """
    command = [sys.executable, __file__, *sys.argv[1:], "--dtypes", dtype, "--memory", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ValueError(
            f"the process that measures memory ended with code {done.returncode}, see above; "
            "fix that or leave memory out of --tasks"
        )
    return float(json.loads(done.stdout.splitlines()[-1])["bytes"])


def _affordable_rows(theirs: nn.Module, tokens: Tensor) -> int:
    """Rows with which transformers' step takes at most SLOW_SECONDS, extrapolated from a step of one row."""
    one, rows = train_step(theirs, tokens[:1])["train"], len(tokens)
    while rows > 1 and one * rows > SLOW_SECONDS:
        rows //= 2
    return rows


def generate(model: nn.Module, tokens: Tensor, new_tokens: int) -> Seconds:
    """Greedy continuation of tokens (B, T) with a cache; prefill ends with the first logits."""
    model.eval()
    marks: list[float] = []

    def mark(*_: Any) -> None:
        if not marks:
            marks.append(now(tokens))

    hook = model.register_forward_hook(mark)
    start = now(tokens)
    if isinstance(model, ZeroModel):
        out = model.generate(tokens, max_new_tokens=new_tokens)
    else:
        mask, plain = torch.ones_like(tokens), {"do_sample": False, "use_cache": True, "pad_token_id": 0}
        out = model.generate(tokens, attention_mask=mask, max_new_tokens=new_tokens, **plain)  # type: ignore[operator]
    end = now(tokens)
    hook.remove()
    assert out.shape == (len(tokens), tokens.shape[1] + new_tokens)
    return {"prefill": marks[0] - start, "decode": end - marks[0]}


def _profile(run: Callable[[], Seconds], task: str, device: str) -> list[dict[str, Any]]:
    """The operations with the largest self time in seconds, or for memory the most bytes of their own."""
    side = "device" if device == "cuda" else "cpu"
    key = f"self_{side}_memory_usage" if task == "memory" else f"self_{side}_time_total"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities, profile_memory=task == "memory") as profiler:
        run()
    # GPU kernels are counted with the operations that launch them.
    rows = [row for row in profiler.key_averages() if row.device_type == DeviceType.CPU]
    rows = sorted(rows, key=lambda row: -getattr(row, key))[:PROFILED]
    unit = 1 if task == "memory" else 1e-6  # given in bytes and microseconds
    return [{"operation": r.key, "calls": r.count, "own": getattr(r, key) * unit} for r in rows]


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        "command": sys.argv,
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "allocator": {k: v for k, v in os.environ.items() if k.startswith(("MALLOC_", "LD_PRELOAD"))},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _print_results(arguments: argparse.Namespace, config: ModelConfig, results: list[Result]) -> None:
    here = machine()
    where = here["gpu"] if arguments.device == "cuda" else f"{here['cpu']}, {here['threads']} threads"
    print(
        f"\n{num_parameters(config) / 1e6:,.1f}M parameters, rows of {arguments.length} tokens; {where}; ",
        end="",
    )
    print(f"torch {here['torch']}, transformers {here['transformers']}; ", end="")
    print(f"medians of {arguments.runs} (smallest-largest)\n")
    lines: list[tuple[str, ...]] = [("dtype", "rows", "what", *NAMES, "ratio", "target", "")]
    for r in results:
        unit = "peak MiB" if r.task == "memory" else "tokens/s"
        ours, theirs = (spread(r.values(name)) for name in NAMES)
        target = "" if r.target is None else f"{'<=' if r.task == 'memory' else '>='} {r.target:g}"
        verdict = {None: "", True: "met", False: "MISSED"}[r.met]
        line = (r.dtype, str(r.rows), f"{r.task}, {unit}", ours, theirs, f"{r.ratio:.2f}", target, verdict)
        lines.append(line)
    print_table(lines)
    if any(r.rows < arguments.batch for r in results):
        print(f"\nFewer than {arguments.batch} rows: transformers' step would take over {SLOW_SECONDS:g} s.")
    for r in results:
        if r.profiles:
            _print_profiles(r, r.profiles)


def _print_profiles(result: Result, profiles: dict[str, list[dict[str, Any]]]) -> None:
    what, unit, scale = ("bytes", "MiB", 2**-20) if result.task == "memory" else ("time", "ms", 1e3)
    print(f"\n{result.task} in {result.dtype}, one run: each operation's own {what}")
    pairs = zip(*(profiles[name] for name in NAMES), strict=False)
    shown = [
        [f"{p['own'] * scale:9,.1f} {unit} {p['calls']:6} x {p['operation']}" for p in pair] for pair in pairs
    ]
    print_table([NAMES, *map(tuple, shown)])


if __name__ == "__main__":
    main()
