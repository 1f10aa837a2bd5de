"""Products in FP8: rounding and sums against plain loops, what kernels are given, and training with them."""

import itertools
import warnings
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from model import ModelConfig, ZeroModel
from model import fp8 as module
from model.config.execution import ExecutionConfig, require_fp8
from model.fp8 import (
    GroupedFp8,
    Scaled,
    blocks,
    fp8_forward,
    fp8_linear,
    fp8_to_rows,
    fp8_to_weight,
    tiles,
)
from model.layers import Linear
from model.losses import IGNORE_INDEX

from .conftest import SMALL


def e4m3_values() -> list[float]:
    """What E4M3 can hold, ascending: 1 sign, 4 exponent (bias 7) and 3 mantissa bits; all ones is NaN."""
    positive = [
        mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        for exponent in range(16)
        for mantissa in range(8)
        if (exponent, mantissa) != (15, 7)
    ]
    return [-value for value in reversed(positive[1:])] + positive


VALUES = e4m3_values()


def nearest_e4m3(x: float) -> float:
    """The nearest value; of two, the one whose mantissa is even."""
    after = min(bisect_left(VALUES, x), len(VALUES) - 1)
    below, above = VALUES[max(after - 1, 0)], VALUES[after]
    if x - below == above - x:
        return below if (after - 1 - VALUES.index(0.0)) % 2 == 0 else above
    return below if x - below < above - x else above


def rounded(x: Tensor, rows: int) -> Tensor:
    """x (R, L) after rounding by parts of `rows` x 128, number by number: fp64 (R, L), its scale included."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for r, c in itertools.product(range(0, x.shape[0], rows), range(0, x.shape[1], 128)):
        part = x[r : r + rows, c : c + 128].float()
        scale = torch.maximum(part.abs().max() / 448, torch.tensor(2.0**-126))
        nearest = [[nearest_e4m3(number) for number in row] for row in (part / scale).tolist()]
        out[r : r + rows, c : c + 128] = torch.tensor(nearest, dtype=torch.float64) * scale.double()
    return out


def dequantised(x: Scaled, rows: int, columns: int) -> Tensor:
    scales = x.scales.repeat_interleave(128, 1)
    if x.in_blocks:
        scales = scales.repeat_interleave(128, 0)
    whole = x.values.double() * scales.double()
    assert not whole[rows:].any()
    assert not whole[:, columns:].any()
    return whole[:rows, :columns]


def numbers(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Normal numbers over many magnitudes, with zeros, ties and extremes among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-4, 3, shape, generator=generator)
    return x.masked_fill(torch.rand(shape, generator=generator) < 0.1, 0.0)


@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (16, 128), (130, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_is_rounded_to_the_nearest_of_its_tile_or_block(shape, dtype):
    x = numbers(shape).to(dtype)
    assert torch.equal(dequantised(tiles(x), *shape), rounded(x, 1))
    assert torch.equal(dequantised(blocks(x), *shape), rounded(x, 128))
    turned = blocks(x).transposed()
    assert torch.equal(dequantised(turned, *reversed(shape)), rounded(x, 128).T)
    assert tiles(x.T).values.is_contiguous()
    assert turned.values.is_contiguous()


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-42, 1e-38, 3e38, -3e38])
def test_extreme_magnitudes_stay_finite(value):
    x = torch.zeros(2, 128)
    x[0, :3] = torch.tensor([value, value / 2, 0.0])
    found = dequantised(tiles(x), 2, 128)
    assert torch.equal(found, rounded(x, 1))
    assert found.isfinite().all()
    if abs(value) > 2.0**-126 * 448:
        assert found[0, 0] == pytest.approx(value, rel=1e-6)  # the largest of a tile keeps its value


def test_ties_go_to_the_even_mantissa():
    x = torch.zeros(1, 128)
    x[0, :6] = torch.tensor([448.0, 17.0, 19.0, -17.0, 2.0**-10, 3 * 2.0**-10])
    expected = torch.tensor([448.0, 16.0, 20.0, -16.0, 0.0, 2.0**-8], dtype=torch.float64)
    assert torch.equal(dequantised(tiles(x), 1, 128)[0, :6], expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_makes_its_own_row_nan(value):
    x = torch.ones(3, 200)
    x[1, 150] = value
    out = fp8_forward(x, torch.ones(5, 200))
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


def plain_products(rows: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """The three products of one linear layer on rounded operands, in fp64."""
    w = rounded(weight, 128)
    to_weight = rounded(grad.T, 1) @ rounded(rows.T, 1).T
    return [rounded(rows, 1) @ w.T, rounded(grad, 1) @ w, to_weight]


@pytest.mark.parametrize("sizes", [(0, 7, 3), (1, 1, 1), (4, 129, 17), (130, 3, 2), (3, 5, 130)])
def test_the_three_products_equal_plain_ones_of_rounded_operands(sizes):
    n, inner, outer = sizes
    rows, weight, grad = (numbers(s) for s in ((n, inner), (outer, inner), (n, outer)))
    leaves = rows.clone().requires_grad_(), weight.clone().requires_grad_()
    out = fp8_linear(leaves[0], leaves[1])
    found = [out, *torch.autograd.grad(out, leaves, grad)]
    for ours, expected in zip(found, plain_products(rows, weight, grad), strict=True):
        assert ours.shape == expected.shape
        # fp32 adds at most two sums of 128 here; what cancels is compared with the largest number.
        torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-6 * (1 + _size(expected)))


def _size(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


@settings(max_examples=10, deadline=None)
@given(
    counts=st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 128, 130]), min_size=1, max_size=5),
    inner=st.sampled_from([1, 40, 130]),
    seed=st.integers(0, 99),
)
def test_an_expert_computes_what_it_would_alone(counts, inner, seed):
    """Bit for bit, whatever rows the other experts have."""
    n, outer = sum(counts), 24
    rows, grad = numbers((n, inner), seed), numbers((n, outer), seed + 1)
    weight = numbers((len(counts) * outer, inner), seed + 2).view(len(counts), outer, inner)
    grouped = GroupedFp8(torch.tensor(counts))
    alone = list(zip(rows.split(counts), grad.split(counts), weight, strict=True))
    assert torch.equal(grouped.forward(rows, weight), torch.cat([fp8_forward(r, w) for r, _, w in alone]))
    assert torch.equal(grouped.to_rows(grad, weight), torch.cat([fp8_to_rows(g, w) for _, g, w in alone]))
    found = grouped.to_weight(grad, rows)
    assert torch.equal(found, torch.stack([fp8_to_weight(g, r) for r, g, _ in alone]))
    assert all(not w.any() for w, size in zip(found, counts, strict=True) if not size)


def test_a_token_alone_has_the_bits_it_has_in_a_batch():
    x, weight = numbers((40, 300)), numbers((70, 300), 1)
    whole = fp8_forward(x, weight)
    assert all(torch.equal(fp8_forward(x[i : i + 1], weight)[0], whole[i]) for i in range(40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_three_products_deviate_by_4_percent(dtype):
    """3 mantissa bits round by 2^-4 at most and 2.6% in the mean square; a product has two such operands."""
    generator = torch.Generator().manual_seed(0)
    x, w, g = (torch.randn(s, generator=generator).to(dtype) for s in ((256, 384), (200, 384), (256, 200)))
    pairs = (
        (fp8_forward(x, w), x.double() @ w.double().T),
        (fp8_to_rows(g, w), g.double() @ w.double()),
        (fp8_to_weight(g, x), g.double().T @ x.double()),
    )
    for found, expected in pairs:
        assert found.dtype == dtype
        assert 0.03 < (found.double() - expected).norm() / expected.norm() < 0.04


def kernel(
    a: Tensor,
    b: Tensor,
    scale_a: list[Tensor],
    recipe_a: list[int],
    swizzle_a: list[int],
    scale_b: list[Tensor],
    recipe_b: list[int],
    swizzle_b: list[int],
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *rest: Any,
) -> Tensor:
    """The product that torch documents, after torch's own checks of what a GPU is given.

    Besides them those of the kernel (ScaledBlas.cpp) and cuBLAS's of alignment.
    """
    with FakeTensorMode(allow_non_fake_inputs=False):
        on_gpu = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
            for x in (a, b, *scale_a, *scale_b)
        ]
        scales = [on_gpu[2]], recipe_a, swizzle_a, [on_gpu[3]], recipe_b, swizzle_b
        out = torch._scaled_mm_v2(*on_gpu[:2], *scales, bias, out_dtype)
        assert (out.shape, out.dtype) == ((len(a), b.shape[1]), out_dtype)
    (M, K), N = a.shape, b.shape[1]
    assert (M % 16, N % 16, K % 128, a.stride(0) % 16, b.stride(1) % 16) == (0, 0, 0, 0, 0)
    assert all(x.data_ptr() % 16 == 0 for x in (a, b, *scale_a, *scale_b))
    assert recipe_a == [F.ScalingType.BlockWise1x128.value]
    assert scale_a[0].stride() == (1, M)
    scales_b = scale_b[0]
    if recipe_b == [F.ScalingType.BlockWise128x128.value]:
        assert (len(scales_b) % 4, scales_b.stride()) == (0, (1, len(scales_b)))
        scales_b = scales_b.T[:, : K // 128]
    else:
        assert scales_b.stride() == (1, N)
    return EMULATED(Scaled(a, scale_a[0]), Scaled(b.T, scales_b), out_dtype)


EMULATED = module.emulated


@contextmanager
def as_on_a_gpu() -> Iterator[list[tuple[int, ...]]]:
    """Products go the way they go on a GPU, up to the kernel; their sizes (M, K, N)."""
    calls = list[tuple[int, ...]]()

    def counted(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
        calls.append((*a.shape, b.shape[1]))
        return kernel(a, b, *rest)

    with (
        torch.library._scoped_library("aten", "IMPL") as library,
        patch.object(module, "emulated", module.on_device),
        warnings.catch_warnings(action="ignore"),  # that it replaces a kernel
    ):
        library.impl("_scaled_mm_v2", counted, "CPU")
        yield calls


@pytest.mark.parametrize("sizes", [(5, 130, 40), (16, 128, 128), (130, 512, 640), (1, 1, 1), (0, 8, 8)])
def test_a_gpu_is_asked_for_what_it_takes_and_computes_the_same_bits(sizes):
    n, inner, outer = sizes
    x, w, g = (numbers(s) for s in ((n, inner), (outer, inner), (n, outer)))
    expected = fp8_forward(x, w), fp8_to_rows(g, w), fp8_to_weight(g, x)
    with as_on_a_gpu() as calls:
        found = fp8_forward(x, w), fp8_to_rows(g, w), fp8_to_weight(g, x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(calls) == (3 if n else 0)


HOPPER = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="no H100 or H200"
)


@pytest.mark.gpu
@HOPPER
@pytest.mark.parametrize("sizes", [(5, 130, 40), (130, 512, 640), (1000, 2048, 1408), (1, 1, 1)])
def test_a_gpu_computes_what_the_cpu_emulates(sizes):
    """Operands to the bit; products up to the digits that Hopper drops, and bf16's rounding."""
    n, inner, outer = sizes
    x, w, g = (numbers(s).bfloat16() for s in ((n, inner), (outer, inner), (n, outer)))
    for scaled in (tiles, blocks):
        for ours, expected in zip(scaled(x.cuda()), scaled(x), strict=True):
            assert torch.equal(ours.cpu().float(), expected.float())
    counts = torch.tensor([n // 3, 0, n - n // 3])
    stacked = w.expand(3, -1, -1).contiguous()
    grouped = [GroupedFp8(counts.to(name)) for name in ("cuda", "cpu")]
    pairs = [
        (product(a.cuda(), b.cuda()), product(a, b))
        for product, a, b in ((fp8_forward, x, w), (fp8_to_rows, g, w), (fp8_to_weight, g, x))
    ]
    pairs.append((grouped[0].forward(x.cuda(), stacked.cuda()), grouped[1].forward(x, stacked)))
    pairs.append((grouped[0].to_weight(g.cuda(), x.cuda()), grouped[1].to_weight(g, x)))
    for ours, expected in pairs:
        apart = (ours.cpu().double() - expected.double()).norm()
        assert apart <= 4e-3 * expected.double().norm()


# Every expert sees every token, so that rounding changes no choice.
ALL_CHOSEN = {"n_routed_experts": 3, "num_experts_per_tok": 3}


def fp8_model(precision: str, checkpointing: str = "none", **config: Any) -> ZeroModel:
    sizes = ModelConfig.from_dict({**SMALL, "initializer_range": 0.05, **ALL_CHOSEN, **config})
    execution = ExecutionConfig(precision=precision, checkpointing=checkpointing)
    return ZeroModel(sizes, seed=3, execution=execution).train()


def gradients(model: ZeroModel, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(tokens, targets=tokens).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def deviation(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative, over all gradients together."""
    assert found.keys() == expected.keys()
    apart = sum((found[name].double() - value).square().sum().item() for name, value in expected.items())
    return (apart / sum(value.double().square().sum().item() for value in expected.values())) ** 0.5


def test_a_whole_model_takes_the_same_way_on_a_gpu(tokens):
    model = fp8_model("fp8", **MTP)
    expected = gradients(model, tokens[:1])
    with as_on_a_gpu() as calls:
        found = gradients(model, tokens[:1])
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert len(calls) > 100


MTP = {"num_nextn_predict_layers": 1}
LOOP = {"recurrence": {"placement": "block", "ranges": [[1, 1]], "num_steps": 2}}
KINDS: dict[str, dict[str, Any]] = {
    "deepseek": {"q_lora_rank": 12},
    "squared ReLU": {"hidden_act": "relu2", "use_mla": False},
    "GPT-2": {"use_mla": False, "use_moe": False, "hidden_act": "gelu", "use_bias": True},
    "loop and MTP": LOOP | MTP,
    "refined latents": {"recurrence": {"placement": "kv", "num_steps": 2, "k_rope_source": "latent"}},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_every_kind_of_layer_follow_high_precision(tokens, kind, dtype):
    expected = gradients(fp8_model("auto", **KINDS[kind]), tokens)
    found = gradients(fp8_model("fp8", **KINDS[kind]).to(dtype), tokens)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert 0.02 < deviation(found, expected) < 0.1  # in bf16 0.01; it grows with the weights


def test_only_projections_feed_forward_layers_and_experts_multiply_in_fp8():
    halting = {"halting": {"kind": "ponder", "ponder_weight": 0.1}}
    model = fp8_model("fp8", **MTP, recurrence=LOOP["recurrence"] | halting)
    chosen, others = set[str](), set[str]()
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear):
            (chosen if part.fp8 else others).add(name.split(".")[-1])
    feed_forward = {"gate_proj", "up_proj", "down_proj"}
    assert chosen == {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"} | feed_forward
    assert others == {"gate", "token", "eh_proj"}  # of the loop, of halting, of MTP
    assert all(layer.experts.backend == "fp8" for layer in model.moe_layers())
    plain = [part for part in fp8_model("auto").modules() if isinstance(part, Linear)]
    assert not any(part.fp8 for part in plain)


@pytest.mark.parametrize("checkpointing", ["block", "selective", "iteration"])
def test_recomputation_gives_the_same_bits(tokens, checkpointing):
    config = LOOP | MTP | {"num_experts_per_tok": 1}
    expected = gradients(fp8_model("fp8", **config), tokens[:1])
    found = gradients(fp8_model("fp8", checkpointing, **config), tokens[:1])
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_selective_recomputation_keeps_what_the_gpu_multiplied(tokens):
    made = dict[str, int]()
    for policy in ("none", "block", "selective"):
        with as_on_a_gpu() as calls:
            gradients(fp8_model("fp8", policy, use_moe=False), tokens[:1])
        made[policy] = len(calls)
    assert made["selective"] == made["none"] == made["block"] * 3 / 4  # 1 of 3 products is a forward one


def test_weights_that_need_no_gradient_get_none():
    x, weight = numbers((5, 30)).requires_grad_(), numbers((7, 30))
    fp8_linear(x, weight).sum().backward()
    assert weight.grad is None
    x, weight = x.detach(), weight.requires_grad_()
    fp8_linear(x, weight).sum().backward()
    assert x.grad is None
    assert weight.grad is not None


def learn(precision: str, steps: int) -> list[float]:
    """Losses of a small looped mixture of experts in bf16 with fp32 master weights, as under DeepSpeed."""
    sizes: dict[str, Any] = {"hidden_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2}
    model = fp8_model(precision, **LOOP, **sizes, moe_intermediate_size=48)
    masters = [parameter.detach().clone() for parameter in model.parameters()]
    model.to(torch.bfloat16)
    for layer in model.moe_layers():  # as in training
        layer.gate.e_score_correction_bias = layer.gate.e_score_correction_bias.float()
    optimizer, losses = torch.optim.AdamW(masters, lr=3e-3, betas=(0.9, 0.95)), list[float]()
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        loss = model(**recall(generator)).loss
        loss.backward()
        losses.append(loss.item())
        for master, parameter in zip(masters, model.parameters(), strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, model.parameters(), strict=True):
                parameter.copy_(master)
    return losses


def recall(generator: torch.Generator) -> dict[str, Tensor]:
    """Rows of 8 random tokens, twice: the second half can be predicted, the first cannot."""
    half = torch.randint(1, 61, (16, 8), generator=generator)
    tokens = torch.cat((half, half), 1)
    targets = tokens.roll(-1, 1)
    targets[:, :7], targets[:, -1] = IGNORE_INDEX, IGNORE_INDEX
    return {"tokens": tokens, "targets": targets}


def test_the_first_steps_follow_bf16():
    fp8, bf16 = learn("fp8", 3), learn("auto", 3)
    assert fp8 != bf16
    assert max(abs(a - b) for a, b in zip(fp8, bf16, strict=True)) < 0.02


@pytest.mark.slow
def test_a_looped_mixture_of_experts_learns_as_in_bf16():
    """300 steps: means over a hundred differ by 0.002, -0.002 and 0.05, while the loss falls by 3.3."""
    fp8, bf16 = (
        [sum(losses[i : i + 100]) / 100 for i in (0, 100, 200)]
        for losses in (learn("fp8", 300), learn("auto", 300))
    )
    assert all(abs(a - b) < limit for a, b, limit in zip(fp8, bf16, (0.02, 0.05, 0.15), strict=True))
    assert fp8[2] < 1.0


def test_trained_weights_load_without_fp8(tokens):
    trained = fp8_model("fp8")
    gradients(trained, tokens)
    plain = fp8_model("auto").eval()
    plain.load_state_dict(trained.state_dict())
    with torch.no_grad():
        found, expected = plain(tokens).logits, trained.eval()(tokens).logits
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_a_misspelt_precision_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"execution\.precision='fp_8' is unknown; did you mean 'fp8'\?$"):
        ExecutionConfig(precision="fp_8")
    with pytest.raises(ValueError, match=r"'bf16' is unknown; known: auto, fp32, fp8$"):
        ExecutionConfig(precision="bf16")


def test_compilation_is_refused():
    with pytest.raises(ValueError, match="compile=true with precision=fp8 is not supported: torch 2.13"):
        ExecutionConfig(precision="fp8", compile=True)


@pytest.mark.parametrize("experts", ["loop", "grouped_mm", "megablocks"])
def test_a_named_expert_backend_is_refused(experts):
    with pytest.raises(ValueError, match=f"experts={experts} does not multiply in FP8; delete it, or prec"):
        ExecutionConfig(precision="fp8", experts=experts)


REFUSED = [
    ("mps", torch.bfloat16, (9, 0), "13.0", "runs on mps without CUDA; choose execution.precision=auto"),
    ("cuda", torch.bfloat16, (9, 0), None, "runs on cuda without CUDA"),
    ("cuda", torch.bfloat16, (10, 0), "13.0", r"runs on a GPU of compute capability 10\.0"),
    ("cuda", torch.bfloat16, (8, 9), "13.0", r"runs on a GPU of compute capability 8\.9"),
    ("cuda", torch.bfloat16, (9, 0), "12.8", r"runs with CUDA 12\.8"),
    ("cuda", torch.float32, (9, 0), "12.9", r"runs in torch.float32; set bf16.enabled=true in the DeepSpeed"),
]


@pytest.mark.parametrize(("device", "dtype", "capability", "cuda", "message"), REFUSED)
def test_devices_that_cannot_are_refused(monkeypatch, device, dtype, capability, cuda, message):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    require_fp8.cache_clear()
    with pytest.raises(ValueError, match=f"execution.precision=fp8 needs .*{message}"):
        require_fp8(device, dtype)


def test_hopper_and_cpus_are_not_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    require_fp8.cache_clear()
    require_fp8("cuda", torch.bfloat16)
    require_fp8("cpu", torch.float32)
