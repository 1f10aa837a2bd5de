"""How the network is computed: the same numbers up to rounding, at different speed and memory."""

import functools
import importlib.util
import itertools
import logging
from dataclasses import dataclass

import torch

log = logging.getLogger("zeromodel")

DOCUMENT_BACKENDS = ("varlen", "flash_attn", "flash_attn_4")  # flash kernels, see backends/flash.py
ATTENTION_BACKENDS = ("auto", "sdpa", "blockwise", "flex", *DOCUMENT_BACKENDS)
EXPERT_BACKENDS = ("auto", "loop", "grouped_mm", "padded", "megablocks")
HALF = (torch.bfloat16, torch.float16)
FLASH_WIDTH = 256  # the widest head of FlashAttention-2's kernels, which torch's are too
CHECKPOINTING = ("none", "block", "selective", "iteration")


@dataclass(frozen=True)
class ExecutionConfig:
    """Switches that change no result; not part of a checkpoint.

    Raises:
        ValueError: unknown value.
    """

    # auto: blockwise on a CPU; on a GPU varlen for packed rows in 16 bits, else sdpa
    # | flex (on a CPU no gradients) | varlen, flash_attn, flash_attn_4 (GPU, 16 bits)
    attention: str = "auto"
    # auto: grouped_mm where it has kernels for the sizes, else loop on a CPU and padded (batched products) on
    # a GPU | megablocks (GPU, bf16)
    experts: str = "auto"
    # none | block: a layer keeps its input and its router's choice | selective: also its matrix products
    # | iteration: every step of a loop keeps its state and the routers' choices
    checkpointing: str = "none"
    compile: bool = False  # torch.compile of each layer's parts between expert products and exchanges

    def __post_init__(self) -> None:
        for name, allowed in (
            ("attention", ATTENTION_BACKENDS),
            ("experts", EXPERT_BACKENDS),
            ("checkpointing", CHECKPOINTING),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"execution.{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}"
                )


@functools.cache
def attention_backend(
    name: str, device: str, dtype: torch.dtype, packed: bool, widths: tuple[int, int]
) -> str:
    """The backend that `name` selects on a device ("cpu", "cuda"); logged once.

    Args:
        packed: whether rows hold several documents.
        widths: of a head's keys and values.

    Raises:
        ValueError: an explicitly named backend does not run there.
    """
    fits = max(widths) <= FLASH_WIDTH
    chosen = name
    if name == "auto":
        flash = device == "cuda" and dtype in HALF and packed and fits
        chosen = "blockwise" if device == "cpu" else "varlen" if flash else "sdpa"
    if chosen in DOCUMENT_BACKENDS:
        _require_gpu("attention", chosen, device, dtype)
        if not fits:
            raise ValueError(
                f"execution.attention={chosen} takes heads of at most {FLASH_WIDTH} numbers, but keys and "
                f"values have {widths[0]} and {widths[1]}; choose execution.attention=auto"
            )
    if chosen == "flash_attn":
        _require_package("attention", "flash_attn.flash_attn_interface", "flash-attn")
    if chosen == "flash_attn_4":
        _require_package("attention", "flash_attn.cute", "flash-attn-4")
        generation, _ = torch.cuda.get_device_capability()
        if generation not in (9, 10):
            raise ValueError(
                f"execution.attention=flash_attn_4 runs on GPUs of compute capability 9 and 10, but this one "
                f"has {generation}; choose execution.attention=auto"
            )
    log.info("attention backend on %s: %s", device, chosen)
    return chosen


@functools.cache
@torch.compiler.assume_constant_result  # compiled code does not log
def expert_backend(name: str, device: str, dtype: torch.dtype, widths: tuple[int, ...]) -> str:
    """The backend that `name` selects; widths: the inner sizes of the experts' products. Logged once.

    Raises:
        ValueError: an explicitly named backend does not run there.
    """
    aligned = all(width * dtype.itemsize % 16 == 0 for width in widths) and dtype != torch.float64
    chosen = name
    if name == "auto":
        grouped = aligned and (device == "cpu" or _has_grouped_products(device, dtype))
        chosen = "grouped_mm" if grouped else "loop" if device == "cpu" else "padded"
    if chosen == "grouped_mm" and not aligned:
        raise ValueError(
            f"execution.experts=grouped_mm needs expert widths that are multiples of 16 bytes, but they are "
            f"{' and '.join(map(str, widths))} numbers of {dtype}; choose other widths or experts=loop"
        )
    if chosen == "megablocks":
        _require_gpu("experts", chosen, device, dtype)
        _require_package("experts", "megablocks", "megablocks")
        _require_package("experts", "grouped_gemm", "grouped_gemm")
    log.info("expert backend on %s in %s: %s", device, dtype, chosen)
    return chosen


def _has_grouped_products(device: str, dtype: torch.dtype) -> bool:
    """Whether torch 2.13 has a GPU's kernel for grouped products (aten/src/ATen/native/cuda/GroupedBlas.cpp).

    Elsewhere grouped_mm runs too, but the host waits for the sizes and multiplies group by group.
    """
    return device == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability()[0] in (9, 10)


def _require_gpu(switch: str, name: str, device: str, dtype: torch.dtype) -> None:
    if device != "cuda" or dtype not in HALF:
        raise ValueError(
            f"execution.{switch}={name} needs a GPU and half precision, but the model runs in {dtype} on "
            f"{device}; choose execution.{switch}=auto"
        )


def _require_package(switch: str, module: str, package: str) -> None:
    """module: what only this package has (flash-attn and flash-attn-4 share a folder)."""
    parents = itertools.accumulate(module.split("."), lambda parent, child: f"{parent}.{child}")
    if any(importlib.util.find_spec(name) is None for name in parents):
        raise ValueError(
            f"execution.{switch} needs the package {package}, which is not installed; run `make setup-gpu` "
            f"or choose execution.{switch}=auto"
        )
