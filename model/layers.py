"""Linear layers, RMSNorm, rotary embedding, feed-forward layers.

Shapes: B batch, T tokens, D hidden, H heads, R rotary width.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config.model import ModelConfig
from model.config.rope import Llama3RopeConfig, YarnConfig
from model.fp8 import fp8_forward, fp8_linear, fp8_to_rows, fp8_to_weight


@functools.cache
@torch.compiler.assume_constant_result
def _cpu_multiplies_bf16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def upcasts(x: Tensor) -> bool:
    """Whether products of x run in fp32: for bf16 on a CPU without bf16 instructions.

    There torch would multiply without vector instructions, 7 times slower; both round the fp32 sum to bf16.
    """
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not _cpu_multiplies_bf16()


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or unchanged if it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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


# Up to this many rows, a CPU is 1.2 to 4 times faster when it multiplies the other way round.
FEW_ROWS = 128


def few_rows(x: Tensor) -> bool:
    """Whether x (..., in) is a decoding step on a CPU, whose time goes into reading the weights."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and x.numel() <= FEW_ROWS * x.shape[-1]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in), weight (out, in) -> (..., out)."""
    if upcasts(x):
        return _UpcastLinear.apply(x, weight)
    if few_rows(x):
        return (weight @ x.reshape(-1, x.shape[-1]).T).T.reshape(*x.shape[:-1], len(weight))
    return F.linear(x, weight)


class Linear(nn.Linear):
    """nn.Linear that is also fast in bf16 on CPUs without bf16 instructions.

    Args:
        initial_bias: the same for every output.
        zero: start with a weight of 0.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        initial_bias: float = 0.0,
        zero: bool = False,
    ) -> None:
        self.initial_bias, self.zero = initial_bias, zero
        self.fp8 = False  # see multiply_in_fp8
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        """torch's initial weights, for modules used by themselves; see initialization.py for a model's."""
        super().reset_parameters()
        with torch.no_grad():
            if self.zero:
                self.weight.zero_()
            if self.bias is not None:
                self.bias.fill_(self.initial_bias)

    def forward(self, input: Tensor) -> Tensor:
        out = fp8_linear(input, self.weight) if self.fp8 else linear(input, self.weight)
        return out if self.bias is None else out + self.bias


def multiply_in_fp8(module: nn.Module) -> None:
    """Makes the linear layers that a module holds itself, not those inside its parts, multiply in FP8."""
    for child in module.children():
        if isinstance(child, Linear):
            child.fp8 = True


def whole_weight(layer: nn.Module) -> Tensor:
    """The weight (out, in) that a Linear multiplies by, for products formed outside it.

    For a layer that pretrain/lora.py adapted: W + alpha/r B A, without dropout.
    """
    adapted: Any = layer
    if isinstance(layer, Linear) or adapted.disable_adapters or adapted.merged:
        return adapted.weight
    return adapted.weight + sum(adapted.get_delta_weight(name) for name in adapted.active_adapters)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang & Sennrich 2019, eq. 4), with a learned scale if `affine`."""

    weight: Tensor | None

    def __init__(self, width: int, eps: float, affine: bool = True) -> None:
        super().__init__()
        self.register_parameter("weight", nn.Parameter(torch.ones(width)) if affine else None)
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.width,), self.weight, self.eps)


class SharedKeyNorm(RMSNorm):
    """RMSNorm of every head's whole key [k_nope | k_rope], whose rotated part all heads share.

    The learned scale is the same for all heads: that of k_rope applies before the rotation, that of k_nope
    moves into the query. What is left differs by head: 1/rms, a factor of all products with the key.
    """

    def forward(  # type: ignore[override]
        self, q_nope: Tensor, k_nope: Tensor, k_rope: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q_nope, k_nope (B, T, H, N), k_rope (B, T, R) not rotated -> q_nope, k_rope, 1/rms (B, T, H)."""
        wide = torch.promote_types(k_nope.dtype, torch.float32)
        squares = k_nope.square().sum(-1, dtype=wide) + k_rope.square().sum(-1, dtype=wide)[..., None]
        inverse_rms = (squares / self.width + self.eps).rsqrt().to(k_nope.dtype)
        if self.weight is None:
            return q_nope, k_rope, inverse_rms
        of_nope, of_rope = self.weight.split([k_nope.shape[-1], k_rope.shape[-1]])
        return q_nope * of_nope, k_rope * of_rope, inverse_rms


def layer_norm(config: ModelConfig) -> RMSNorm | nn.LayerNorm:
    """A norm of hidden states of the config's kind (LayerNorm: Ba et al. 2016)."""
    if config.norm == "layer_norm":
        return nn.LayerNorm(config.hidden_size, config.rms_norm_eps)
    return RMSNorm(config.hidden_size, config.rms_norm_eps, config.rms_norm_affine)


def rotations(position_ids: Tensor, config: ModelConfig) -> Tensor:
    """Positions (B, T) -> cos and sin of their angles, (B, T, R/2, 2) (Su et al. 2021; YaRN, eq. 23)."""
    R = config.rope_pairs_dim or config.rotary_dim
    exponents = torch.arange(0, R, 2, device=position_ids.device, dtype=torch.float32) / R
    frequencies, scale = config.rope_theta**-exponents, 1.0
    if isinstance(config.rope_scaling, Llama3RopeConfig):
        frequencies = _llama3_frequencies(frequencies, config.rope_scaling)
    elif config.rope_scaling is not None:
        frequencies = _yarn_frequencies(frequencies, config.rope_theta, config.rope_scaling)
        scale = _yarn_rotary_scale(config.rope_scaling)
    if config.rope_pairs is not None:
        frequencies = frequencies[config.rope_pairs]
    angles = position_ids[..., None].float() * frequencies
    if angles.device.type == "cpu":  # rounds otherwise than cos and sin: results stay the same numbers
        return torch.view_as_real(torch.polar(torch.full_like(angles, scale), angles))
    return torch.stack((angles.cos(), angles.sin()), -1) * scale


def _yarn_frequencies(frequencies: Tensor, theta: float, yarn: YarnConfig) -> Tensor:
    """Slows the slowly turning pairs down by `factor`, with a ramp between (YaRN, section 3.2).

    The ramp runs over pair numbers, rounded outwards as DeepSeek's code does.
    """
    R = 2 * len(frequencies)

    def pair_turning(times: float) -> float:
        """Index of the pair that turns this often in the original context."""
        wavelength = yarn.original_max_position_embeddings / (times * 2 * math.pi)
        return R * math.log(wavelength) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), R - 1)
    width = high - low if high != low else 0.001
    pairs = torch.arange(len(frequencies), device=frequencies.device, dtype=torch.float32)
    slowed = ((pairs - low) / width).clamp(0, 1)
    return frequencies / yarn.factor * slowed + frequencies * (1 - slowed)


def _llama3_frequencies(frequencies: Tensor, scaling: Llama3RopeConfig) -> Tensor:
    """Slows the slowly turning pairs down by `factor`, with a ramp between (Llama 3.1's reference code)."""
    turns = frequencies * (scaling.original_max_position_embeddings / (2 * math.pi))  # in the old context
    width = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((turns - scaling.low_freq_factor) / width).clamp(0, 1)
    return frequencies / scaling.factor * (1 - kept) + frequencies * kept


def _yarn_rotary_scale(yarn: YarnConfig) -> float:
    """Factor on cos and sin; unless both temperatures are set, YaRN's own (eq. 22)."""
    if yarn.mscale and yarn.mscale_all_dim:
        return _temperature(yarn.factor, yarn.mscale) / _temperature(yarn.factor, yarn.mscale_all_dim)
    return _temperature(yarn.factor, 1.0)


def attention_scale(config: ModelConfig) -> float:
    """Factor on query-key products: 1/sqrt(width), times DeepSeek's squared YaRN temperature."""
    scale = (config.qk_head_dim if config.use_mla else config.plain_head_dim) ** -0.5
    if isinstance(config.rope_scaling, YarnConfig) and config.rope_scaling.mscale_all_dim:
        scale *= _temperature(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
    return scale


def _temperature(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turns the pairs (2i, 2i+1) of x (B, T, R) or (B, T, H, R), as DeepSeek does; computed in fp32.

    rotation: (B or 1, T, R/2, 2), see rotations.
    """
    if x.dim() == 4:
        rotation = rotation.unsqueeze(2)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _rotated_by_complex(at_least_fp32(x), rotation).to(x.dtype)
    even, odd = at_least_fp32(x).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def _rotated_by_complex(x: Tensor, rotation: Tensor) -> Tensor:
    """The same by complex products, which a CPU rounds otherwise: it fuses some multiplications with sums."""
    if any(n % 2 for n in (x.storage_offset(), *x.stride()[:-1])):
        # A complex view must start at an even offset; contiguous() leaves a single token where it is.
        x = x.clone(memory_format=torch.contiguous_format)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.view_as_complex(rotation)
    return torch.view_as_real(turned).flatten(-2)


class Products(NamedTuple):
    """Products of rows with a weight: one for all rows (out, in), or one per group of rows (E, out, in)."""

    forward: Callable[[Tensor, Tensor], Tensor]  # rows (n, in), weight -> (n, out)
    to_rows: Callable[[Tensor, Tensor], Tensor]  # gradient (n, out), weight -> (n, in)
    to_weight: Callable[[Tensor, Tensor], Tensor]  # gradient (n, out), rows (n, in) -> like weight


DENSE = Products(
    forward=lambda rows, weight: rows @ weight.T,
    to_rows=lambda grad, weight: grad @ weight,
    to_weight=lambda grad, rows: grad.T @ rows,
)
FP8 = Products(fp8_forward, fp8_to_rows, fp8_to_weight)


class FeedForward(torch.autograd.Function):
    """A feed-forward layer that keeps only its input and the products with it, in the dtype of the input:

        down(p silu(gate(x)) up(x)), or without a gate down(p relu(up(x))^2),

    where p, if given, is a factor of each row. As down is linear, this equals p times the layer, but takes no
    pass over its results, and backward needs none of them. Squared ReLU: Primer, arXiv 2109.08668, section 3.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        w3: Tensor | None,
        w2: Tensor,
        p: Tensor | None,
        products: Products,
        dtype: torch.dtype,
    ) -> Tensor:
        """x (n, D), w1 (..., F, D), w3 like it, w2 (..., D, F), p (n,) -> (n, D).

        w1 is gate and w3 up, or w1 is up and w3 None; w2 is down. p is not rounded. dtype: of the products;
        see upcasts.
        """
        rows = x.to(dtype)
        first = products.forward(rows, w1.to(dtype))
        up = None if w3 is None else products.forward(rows, w3.to(dtype))
        ctx.save_for_backward(p, None if up is None else up.to(x.dtype), w3, x, first.to(x.dtype), w1, w2)
        ctx.products, ctx.product_dtype = products, dtype
        hidden = F.relu(first).square_() if up is None else F.silu(first).mul_(up)
        if p is not None:
            hidden.mul_(p[:, None])
        return products.forward(hidden, w2.to(dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient (n, D) of the result -> those of x, the weights and p."""
        (p, up, w3, *rest), wide = ctx.saved_tensors, ctx.product_dtype
        x, first, w1, w2 = (t.to(wide) for t in rest)
        up = None if up is None else up.to(wide)
        products, grad, dtype = ctx.products, grads[0].to(wide).contiguous(), grads[0].dtype
        opened = F.relu(first) if up is None else F.silu(first)
        hidden = opened.square() if up is None else opened * up
        grad_p, grad_w3 = None, None
        if p is None:
            grad_w2 = products.to_weight(grad, hidden)
            del hidden
            grad_hidden = products.to_rows(grad, w2)
        else:
            grad_hidden = products.to_rows(grad, w2)
            grad_p = (grad_hidden * hidden).sum(-1, dtype=p.dtype)
            grad_w2 = products.to_weight(grad, hidden.mul_(p[:, None]))
            grad_hidden.mul_(p[:, None])
        if up is None:
            grad_first = grad_hidden.mul_(opened).mul_(2)
            grad_x = products.to_rows(grad_first, w1)
        else:
            grad_up = opened.mul_(grad_hidden)
            grad_first = torch.ops.aten.silu_backward(grad_hidden.mul_(up), first)
            grad_x = products.to_rows(grad_first, w1) + products.to_rows(grad_up, w3.to(wide))
            grad_w3 = products.to_weight(grad_up, x).to(dtype)
        grad_w1 = products.to_weight(grad_first, x).to(dtype)
        return grad_x.to(dtype), grad_w1, grad_w3, grad_w2.to(dtype), grad_p, None, None


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products of x are computed."""
    return torch.float32 if upcasts(x) else x.dtype


def _dense_products(layer: Linear, x: Tensor) -> tuple[Products, torch.dtype]:
    """How x is multiplied by the weights of a feed-forward layer that `layer` is part of."""
    return (FP8, x.dtype) if layer.fp8 else (DENSE, product_dtype(x))


class SwiGLU(nn.Module):
    """Gated feed-forward layer: down(silu(gate(x)) * up(x)) (Shazeer 2020, eq. 6)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        if few_rows(x) or not all(isinstance(layer, Linear) for layer in layers):  # see pretrain/lora.py
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        gate, up, down = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
        rows = x.reshape(-1, x.shape[-1])
        return FeedForward.apply(rows, gate, up, down, None, *_dense_products(self.up_proj, x)).view_as(x)


class UngatedFeedForward(nn.Module):
    """Feed-forward layer without a gate, down(act(up(x))).

    Args:
        act: relu2, relu(x)^2, or gelu by its tanh approximation (Hendrycks & Gimpel 2016), as GPT-2 has it.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, act: str, bias: bool) -> None:
        super().__init__()
        self.gelu = act == "gelu"
        self.up_proj = Linear(hidden_size, intermediate_size, bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias)

    def forward(self, x: Tensor) -> Tensor:
        fused = not self.gelu and isinstance(self.up_proj, Linear) and self.up_proj.bias is None
        if few_rows(x) or not fused:  # adapted, see pretrain/lora.py, or as in GPT-2
            up = self.up_proj(x)
            return self.down_proj(F.gelu(up, approximate="tanh") if self.gelu else F.relu(up).square())
        up, down, rows = self.up_proj.weight, self.down_proj.weight, x.reshape(-1, x.shape[-1])
        return FeedForward.apply(rows, up, None, down, None, *_dense_products(self.up_proj, x)).view_as(x)


def feed_forward(config: ModelConfig, width: int) -> SwiGLU | UngatedFeedForward:
    """A dense feed-forward layer of a config, or shared experts: `width` wide."""
    if config.hidden_act == "silu":
        return SwiGLU(config.hidden_size, width)
    return UngatedFeedForward(config.hidden_size, width, config.hidden_act, config.use_bias)


def maybe_compiled(part: Callable[..., Any], compiled: bool, *inputs: Any) -> Any:
    """part(*inputs); in training through torch.compile if `compiled`.

    All modules of a class share what is compiled. Decoding stays eager, because its lengths grow.

    Args:
        part: a module, or a method of one.
    """
    method: Any = part.forward if isinstance(part, nn.Module) else part
    module, function = method.__self__, getattr(type(method.__self__), method.__name__)
    return _compiled(function)(module, *inputs) if compiled and module.training else part(*inputs)


@functools.cache
def _compiled(function: Any) -> Any:
    return torch.compile(function)
