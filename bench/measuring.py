"""What the benchmarks share: the model, a training step, and how its time and memory are measured."""

import argparse
import ctypes
import gc
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data_pipeline.loading.loader import Batch
from model import ModelConfig, ZeroModel
from model.backends.flash import Documents
from model.config.execution import ExecutionConfig
from model.losses import IGNORE_INDEX

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CPU_SIZES: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "intermediate_size": 1024,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 512,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "max_position_embeddings": 2048,
}
# 0.98B parameters, 0.23B of them active: 64 experts, 6 per token.
GPU_SIZES: dict[str, Any] = {
    **CPU_SIZES,
    "vocab_size": 32768,
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "kv_lora_rank": 256,
    "intermediate_size": 4096,
    "moe_intermediate_size": 384,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "max_position_embeddings": 8192,
}
# Sizes, rows and tokens per row that suit a device.
DEFAULTS: dict[str, tuple[dict[str, Any], int, int]] = {
    "cpu": (CPU_SIZES, 8, 512),
    "cuda": (GPU_SIZES, 8, 2048),
}

Seconds = dict[str, float]  # per run, by what was measured


def check_device(device: str) -> None:
    """Raises ValueError if torch sees no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda needs a GPU, but torch sees none; use --device=cpu")


def check_at_least(limits: dict[str, tuple[int, int]]) -> None:
    """Raises ValueError for the first flag whose value is below its limit; limits: flag -> (value, limit)."""
    for flag, (value, limit) in limits.items():
        if value < limit:
            raise ValueError(f"--{flag}={value} must be at least {limit}")


def check_choices(flag: str, chosen: list[str], known: tuple[str, ...]) -> None:
    """Raises ValueError for a value of a comma-separated flag that is not known."""
    for value in chosen:
        if value not in known:
            raise ValueError(f"--{flag}={value} is unknown; choose from {','.join(known)}")


def listed(text: str) -> list[str]:
    """An argparse type: comma-separated values."""
    return text.split(",")


def json_object(text: str) -> dict[str, Any]:
    """An argparse type: a JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError('must be a JSON object such as {"hidden_size": 64}')
    return value


def our_model(config: ModelConfig, device: str, dtype: str, execution: ExecutionConfig) -> ZeroModel:
    """Seeded weights; the balancing biases stay in fp32, as in a training run and in transformers."""
    model = ZeroModel(config, execution=execution).to(device, DTYPES[dtype])
    for layer in model.moe_layers():
        layer.gate.e_score_correction_bias = layer.gate.e_score_correction_bias.float()
    return model


def random_tokens(config: ModelConfig, rows: int, length: int, device: str) -> Tensor:
    """(rows, length) int64, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (rows, length), generator=generator).to(device)


def packed_rows(rows: int, length: int, device: str) -> dict[str, Any]:
    """What training hands the model of packed rows, `cu_seqlens` and `documents`; seeded.

    Half of the documents are shorter than a quarter of a row, with log-normal lengths as web text has; some
    have one token, and the starts repeat at the end of a row.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(rows, 32).log_normal_(math.log(length / 4), 1.0, generator=generator).long()
    lengths[:, 1] = 1
    starts = torch.cat((torch.zeros(rows, 1, dtype=torch.int64), lengths.cumsum(1)), 1).clamp(max=length)
    starts[:, -1] = length
    empty = np.zeros((rows, length), dtype=np.int32)
    batch = Batch(empty, empty, starts.int().numpy(), np.full(rows, length), [], [])
    boundaries, longest = batch.documents(slice(rows))
    documents = Documents(torch.from_numpy(boundaries).to(device), longest)
    return {"cu_seqlens": torch.from_numpy(batch.cu_seqlens).to(device), "documents": documents}


def train_step(model: nn.Module, tokens: Tensor, **packed: Any) -> Seconds:
    """Forward and backward pass of next-token prediction over tokens (B, T); then frees the gradients.

    packed: see packed_rows; for our models only.
    """
    model.train()
    start = now(tokens)
    if isinstance(model, ZeroModel):
        targets = tokens.roll(-1, 1)
        targets[:, -1] = IGNORE_INDEX
        loss = model(tokens, targets=targets, **packed).loss
    else:  # shifts the labels itself; a cache would only cost time and memory
        loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    seconds = now(tokens) - start
    model.zero_grad(set_to_none=True)
    return {"train": seconds}


def now(like: Tensor) -> float:
    """Clock in seconds, once everything queued on the tensor's device is done."""
    if like.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(
    runs: int, label: str, functions: dict[str, Callable[[], Seconds]]
) -> dict[str, dict[str, list[float]]]:
    """Runs the functions in turn, A B A B ..., after one uncounted run of each.

    Returns:
        Quantity -> name of the function -> seconds of every counted run.
    """
    seconds: dict[str, dict[str, list[float]]] = {}
    for run in tqdm(range(runs + 1), desc=label, unit="run"):
        for name, function in functions.items():
            for what, value in function().items():
                kept = seconds.setdefault(what, {}).setdefault(name, [])
                if run:
                    kept.append(value)
    return seconds


def memory_growth(model: nn.Module, tokens: Tensor, **packed: Any) -> int:
    """Bytes that a training step adds, at its peak, to what the process already held.

    On a CPU only a process's first step shows it: freed memory stays with the process and is reused later.

    Raises:
        ValueError: on a CPU whose system has no /proc.
    """
    gc.collect()
    step = partial(train_step, model, tokens, **packed)
    if tokens.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        raise ValueError(f"peak memory on a CPU is read from /proc, but {reset} is missing; use Linux")
    # Memory freed after building the model must not hide what the step needs.
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # resets the peak, VmHWM
    before = status_bytes("VmRSS")
    step()
    return status_bytes("VmHWM") - before


def status_bytes(key: str) -> int:
    """Bytes from the line `KEY: N kB` of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def spread(values: list[float], digits: int = 0) -> str:
    """`median (smallest-largest)`; a single value alone."""
    low, middle, high = (f"{f(values):,.{digits}f}" for f in (min, statistics.median, max))
    return middle if len(values) == 1 else f"{middle} ({low}-{high})"


def print_table(lines: list[tuple[str, ...]]) -> None:
    """Prints rows of equal length in columns, the header first."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
