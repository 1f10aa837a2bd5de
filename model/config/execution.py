"""How the network is computed: the same numbers up to rounding, at different speed and memory.

That rounding is small with every switch but one: precision=fp8 rounds the operands of products to 4 digits.
"""

import functools
import importlib.util
import itertools
import logging
from dataclasses import dataclass

import torch

from common.nearest import nearest

log = logging.getLogger("zeromodel")

DOCUMENT_BACKENDS = ("varlen", "flash_attn", "flash_attn_4")  # flash kernels, see backends/flash.py
ATTENTION_BACKENDS = ("auto", "sdpa", "blockwise", "flex", *DOCUMENT_BACKENDS)
EXPERT_BACKENDS = ("auto", "loop", "grouped_mm", "padded", "megablocks")
HALF = (torch.bfloat16, torch.float16)
FLASH_WIDTH = 256  # the widest head of FlashAttention-2's kernels, which torch's are too
CHECKPOINTING = ("none", "block", "selective", "iteration")
PRECISIONS = ("auto", "fp32", "fp8")


@dataclass(frozen=True)
class ExecutionConfig:
    """Switches that change no result but by rounding; not part of a checkpoint.

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
    # auto: the DeepSpeed JSON's, on a GPU only bf16 | fp32: the JSON's fp32 is meant, on a GPU too
    # | fp8: of the products in attention's projections, feed-forward layers and experts, see model/fp8.py
    precision: str = "auto"

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
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"execution.precision={self.precision!r} is unknown; {nearest(self.precision, PRECISIONS)}"
            )
        if self.precision == "fp8" and self.compile:
            raise ValueError(
                "execution.compile=true with precision=fp8 is not supported: torch 2.13's compiler calls "
                "another product, which reads other scales; delete one of the two"
            )
        if self.precision == "fp8" and self.experts != "auto":
            raise ValueError(
                f"execution.experts={self.experts} does not multiply in FP8; delete it, or precision=fp8"
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


def check_precision(precision: str, device: str, dtype: torch.dtype) -> None:
    """Checks that a model with weights in `dtype` should train so on a device ("cpu", "cuda").

    Raises:
        ValueError: it cannot, or nobody would want it.
    """
    if precision == "fp8":
        require_fp8(device, dtype)
    if precision == "fp32" and dtype != torch.float32:
        raise ValueError(
            "execution.precision=fp32, but the DeepSpeed JSON sets bf16.enabled=true; choose one of the two"
        )
    if precision == "auto" and device != "cpu" and dtype == torch.float32:
        raise ValueError(
            f"the DeepSpeed JSON trains in fp32, which is several times slower than bf16 on {device}; use "
            "one with bf16, such as ds_configs/zero1_bf16.json, or set execution.precision=fp32"
        )


@functools.cache
def require_fp8(device: str, dtype: torch.dtype) -> None:
    """Checks that a model in `dtype` can multiply in FP8 on a device ("cpu", "cuda").

    A CPU emulates it. torch 2.13 has products with scales by tiles of 128 for NVIDIA's compute capability 9
    alone, from CUDA 12.9 on (aten/src/ATen/native/cuda/ScaledBlas.cpp).

    Raises:
        ValueError: it cannot.
    """
    if device == "cpu":
        return
    found, fix = "", "choose execution.precision=auto"
    if device != "cuda" or torch.version.cuda is None:
        found = f"on {device} without CUDA"
    elif (capability := torch.cuda.get_device_capability())[0] != 9:
        found = f"on a GPU of compute capability {capability[0]}.{capability[1]}"
    elif tuple(map(int, torch.version.cuda.split(".")[:2])) < (12, 9):
        found = f"with CUDA {torch.version.cuda}"
    elif dtype != torch.bfloat16:
        found, fix = f"in {dtype}", f"set bf16.enabled=true in the DeepSpeed JSON, or {fix}"
    if found:
        raise ValueError(
            "execution.precision=fp8 needs a CPU, or bf16 weights, CUDA 12.9 or later and a GPU of compute "
            f"capability 9 (H100, H200), but the model runs {found}; {fix}"
        )


def _has_grouped_products(device: str, dtype: torch.dtype) -> bool:
    """Whether torch 2.13 has a GPU's kernel for grouped products (aten/src/ATen/native/cuda/GroupedBlas.cpp).

    Elsewhere grouped_mm runs too, but the host waits for the sizes and multiplies group by group; on compute
    capability 10 an expert without rows gets a wrong gradient (pytorch issue 172439).
    """
    return device == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability()[0] == 9


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
