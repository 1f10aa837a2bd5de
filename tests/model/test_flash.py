"""Flash kernels get what they must get: the model's numbers with plain kernels in their place are sdpa's."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import current_flash_attention_impl, restore_flash_attention_impl
from torch.nn.attention.varlen import varlen_attn

from data_pipeline.loading.loader import Batch
from model import ModelConfig, ZeroModel
from model.backends.attention import sdpa
from model.backends.flash import Documents, flash_attn_4_widths, row_documents
from model.config.execution import DOCUMENT_BACKENDS, ExecutionConfig, attention_backend

from ..fake_gpu import device, fake_gpu, on_gpu
from .conftest import SMALL
from .flash_kernels import Kernels, install

STARTS = torch.tensor([[0, 5, 6, 17], [0, 17, 17, 17], [0, 1, 16, 17]], dtype=torch.int32)
BOUNDARIES = [0, 5, 6, 17, 34, 35, 50, 51]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    """The plain kernels, and every backend of a GPU let through on the CPU."""
    monkeypatch.setattr("model.context.attention_backend", lambda name, *_: name)
    kernels, undo = install(monkeypatch)
    yield kernels
    if current_flash_attention_impl() is not None:
        restore_flash_attention_impl()
    undo()


def told(boundaries: list[int]) -> Documents:
    ends = torch.tensor(boundaries, dtype=torch.int32)
    return Documents(ends, int(ends.diff().max()))


@pytest.mark.parametrize(
    ("backend", "variant"),
    [
        *(("varlen", variant) for variant in ("wide_values", "grouped_query", "normed", "loop", "pause")),
        ("flash_attn", "deepseek"),
        ("flash_attn_4", "deepseek"),
    ],
)
def test_numbers_and_gradients_are_those_of_sdpa(build, tokens, kernels, backend, variant):
    results = []
    for name, documents in ((backend, told(BOUNDARIES)), (backend, None), ("sdpa", None)):
        model = build(variant, execution={"attention": name}).train()
        out = model(tokens, cu_seqlens=STARTS, documents=documents, targets=tokens)
        out.loss.backward()
        results.append((out.loss, *(p.grad for p in model.parameters())))
    for found in results[:2]:
        for a, b in zip(found, results[2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    expected = {"varlen": "torch", "flash_attn": "flash_attn", "flash_attn_4": "FA4"}[backend]
    assert {call.kernel for call in kernels.calls} == {expected}
    times = 3 if variant == "pause" else 1  # positions per token
    first, last = kernels.calls[0], kernels.calls[-1]
    assert first.boundaries == [times * place for place in BOUNDARIES]
    assert first.longest == 17 * times
    # Without the host's knowledge: empty documents stay, and the longest may fill its row.
    assert len(last.boundaries) == STARTS.numel() + 1
    assert last.longest == 17 * times


def test_values_wider_than_keys_are_padded_on_every_backend(build, tokens, kernels):
    """Keys of 10 numbers and values of 16; the other way round without FlashAttention-4's own width."""
    for backend in DOCUMENT_BACKENDS:
        for variant, widths in (("wide_values", (16, 16)), ("deepseek", (16, 8 if "4" in backend else 16))):
            kernels.calls.clear()
            build(variant, execution={"attention": backend})(tokens, cu_seqlens=STARTS)
            assert {call.widths for call in kernels.calls} == {widths}


def test_sdpa_on_another_device_pads_to_equal_widths_where_there_is_no_mask():
    """So that torch can take its flash kernel, which takes no unequal ones."""
    shapes: list[tuple[int, ...]] = []

    def recorded(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
        shapes.append((query.shape[-1], key.shape[-1], value.shape[-1]))
        return torch.empty_like(value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
        for widths in ((192, 128), (24, 32), (64, 64)):
            q, v = (torch.empty(2, 9, 4, w, device="meta", dtype=torch.bfloat16) for w in widths)
            assert sdpa(q, q, v, None, True, 0.1).shape == (2, 9, 4, widths[1])
            assert shapes[-1] == (max(widths),) * 3


@pytest.mark.parametrize("K", [1, 24, 100, 128, 192, 193])
@pytest.mark.parametrize("V", [1, 24, 128, 129, 200])
def test_widths_for_flash_attention_4_are_ones_that_it_takes(K, V):
    """_validate_head_dims of flash-attn-4 4.0.0b36, for 16-bit numbers."""
    k, v = flash_attn_4_widths(K, V, 9)
    assert k >= K
    assert v >= V
    assert k % 8 == v % 8 == 0
    assert 8 <= v <= k <= 256
    k, v = flash_attn_4_widths(K, V, 10)
    assert k >= K
    assert v >= V
    assert k % 8 == v % 8 == 0
    assert max(k, v) <= 128 or (k, v) in ((192, 128), (256, 256))


def test_one_process_changes_between_the_kernels(build, tokens, kernels):
    for backend in ("varlen", "flash_attn_4", "varlen", "sdpa"):
        build(execution={"attention": backend})(tokens, cu_seqlens=STARTS)
        assert (current_flash_attention_impl() == "FA4") == (backend == "flash_attn_4")
    assert [c.kernel for c in kernels.calls[::3]] == ["torch", "FA4", "torch"]


def test_auto_takes_varlen_for_packed_rows_in_16_bits_on_a_gpu():
    deepseek = (192, 128)
    assert attention_backend("auto", "cuda", torch.bfloat16, True, deepseek) == "varlen"
    assert attention_backend("auto", "cuda", torch.float16, True, (24, 32)) == "varlen"
    for dtype, packed, widths in (
        (torch.bfloat16, False, deepseek),
        (torch.float32, True, deepseek),
        (torch.bfloat16, True, (264, 128)),
    ):
        assert attention_backend("auto", "cuda", dtype, packed, widths) == "sdpa"
    assert attention_backend("auto", "cpu", torch.bfloat16, True, deepseek) == "blockwise"


def test_a_named_backend_that_cannot_run_is_refused_in_one_line(monkeypatch):
    def refused(name: str, widths: tuple[int, int] = (192, 128)) -> str:
        with pytest.raises(ValueError, match="execution.attention") as error:
            attention_backend(name, "cuda", torch.bfloat16, True, widths)
        assert "\n" not in str(error.value)
        return str(error.value)

    for name in DOCUMENT_BACKENDS:
        assert refused(name, (264, 128)).startswith(f"execution.attention={name} takes heads of at most 256")
    for name, package in (("flash_attn", "flash-attn"), ("flash_attn_4", "flash-attn-4")):
        assert f"needs the package {package}, which is not installed; run `make setup-gpu`" in refused(name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert "compute capability 9 and 10, but this one has 8" in refused("flash_attn_4")


def test_a_batch_knows_its_documents_without_the_empty_ones():
    T = 17
    cu = np.array([[0, 5, 6, T, T], [0, T, T, T, T], [0, 1, 16, T, T], [0, 3, T, T, T]], dtype=np.int32)
    tokens = np.zeros((4, T), dtype=np.int32)
    batch = Batch(tokens, tokens, cu, np.full(4, T, dtype=np.int32), [], [])
    boundaries, longest = batch.documents(slice(0, 3))
    assert boundaries.tolist() == BOUNDARIES
    assert boundaries.dtype == np.int32
    assert longest == 17
    boundaries, longest = batch.documents(slice(2, 4))
    assert boundaries.tolist() == [0, 1, 16, 17, 20, 34]
    assert longest == 15
    # Documents that the host knows nothing of are the same ones, and empty ones.
    everything = row_documents(4, T, torch.from_numpy(cu), torch.device("cpu"))
    assert everything.boundaries.unique().tolist() == batch.documents(slice(0, 4))[0].tolist()


def test_torchs_operators_take_what_a_layer_gives_them(monkeypatch):
    """Forward and backward in bf16 at DeepSeek's widths, on tensors without numbers: torch's own check of
    operators, shapes and strides; no row is copied on the way, except to pad the values.
    """
    monkeypatch.setattr("model.context.attention_backend", lambda name, *_: name)
    given: list[tuple[Any, ...]] = []

    def recorded(*inputs: Any, **options: Any) -> Any:
        given.append(inputs)
        return varlen_attn(*inputs, **options)

    monkeypatch.setattr("model.backends.flash.varlen_attn", recorded)
    sizes = {**SMALL, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    with torch.device("meta"):
        model = ZeroModel(ModelConfig.from_dict(sizes), execution=ExecutionConfig(attention="varlen"))
        layer = model.to(torch.bfloat16).model.layers[0].self_attn
        tokens, x = torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 9, 24, dtype=torch.bfloat16)
        documents = Documents(torch.zeros(5, dtype=torch.int32), 7)
        starts = torch.zeros(2, 4, dtype=torch.int32)
        context = model.attention_context(tokens, cu_seqlens=starts, documents=documents)
        out = layer(x.requires_grad_(), context).out
        out.sum().backward()
    assert out.shape == x.shape
    assert out.dtype == torch.bfloat16
    assert all(p.grad is not None for p in layer.parameters())
    assert x.grad is not None
    query, key, value, of_queries, of_keys, *longest = given[0]
    assert all(y.shape == (18, 3, 192) and y.dtype == torch.bfloat16 for y in (query, key, value))
    assert all(y.is_contiguous() for y in (query, key, value))
    assert of_queries is of_keys is documents.boundaries
    assert longest == [7, 7]


@pytest.mark.parametrize("backend", ["varlen", "sdpa"])
def test_the_host_waits_for_nothing_to_tell_a_gpu_about_documents(monkeypatch, backend):
    """On a pretended GPU: the loader's documents, positions, rotation and the kernels' operators."""
    monkeypatch.setattr("model.context.attention_backend", lambda name, *_: name)
    config = ModelConfig.from_dict({**SMALL, "v_head_dim": 16, "use_moe": False, "num_pause_tokens": 1})
    with fake_gpu() as waits:
        model = on_gpu(lambda: ZeroModel(config, execution=ExecutionConfig(attention=backend))).train()
        tokens = torch.zeros(2, 9, dtype=torch.int64, device=device())
        starts, ends = (torch.zeros(shape, dtype=torch.int32, device=device()) for shape in ((2, 4), (5,)))
        out = model(tokens, cu_seqlens=starts, documents=Documents(ends, 7), targets=tokens)
        assert out.loss is not None
        out.loss.backward()
    assert not waits.found
    assert all(p.grad is not None and p.grad.device == device() for p in model.parameters())
