"""execution.compile: no graph break in a layer, and the numbers of eager execution."""

import functools

import pytest
import torch

from model import ModelConfig, ZeroModel
from model.config.execution import ExecutionConfig

from .conftest import SMALL

STARTS = torch.tensor([[0, 5, 6, 17], [0, 17, 17, 17], [0, 1, 16, 17]], dtype=torch.int32)
SIZES = {**SMALL, "num_hidden_layers": 2, "moe_intermediate_size": 16, "qk_norm": True}
LOOP = {"placement": "block", "ranges": [[1, 1]], "num_steps": 3, "sandwich_norm": True}


@pytest.fixture(autouse=True)
def fresh():
    """Nothing compiled for other sizes counts against the limit of recompilations."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def traced(function):
    """Stands for torch.compile: any graph break is an error, and the graph runs operator by operator."""
    return torch.compile(function, backend="aot_eager", fullgraph=True)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("experts", [pytest.param("grouped_mm", marks=pytest.mark.slow), "padded"])
def test_a_loop_step_over_a_decoder_layer_is_one_graph(monkeypatch, tokens, experts):
    """MLA, norms, router, expert products, combination, statistics; the loop's injection and update."""
    dtype = torch.bfloat16 if experts == "grouped_mm" else torch.float32
    # Dynamo knows grouped products in bf16 only, as on a GPU.
    monkeypatch.setattr("model.layers._cpu_multiplies_bf16", lambda: True)
    config = ModelConfig.from_dict({**SIZES, "recurrence": LOOP})
    model = ZeroModel(config, execution=ExecutionConfig(experts=experts)).train().to(dtype)
    context = model.attention_context(tokens, cu_seqlens=STARTS)
    context.statistics, context.num_steps = True, 3
    unit, core = model.model.recurrence[0], model.model._core(1, 1, context)
    x = torch.randn(3, 17, 24, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    results = []
    for step in (unit._step, torch.compile(unit._step, backend="eager", fullgraph=True)):
        state, out = step(0, x, x, core, context, None, {})
        aux, loads, _ = out.extra
        (state.float().square().sum() + aux.sum()).backward()
        results.append((state.detach(), aux.detach(), *loads.values(), x.grad))
        x.grad = None
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "policy"),
    [*(("traced", p) for p in ("none", "block", "selective", "iteration")), ("torch", "block")],
)
def test_compiled_parts_equal_eager_ones_also_under_recomputation(monkeypatch, tokens, policy, compiler):
    """Loss and gradients to 1e-5, the load to the token, though the router is compiled and recomputed."""
    if compiler == "traced":
        monkeypatch.setattr("model.layers._compiled", functools.cache(traced))
    config = ModelConfig.from_dict({**SIZES, "recurrence": LOOP})
    results = []
    for compiled in (False, True):
        execution = ExecutionConfig(checkpointing=policy, compile=compiled)
        model = ZeroModel(config, execution=execution).train()
        loss = model(tokens, targets=tokens, cu_seqlens=STARTS).loss
        loss.backward()
        loads = [layer.load.float() for layer in model.moe_layers()]
        results.append((loss.detach(), *(p.grad for p in model.parameters()), *loads))
    for eager, found in zip(*results, strict=True):
        torch.testing.assert_close(found, eager, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # recomputation left nothing eager
