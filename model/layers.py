"""Linear layers, RMSNorm, rotary embedding, feed-forward layers.

Shapes: B batch, T tokens, D hidden, H heads, R rotary width.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig, YarnConfig


@functools.cache
def _cpu_multiplies_bf16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def upcasts(x: Tensor) -> bool:
    """Whether products of x run in fp32: bf16 on a CPU that has no instructions for it.

    torch would multiply there without vector instructions, 7 times slower; both round the fp32 sum to bf16.
    """
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not _cpu_multiplies_bf16()


class _UpcastLinear(torch.autograd.Function):
    """F.linear computed in fp32 that keeps its operands in bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(x.float(), weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grads[0].float()
        grad_weight = grad.flatten(0, -2).T @ x.flatten(0, -2).float()
        return (grad @ weight.float()).to(x.dtype), grad_weight.to(weight.dtype)


# Up to here a CPU is 1.2 to 4 times faster when it multiplies the other way round.
FEW_ROWS = 128


def few_rows(x: Tensor) -> bool:
    """Whether x (..., in) is a decoding step on a CPU, where reading the weights takes the time."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and x.numel() <= FEW_ROWS * x.shape[-1]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in), weight (out, in) -> (..., out)."""
    if upcasts(x):
        return _UpcastLinear.apply(x, weight)
    if few_rows(x):
        return (weight @ x.reshape(-1, x.shape[-1]).T).T.reshape(*x.shape[:-1], len(weight))
    return F.linear(x, weight)


class Linear(nn.Linear):
    """nn.Linear that is also fast in bf16 on CPUs without bf16 instructions."""

    def forward(self, input: Tensor) -> Tensor:
        out = linear(input, self.weight)
        return out if self.bias is None else out + self.bias


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang & Sennrich 2019, eq. 4), with a learned scale if `affine`."""

    weight: Tensor | None

    def __init__(self, width: int, eps: float, affine: bool = True) -> None:
        super().__init__()
        self.register_parameter("weight", nn.Parameter(torch.ones(width)) if affine else None)
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.width,), self.weight, self.eps)


def rotary_tables(position_ids: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, (B, T, R/2) in fp32, of positions (B, T) (Su et al. 2021, eq. 15; YaRN, eq. 23)."""
    R = config.rotary_dim
    exponents = torch.arange(0, R, 2, device=position_ids.device, dtype=torch.float32) / R
    frequencies, scale = config.rope_theta**-exponents, 1.0
    if config.rope_scaling is not None:
        frequencies = _yarn_frequencies(frequencies, config.rope_theta, config.rope_scaling)
        scale = _yarn_rotary_scale(config.rope_scaling)
    angles = position_ids[..., None].float() * frequencies
    return angles.cos() * scale, angles.sin() * scale


def _yarn_frequencies(frequencies: Tensor, theta: float, yarn: YarnConfig) -> Tensor:
    """Slows the slowly turning pairs down by `factor`, with a ramp between (YaRN, section 3.2).

    The ramp runs over pair numbers, rounded outwards as DeepSeek's code does.
    """
    R = 2 * len(frequencies)

    def pair_turning(times: float) -> float:
        """Number of the pair that turns this often in the original context."""
        wavelength = yarn.original_max_position_embeddings / (times * 2 * math.pi)
        return R * math.log(wavelength) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), R - 1)
    width = high - low if high != low else 0.001
    pairs = torch.arange(len(frequencies), device=frequencies.device, dtype=torch.float32)
    slowed = ((pairs - low) / width).clamp(0, 1)
    return frequencies / yarn.factor * slowed + frequencies * (1 - slowed)


def _yarn_rotary_scale(yarn: YarnConfig) -> float:
    """Factor on cos and sin; without both temperatures YaRN's own (eq. 22)."""
    if yarn.mscale and yarn.mscale_all_dim:
        return _temperature(yarn.factor, yarn.mscale) / _temperature(yarn.factor, yarn.mscale_all_dim)
    return _temperature(yarn.factor, 1.0)


def attention_scale(config: ModelConfig) -> float:
    """Factor on query-key products: 1/sqrt(width), times DeepSeek's squared YaRN temperature."""
    scale = (config.qk_head_dim if config.use_mla else config.plain_head_dim) ** -0.5
    if config.rope_scaling is not None and config.rope_scaling.mscale_all_dim:
        scale *= _temperature(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
    return scale


def _temperature(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (2i, 2i+1) of x (B, T, ..., R), as DeepSeek does; computed in fp32."""
    while cos.dim() < x.dim():
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


class SwiGLU(nn.Module):
    """Gated feed-forward layer: down(silu(gate(x)) * up(x)) (Shazeer 2020, eq. 6)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SquaredReLU(nn.Module):
    """Feed-forward layer without a gate: down(relu(up(x))^2) (Primer, arXiv 2109.08668, section 3)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(x)).square())


def feed_forward(config: ModelConfig) -> SwiGLU | SquaredReLU:
    """The dense feed-forward layer of a config."""
    kind = SwiGLU if config.hidden_act == "silu" else SquaredReLU
    return kind(config.hidden_size, config.intermediate_size)


def call(module: nn.Module, compiled: bool, *inputs: Any) -> Any:
    """module(*inputs); in training by torch.compile if `compiled`.

    All modules of a class share one compiled forward. Decoding stays eager: its lengths grow.
    """
    kind: Any = type(module)
    return _compiled(kind)(module, *inputs) if compiled and module.training else module(*inputs)


@functools.cache
def _compiled(kind: Any) -> Any:
    return torch.compile(kind.forward)
