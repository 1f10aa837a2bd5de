"""Every backend computes the same numbers, hides the same tokens, and is refused where it cannot run."""

import logging
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import ModelConfig, ZeroModel
from model.backends.attention import attend
from model.backends.blockwise import blockwise_mask
from model.backends.experts import expert_products
from model.config.execution import (
    ATTENTION_BACKENDS,
    DOCUMENT_BACKENDS,
    EXPERT_BACKENDS,
    ExecutionConfig,
    expert_backend,
)
from model.context import AttentionContext, segments, visible_keys

from .conftest import SMALL

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
TOLERANCE = {"rtol": 0, "atol": 2e-5}
STARTS = torch.tensor([[0, 5, 6, 17], [0, 17, 17, 17], [0, 1, 16, 17]], dtype=torch.int32)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
ON_GPU = [pytest.param(name, marks=[pytest.mark.gpu, GPU]) for name in DOCUMENT_BACKENDS]
# What only the package behind a backend has (`make setup-gpu`); varlen is torch's own.
MODULES = {"flash_attn": "flash_attn.flash_attn_interface", "flash_attn_4": "flash_attn.cute"}
ATTENTION = ["sdpa", "blockwise", "flex", *ON_GPU]
# Sizes that the GPU kernels take: half precision, widths that are multiples of 16 bytes.
GPU_SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "head_dim": 32,
    "moe_intermediate_size": 32,
}


def make(build, attention: str, variant: str = "deepseek", **overrides) -> tuple[ZeroModel, torch.device]:
    """A model that the backend can run, on the backend's device."""
    if attention in DOCUMENT_BACKENDS:
        if attention in MODULES:
            pytest.importorskip(MODULES[attention])
        model = build(variant, execution={"attention": attention}, **{**GPU_SIZES, **overrides})
        return model.to("cuda", torch.bfloat16), torch.device("cuda")
    return build(variant, execution={"attention": attention}, **overrides), torch.device("cpu")


@pytest.mark.parametrize("attention", ["blockwise", "flex", *ON_GPU])
@pytest.mark.parametrize("variant", ["deepseek", "wide_values", "grouped_query", "normed", "loop"])
@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_attention_backends_agree_with_sdpa(build, tokens, attention, variant, packed):
    model, device = make(build, attention, variant)
    plain, _ = make(build, "sdpa", variant, **(GPU_SIZES if device.type == "cuda" else {}))
    plain = plain.to(device, model.lm_head.weight.dtype)
    starts = STARTS.to(device) if packed else None
    found = model(tokens.to(device), cu_seqlens=starts).logits.float()
    expected = plain(tokens.to(device), cu_seqlens=starts).logits.float()
    limit = 2e-5 if device.type == "cpu" else 0.05 * expected.abs().max().item()
    assert (found - expected).abs().max() < limit


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("place", [0, 1, 9, 16])
@torch.no_grad()
def test_no_backend_looks_ahead_or_into_other_documents(build, tokens, attention, place):
    model, device = make(build, attention)
    starts, tokens = STARTS.to(device), tokens.to(device)
    changed = tokens.clone()
    changed[:, place] = changed[:, place] % 60 + 1
    for cu_seqlens in (None, starts):
        before = model(tokens, cu_seqlens=cu_seqlens).logits.float()
        difference = (model(changed, cu_seqlens=cu_seqlens).logits.float() - before).abs().amax(-1)
        for row, row_starts in enumerate(STARTS.tolist() if cu_seqlens is not None else [[0, 17]] * 3):
            end = next(s for s in row_starts if s > place)
            assert difference[row, place] > 1e-3
            hidden = torch.cat((difference[row, :place], difference[row, end:]))
            assert hidden.numel() == 0 or hidden.max() < 2e-5


@pytest.mark.parametrize("attention", ["sdpa", "blockwise", "flex"])
@torch.no_grad()
def test_padding_and_cached_decoding_work_under_every_backend_of_a_cpu(build, tokens, attention):
    model, _ = make(build, attention)
    plain, _ = make(build, "auto")
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    found = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(found, plain(tokens, attention_mask=mask).logits, **TOLERANCE)
    assert torch.equal(model.generate(tokens, 8), plain.generate(tokens, 8))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    rows=st.integers(1, 3),
    padded=st.floats(0, 0.9),
    queries=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_blockwise_attention_equals_sdpa_in_value_and_gradient(lengths, rows, padded, queries, seed):
    """Arbitrary documents, padding and block boundaries."""
    T, generator = sum(lengths), torch.Generator().manual_seed(seed)
    starts = torch.tensor([0, *lengths]).cumsum(0).expand(rows, -1).contiguous()
    real = torch.rand(rows, T, generator=generator) >= padded
    segment = segments(real, starts)
    mask = visible_keys(segment, T)
    shapes = ((rows, T, 4, 6), (rows, T, 2, 6), (rows, T, 2, 5))
    inputs = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    upstream = torch.randn(rows, T, 4, 5, generator=generator)
    results = []
    for backend in ("sdpa", "blockwise"):
        with patch("model.backends.blockwise.QUERIES", queries):
            context = AttentionContext(backend=backend, mask=mask, blockwise_mask=blockwise_mask(mask))
            out = attend(*inputs, context, 0.4)
            results.append((out, *torch.autograd.grad(out, inputs, upstream)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def expert_model(experts: str, **overrides) -> ZeroModel:
    sizes = {**SMALL, "moe_intermediate_size": 12, **overrides}
    return ZeroModel(ModelConfig.from_dict(sizes), execution=ExecutionConfig(experts=experts))


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.sampled_from([0, 0, 1, 5, 16, 17, 90]), min_size=1, max_size=7))
def test_products_of_padded_blocks_equal_the_loop(counts):
    """Experts without rows, with as many as fill blocks, with all; ranks that receive no row."""
    generator = torch.Generator().manual_seed(0)
    n, sizes = sum(counts), torch.tensor(counts)
    rows, grad, weight = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((n, 3), (n, 2), (len(counts), 2, 3))
    )
    expected, found = expert_products("loop", sizes), expert_products("padded", sizes)
    torch.testing.assert_close(found.forward(rows, weight), expected.forward(rows, weight))
    torch.testing.assert_close(found.to_rows(grad, weight), expected.to_rows(grad, weight))
    torch.testing.assert_close(found.to_weight(grad, rows), expected.to_weight(grad, rows))


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "chosen"),
    [
        ("cuda", (9, 0), torch.bfloat16, "grouped_mm"),
        ("cuda", (10, 0), torch.bfloat16, "padded"),
        ("cuda", (9, 0), torch.float32, "padded"),
        ("cuda", (8, 0), torch.bfloat16, "padded"),
        ("cuda", (12, 0), torch.bfloat16, "padded"),
        ("cpu", None, torch.bfloat16, "grouped_mm"),
    ],
)
def test_auto_takes_grouped_mm_where_torch_has_a_kernel(monkeypatch, device, capability, dtype, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    expert_backend.cache_clear()
    assert expert_backend("auto", device, dtype, (32, 64)) == chosen
    expert_backend.cache_clear()


@pytest.mark.parametrize("hidden_act", ["silu", "relu2"])
@pytest.mark.parametrize("starve", [False, True])
@pytest.mark.parametrize("backend", ["grouped_mm", "padded"])
def test_backends_of_experts_equal_the_loop_in_value_and_gradient(tokens, starve, hidden_act, backend):
    results = []
    for experts in ("loop", backend):
        model = expert_model(experts, hidden_act=hidden_act)
        if starve:  # all tokens go to the first two experts
            for layer in model.moe_layers():
                layer.gate.e_score_correction_bias.copy_(torch.tensor([9.0, 9, -9, -9]))
        output = model(tokens, targets=tokens)
        output.loss.backward()
        results.append((output.loss, {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert gradient is not None
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_auto_takes_the_loop_for_sizes_that_grouped_mm_cannot(tokens, caplog):
    expert_backend.cache_clear()
    with caplog.at_level(logging.INFO, logger="zeromodel"):
        expert_model("auto", moe_intermediate_size=9)(tokens, targets=tokens).loss.backward()
        expert_model("auto")(tokens)
    assert [r.getMessage() for r in caplog.records if "expert" in r.getMessage()] == [
        "expert backend on cpu in torch.float32: loop",
        "expert backend on cpu in torch.float32: grouped_mm",
    ]
    with pytest.raises(ValueError, match="24 and 9 numbers of torch.float32; choose other widths"):
        expert_model("grouped_mm", moe_intermediate_size=9)(tokens)


@pytest.mark.parametrize("name", ["varlen", "flash_attn"])
def test_a_named_attention_backend_that_cannot_run_is_refused(build, tokens, name):
    with pytest.raises(ValueError, match=f"attention={name} needs a GPU and half precision"):
        build(execution={"attention": name})(tokens)


def test_flex_on_a_cpu_is_refused_where_gradients_are_wanted(build, tokens):
    with pytest.raises(ValueError, match="attention=flex has no gradients on a CPU"):
        build(execution={"attention": "flex"})(tokens, targets=tokens)


def test_megablocks_without_a_gpu_is_refused(tokens):
    with pytest.raises(ValueError, match="experts=megablocks needs a GPU and half precision"):
        expert_model("megablocks")(tokens)


@pytest.mark.parametrize(
    ("field", "names"), [("attention", ATTENTION_BACKENDS), ("experts", EXPERT_BACKENDS)]
)
def test_unknown_names_are_refused_with_the_known_ones(field, names):
    with pytest.raises(ValueError, match=f"{field}='cuda' is unknown; choose one of {', '.join(names)}"):
        ExecutionConfig(**{field: "cuda"})


def test_bf16_stays_close_to_fp32(build, variant, tokens):
    """Including CPUs without bf16 instructions, where products run in fp32 and are rounded."""
    model = build(variant)
    with torch.no_grad():
        expected = model(tokens).logits
    half = model.to(torch.bfloat16)
    for layer in half.moe_layers():  # as in training
        layer.gate.e_score_correction_bias = layer.gate.e_score_correction_bias.float()
    out = half(tokens, targets=tokens)
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in half.parameters())
    found = half(tokens).logits.float()
    # Where rounding flips a choice of experts, a few tokens change a lot; most must stay close.
    relative = (found - expected).abs().amax(-1) / expected.abs().max()
    assert relative.median() < 0.05
