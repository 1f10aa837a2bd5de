"""Training throughput and model FLOPs utilisation of every attention and expert backend, on a GPU.

    python bench/gpu.py [--batch 8] [--length 2048] [--runs 10] [--out FILE.json]

A forward and a backward pass in bf16 of a model of about 1B parameters with 64 experts, 6 of them per token,
over packed rows as training has them: several documents in a row, which attention keeps apart. Every backend
runs in a separate process, so that a failure does not affect the others: the table then gives its package's
version and the error. MFU counts the model's FLOPs, without recomputation, with attention over the full
sequence (PaLM, arXiv 2204.02311, appendix B), so that skipping other documents raises it. `--device cpu` only
tests the script.
"""

import argparse
import importlib.metadata
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from measuring import (
    DEFAULTS,
    check_at_least,
    check_choices,
    check_device,
    interleaved,
    json_object,
    listed,
    memory_growth,
    our_model,
    packed_rows,
    print_table,
    random_tokens,
    spread,
    train_step,
)
from tqdm import tqdm

from common.errors import user_errors
from common.files import write_json
from model import ModelConfig
from model.config.execution import ATTENTION_BACKENDS, EXPERT_BACKENDS, ExecutionConfig
from model.counts import num_parameters, training_flops_per_token
from pretrain.metrics import PEAK_TFLOPS

PACKAGES = {
    "flash_attn": ("flash-attn",),
    "flash_attn_4": ("flash-attn-4",),
    "megablocks": ("megablocks", "grouped_gemm"),
}
PINS = Path(__file__).parents[1] / "requirements-gpu.txt"


def main() -> None:
    with user_errors(ValueError, OSError):
        _run(_parse())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Throughput and MFU of every backend.")
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add(
        "--attention",
        type=listed,
        default=listed("varlen,flash_attn,flash_attn_4,sdpa,flex"),
        help="comma-separated",
    )
    add("--experts", type=listed, default=listed("grouped_mm,loop,megablocks"), help="comma-separated")
    add("--runs", type=int, default=10, help="counted runs of each (default: 10)")
    add("--batch", type=int, help="rows (default: 8)")
    add("--length", type=int, help="tokens per row (default: 2048)")
    add("--sizes", type=json_object, default={}, metavar="JSON", help="model config keys to change")
    add("--peak_tflops", type=float, help="dense bf16 peak of the device (default: known from its name)")
    add("--out", type=Path, metavar="FILE.json", help="machine, versions, command and every timing")
    add(
        "--only",
        nargs=2,
        metavar=("ATTENTION", "EXPERTS"),
        help="only print, as JSON, these two's figures",
    )
    arguments = parser.parse_args()
    sizes, batch, length = DEFAULTS[arguments.device]
    arguments.sizes = {**sizes, **arguments.sizes}
    arguments.batch = batch if arguments.batch is None else arguments.batch
    arguments.length = length if arguments.length is None else arguments.length
    return arguments


def _run(arguments: argparse.Namespace) -> None:
    check_device(arguments.device)
    check_choices("attention", arguments.attention, ATTENTION_BACKENDS)
    check_choices("experts", arguments.experts, EXPERT_BACKENDS)
    check_at_least({name: (getattr(arguments, name), 1) for name in ("runs", "batch", "length")})
    config = ModelConfig.from_dict(arguments.sizes)
    if arguments.only:
        sizes = (arguments.device, arguments.batch, arguments.length, arguments.runs)
        attention, experts = arguments.only
        print(json.dumps(measure(config, attention, experts, *sizes)))
        return
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    pairs = [(name, "auto") for name in arguments.attention] + [("auto", name) for name in arguments.experts]
    results = [_in_own_process(*pair) for pair in tqdm(pairs, desc="backends", unit="backend")]
    peak = arguments.peak_tflops or _peak_tflops(arguments.device)
    for result in results:
        result |= {"versions": _versions(result), "mfu": _mfu(result, arguments, config, peak)}
    if arguments.out:
        report = {"machine": _machine(arguments), "peak_tflops": peak, "results": results}
        write_json(arguments.out, report, indent=2)
    _print_results(arguments, config, peak, results)
    if all("error" in result for result in results):
        sys.exit(1)


def measure(
    config: ModelConfig, attention: str, experts: str, device: str, batch: int, length: int, runs: int
) -> dict[str, Any]:
    """Seconds of the counted training steps on packed rows, and the peak bytes that another one adds."""
    model = our_model(config, device, "bf16", ExecutionConfig(attention=attention, experts=experts))
    tokens = random_tokens(config, batch, length, device)
    packed = packed_rows(batch, length, device)
    label = f"attention {attention}, experts {experts}"
    seconds = interleaved(runs, label, {"ours": lambda: train_step(model, tokens, **packed)})["train"]
    # Memory last: the first step's compiling and tuning do not belong to a step.
    return {"seconds": seconds["ours"], "bytes": memory_growth(model, tokens, **packed)}


def _in_own_process(attention: str, experts: str) -> dict[str, Any]:
    """The result of `measure`, or the error that ended it."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", attention, experts]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    pair = {"attention": attention, "experts": experts}
    if done.returncode == 0:
        return {**pair, **json.loads(done.stdout.splitlines()[-1])}
    last = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
    return {**pair, "error": last[-1].removeprefix("error: "), "stderr": done.stderr}


def _mfu(
    result: dict[str, Any], arguments: argparse.Namespace, config: ModelConfig, peak: float | None
) -> float | None:
    """Share of the device's peak that the median run reaches; None: the run failed or the peak is unknown."""
    if peak is None or "error" in result:
        return None
    flops = training_flops_per_token(config, arguments.length) * arguments.batch * arguments.length
    return flops / statistics.median(result["seconds"]) / (peak * 1e12)


def _peak_tflops(device: str) -> float | None:
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


def _versions(result: dict[str, Any]) -> str:
    """Version of the package behind a backend: torch, unless it has its own."""
    packages = [p for name in (result["attention"], result["experts"]) for p in PACKAGES.get(name, ())]
    return ", ".join(_version(package) for package in packages or ["torch"])


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        pin = re.search(rf"^{package}==(\S+)", PINS.read_text(), flags=re.M)
        return f"{package} {f'{pin[1]} ' if pin else ''}(not installed)"


def _machine(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "command": sys.argv,
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "batch": arguments.batch,
        "length": arguments.length,
        "sizes": arguments.sizes,
    }


def _print_results(
    arguments: argparse.Namespace, config: ModelConfig, peak: float | None, results: list[dict[str, Any]]
) -> None:
    here, known = _machine(arguments), f"{peak:g} TFLOP/s" if peak else "unknown: give --peak_tflops"
    sizes = [f"{num_parameters(config, active) / 1e9:.2f}B" for active in (False, True)]
    print(
        f"\n{sizes[0]} parameters, {sizes[1]} active; {arguments.batch} x {arguments.length} tokens in bf16"
    )
    print(f"{here['device']}, torch {here['torch']}, CUDA {here['cuda']}; dense bf16 peak {known}")
    print(f"medians of {arguments.runs} (smallest-largest); memory is the peak that a step adds\n")
    head = ("attention", "experts", "version", "tokens/s", "MFU", "step MiB", "error")
    lines: list[tuple[str, ...]] = [head]
    for r in results:
        start = (r["attention"], r["experts"], r["versions"])
        if "error" in r:
            lines.append((*start, "", "", "", r["error"]))
            continue
        rates = spread([arguments.batch * arguments.length / seconds for seconds in r["seconds"]])
        mfu = "-" if r["mfu"] is None else f"{r['mfu']:.1%}"
        lines.append((*start, rates, mfu, f"{r['bytes'] / 2**20:,.0f}", ""))
    print_table(lines)


if __name__ == "__main__":
    main()
