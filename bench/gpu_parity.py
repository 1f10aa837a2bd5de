"""Every attention and expert backend against the plain reference: loss and all gradients.

The reference is the same model with the same weights in fp32 on a CPU, with sdpa and the loop over experts,
which the tests compare with transformers. In bf16 attention may err by twice what sdpa in bf16 does; experts
are compared with the loop in bf16, since a router that sees other roundings may choose other experts. The
products in FP8 are compared with their emulation.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_rows import ABSENT, Setting
from measuring import our_model, packed_rows, random_tokens
from torch import Tensor

from common.errors import error_line
from common.schema import from_plain
from model import ModelConfig
from model.config.execution import ATTENTION_BACKENDS, EXPERT_BACKENDS, ExecutionConfig, require_fp8
from model.fp8 import GroupedFp8, fp8_forward, fp8_to_rows, fp8_to_weight

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_lora_rank": 64,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "initializer_range": 0.1,
    "use_moe": False,
}
HEADS: dict[str, dict[str, Any]] = {
    "keys 192, values 128": {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
    "keys 96, values 128": {"qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 128},
    "4 heads share a key": {"use_mla": False, "num_attention_heads": 8, "num_key_value_heads": 2},
}
# The balancing bias decides who gets tokens: all experts, or two of them.
LOADS = {"all experts": 0.0, "2 of 8 experts": 9.0}
FP32_LIMIT, BF16_LIMIT, FP8_LIMIT = 1e-4, 0.02, 0.005
DTYPES = {"fp32": FP32_LIMIT, "bf16": BF16_LIMIT}
SLOW = "flex"  # compiles for every shape
PLAIN = {"attention": "sdpa", "experts": "loop"}

Values = dict[str, Tensor]  # the loss, and gradients by parameter


@dataclass(frozen=True)
class Case:
    """A model, and the tokens that it gets."""

    name: str
    sizes: dict[str, Any]
    packed: bool = True
    bias: float = 0.0  # of the first two experts in the router's choice


def attention_cases() -> list[Case]:
    rows = {"packed": True, "whole rows": False}
    return [
        Case(f"{heads}, {name}", {**SIZES, **sizes}, packed)
        for heads, sizes in HEADS.items()
        for name, packed in rows.items()
    ]


def expert_cases() -> list[Case]:
    layer = {"use_moe": True, "first_k_dense_replace": 0, "num_hidden_layers": 1}
    sizes = {**SIZES, **HEADS["keys 192, values 128"], **layer}
    return [Case(f"rows for {load}", sizes, bias=bias) for load, bias in LOADS.items()]


def check(setting: Setting) -> None:
    """A line per backend and dtype, with the worst of its cases."""
    quick = tuple(name for name in ATTENTION_BACKENDS if name != SLOW)
    _family(setting, "attention", attention_cases(), quick)
    _family(setting, "experts", expert_cases(), EXPERT_BACKENDS)
    _fp8(setting)
    _family(setting, "attention", attention_cases(), (SLOW,))


def _family(setting: Setting, family: str, cases: list[Case], names: tuple[str, ...]) -> None:
    for dtype, limit in DTYPES.items():
        reference = [values(case, PLAIN, "cpu", "fp32") for case in cases]
        limits = [limit] * len(cases)
        if dtype == "bf16":
            usual = [values(case, PLAIN, setting.device, dtype) for case in cases]
            if family == "attention":
                limits = _doubled(usual, reference, limit)
            else:
                reference = usual
        for name in names:
            execution = {**PLAIN, family: name}
            _compare(setting, f"{family} {name} {dtype}", execution, dtype, cases, reference, limits)


def _fp8(setting: Setting) -> None:
    """The products of a linear layer and of three experts, on the device against their emulation on a CPU.

    Both round the same operands in the same way; only the order of their sums differs.
    """
    generator = torch.Generator().manual_seed(0)
    counts, inner, outer = torch.tensor([200, 0, 56]), 384, 256
    shapes = {"rows": (256, inner), "grad": (256, outer), "weight": (3, outer, inner)}
    given = {n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}
    expected = _products_in_fp8(counts, **given)
    try:
        require_fp8(setting.device, torch.bfloat16)
    except ValueError as refusal:
        setting.note("products in FP8", ABSENT, error_line(refusal))
        return
    found = _products_in_fp8(counts.to(setting.device), **{n: x.to(setting.device) for n, x in given.items()})
    for name, error in _errors(found, expected).items():
        text = f"off by {error:.1e} from the emulation, allowed {FP8_LIMIT:.1e}"
        setting.judge(f"FP8, {name}", error <= FP8_LIMIT, text, error=error)


def _products_in_fp8(counts: Tensor, rows: Tensor, grad: Tensor, weight: Tensor) -> Values:
    experts = GroupedFp8(counts)
    found = {
        "linear": fp8_forward(rows, weight[0]),
        "linear, to rows": fp8_to_rows(grad, weight[0]),
        "linear, to weight": fp8_to_weight(grad, rows),
        "experts": experts.forward(rows, weight),
        "experts, to rows": experts.to_rows(grad, weight),
        "experts, to weight": experts.to_weight(grad, rows),
    }
    return {name: value.float().cpu() for name, value in found.items()}


def _doubled(usual: list[Values], reference: list[Values], least: float) -> list[float]:
    return [max(least, 2 * _error(*pair)) for pair in zip(usual, reference, strict=True)]


def _compare(
    setting: Setting,
    what: str,
    execution: dict[str, str],
    dtype: str,
    cases: list[Case],
    reference: list[Values],
    limits: list[float],
) -> None:
    figures = {}
    for case, expected, allowed in zip(cases, reference, limits, strict=True):
        computing = partial(values, case, execution, setting.device, dtype)
        found = setting.attempt(what, computing, f"{case.name}: ")
        if found is None:
            return
        figures[case.name] = {"error": _error(found, expected), "allowed": allowed}
    worst = max(figures, key=lambda name: figures[name]["error"] / figures[name]["allowed"])
    error, allowed = figures[worst].values()
    text = f"off by {error:.1e}, allowed {allowed:.1e} ({worst}; the worst of {len(cases)} cases)"
    setting.judge(what, error <= allowed, text, cases=figures)


def values(case: Case, execution: dict[str, str], device: str, dtype: str) -> Values:
    """Loss and gradients (fp32, on the CPU) of seeded weights on seeded tokens."""
    config = ModelConfig.from_dict(case.sizes)
    model = our_model(config, device, dtype, from_plain(ExecutionConfig, execution, "execution.")).train()
    for layer in model.moe_layers():
        layer.gate.e_score_correction_bias[:2] += case.bias
    rows, length = 2, 96
    tokens = random_tokens(config, rows, length, device)
    packed = packed_rows(rows, length, device) if case.packed else {}
    output = model(tokens, targets=tokens.roll(-1, 1), **packed)
    assert output.loss is not None
    output.loss.backward()
    found = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach().float().cpu(), **found}


def _error(found: Values, reference: Values) -> float:
    """The largest relative error (2-norm) of the loss and any parameter's gradient; inf if one is missing."""
    return max(_errors(found, reference).values()) if found.keys() == reference.keys() else math.inf


def _errors(found: Values, reference: Values) -> dict[str, float]:
    tiny = torch.finfo(torch.float32).tiny
    errors = {n: ((found[n] - v).norm() / v.norm().clamp(min=tiny)).item() for n, v in reference.items()}
    return {name: math.inf if math.isnan(error) else error for name, error in errors.items()}
