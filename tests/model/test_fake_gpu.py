"""On a GPU, training waits for no value: losses, gradients and figures on a pretended one (../fake_gpu.py).

EXCEPTIONS has every place where the host waits after all, and why.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from distill.methods import METHODS, with_method
from distill.student import Student
from model import ModelConfig, ZeroModel
from model.config.execution import ExecutionConfig
from model.latent_cot.thoughts import think
from model.loop_trace import loop_sums
from pretrain import expert_parallel, transfer
from pretrain.expert_parallel import expert_parallel_class

from ..distill.traces import IDS
from ..fake_gpu import Waits, device, fake_gpu, on_gpu
from .loops import COVERING, EVERY

ROWS, LENGTH, RANKS = 2, 16, 8
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "intermediate_size": 64, "moe_intermediate_size": 16, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "max_position_embeddings": 64,
}  # fmt: skip
MOE_LAYERS = 2  # the first of the three is dense
# All loss terms, predictions of further tokens, and the loss of every depth.
EVERYTHING = {
    "num_nextn_predict_layers": 2,
    "recurrence": {
        "placement": "block", "ranges": [[1, 1]], "num_steps": 2,
        "halting": {
            "kind": "ponder", "granularity": "mixed", "expectation": "loss", "stability_weight": 0.1,
            "sparsity_weight": 0.1, "information_weight": 0.1,
        },
    },
}  # fmt: skip
DISTILLED = "how many documents a batch has, and how long their parts are, is known from its tokens alone"
BASELINE = "a baseline, which reads every document by itself"
# (kind of training, place, kind of wait): the reason. Expert parallelism's is in its own test.
EXCEPTIONS = {
    ("loop", "model/backends/experts.py:_loop", "item"): "splits rows by expert on the host; never auto's",
    ("memory", "model/memory.py:_documents", "shape"): BASELINE,
    ("memory", "model/memory.py:forward", "shape"): BASELINE,
    ("memory", "model/memory.py:forward", "item"): BASELINE,
    ("memory", "model/memory.py:_open_segment", "item"): BASELINE,
    ("memory", "autograd", "shape"): BASELINE,
    ("distill", "model/latent_cot/targets.py:find_traces", "shape"): DISTILLED,
    ("distill", "model/latent_cot/targets.py:find_traces", "item"): DISTILLED,
    ("distill", "model/latent_cot/targets.py:gathered", "item"): DISTILLED,
    ("distill", "model/latent_cot/targets.py:loss_counts", "item"): DISTILLED,
    ("distill", "distill/student.py:_suffix", "item"): DISTILLED,
    ("distill", "distill/student.py:_kv", "item"): DISTILLED,
}


def on_device(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device())


def train(build: Callable[[], ZeroModel], answer: int = 1) -> Waits:
    """A packed micro-batch forward and backward in bf16, and the figures of its loops."""
    with fake_gpu(answer) as waits:
        model = on_gpu(build).train()
        tokens, starts = on_device(ROWS, LENGTH), on_device(ROWS, 3, dtype=torch.int32)
        out = model(tokens=tokens, targets=tokens, cu_seqlens=starts)
        assert out.loss is not None
        out.loss.backward()
        if out.num_iterations is not None and not model.config.num_pause_tokens:
            for real in (None, tokens == 0):
                loop_sums(out.num_iterations, out.halt_probs, out.residuals, real)
    for name, parameter in model.named_parameters():
        assert getattr(parameter.grad, "device", None) == device(), name
    return waits


def plain(sizes: dict[str, Any], **execution: Any) -> Callable[[], ZeroModel]:
    config = ModelConfig.from_dict({**SIZES, **sizes})
    return lambda: ZeroModel(config, execution=ExecutionConfig(**execution))


def exceptions(case: str) -> set[tuple[str, str]]:
    return {(place, kind) for found, place, kind in EXCEPTIONS if found == case}


def test_training_waits_for_nothing():
    waits = train(plain(EVERYTHING, checkpointing="selective"))
    assert not waits.found
    assert not waits.queued


@pytest.mark.slow
@pytest.mark.parametrize("name", COVERING)
def test_no_loop_waits(name):
    assert not train(plain({"recurrence": EVERY[name]})).found


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "block", "selective", "iteration"])
@pytest.mark.parametrize("experts", ["auto", "grouped_mm"])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"num_pause_tokens": 2},
        {"use_mla": False, "hidden_act": "relu2"},
        {"recurrence": EVERY[COVERING[0]]},
    ],
)
def test_nothing_waits_however_it_is_computed(sizes, experts, checkpointing):
    assert not train(plain(sizes, experts=experts, checkpointing=checkpointing)).found


@pytest.mark.slow
@pytest.mark.parametrize("feedback", ["jacobi", "sequential", "lotus"])
def test_latent_thoughts_wait_for_nothing(feedback):
    config = ModelConfig.from_dict({**SIZES, "latent_cot": {"num_latents": 4, "feedback": feedback}})
    with fake_gpu() as waits:
        model, question = on_gpu(lambda: ZeroModel(config)).train(), on_device(ROWS, LENGTH)
        think(model, question, torch.ones_like(question)).hidden.sum().backward()
    assert not waits.found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "sizes", "execution"),
    [
        ("loop", {}, {"experts": "loop"}),
        ("memory", {"num_memory_tokens": 2, "segment_length": 5, "use_moe": False}, {}),
    ],
)
def test_only_the_named_exceptions_wait(case, sizes, execution):
    # Every read gives LENGTH: the rows of an expert, the length of a document.
    tokens = 2 * ROWS * LENGTH // SIZES["n_routed_experts"] if case == "loop" else LENGTH
    assert set(train(plain(sizes, **execution), tokens).found) == exceptions(case)


@pytest.mark.slow
def test_of_distillation_only_the_named_exceptions_wait():
    found = set()
    for method in METHODS:
        taught = {"method": method, **IDS, **({"latent_block": 2} if method == "lotus" else {})}
        latents = {"num_latents": min(4, METHODS[method].latent_cot["num_latents"])}
        sizes = {**SIZES, "use_moe": False, "latent_cot": latents, "distillation": taught}
        config = ModelConfig.from_dict(with_method(sizes))
        found |= set(train(lambda config=config: Student(config), 8).found)
    assert found == exceptions("distill")


class Event:
    """Stands for torch.Event, which knows no pretended device; counts how often the host waited for one."""

    waited = 0

    def __init__(self, on: torch.device) -> None:
        assert on == device()

    def record(self) -> None: ...

    def synchronize(self) -> None:
        Event.waited += 1


class Exchange:
    """Stands for deepspeed.comm: nothing arrives, in order; `log` has what happened when."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def all_to_all_single(self, *tensors: Any, group: Any, async_op: bool = False) -> "Exchange":
        self.log.append("start" if async_op else "counts")
        return self

    def wait(self) -> None:
        self.log.append("wait")


@pytest.mark.parametrize("checkpointing", ["none", pytest.param("block", marks=pytest.mark.slow)])
def test_expert_parallelism_waits_once_for_a_layers_sizes(monkeypatch, checkpointing):
    """all_to_all takes its sizes from the host: one pinned copy per run of a layer, for which the host waits
    while the device sorts the rows. Nothing else waits, and shared experts run while rows travel."""
    exchange = Exchange()
    monkeypatch.setattr(expert_parallel, "dist", exchange)
    monkeypatch.setattr(expert_parallel, "groups", Groups())
    monkeypatch.setattr(transfer, "device", device)
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(Event, "waited", 0)
    config = ModelConfig.from_dict({**SIZES, "n_shared_experts": 1})

    def build() -> ZeroModel:
        execution = ExecutionConfig(checkpointing=checkpointing)
        model = ZeroModel(config, expert_parallel_class(RANKS), execution=execution)
        for layer in model.moe_layers():
            layer.shared_experts.register_forward_hook(lambda *_: exchange.log.append("shared"))
            layer.shared_experts.register_full_backward_hook(lambda *_: exchange.log.append("shared back"))
        return model

    waits = train(build, 2 * ROWS * LENGTH // RANKS)  # as many rows to and from each rank
    assert not waits.found
    runs = MOE_LAYERS if checkpointing == "none" else 2 * MOE_LAYERS
    assert waits.queued == {("pretrain/transfer.py:_queued_copy", "copy"): runs}
    assert Event.waited == runs
    there, back = ["counts", "start", "start", "shared", "wait", "wait"], ["start", "wait"]
    backward = [*back, "start", "start", "shared back", "wait", "wait"]
    if checkpointing == "block":  # a layer runs again before its gradients
        backward = [*there, *back, *backward]
    assert exchange.log == MOE_LAYERS * (there + back) + MOE_LAYERS * backward


class Groups:
    """Stands for deepspeed.utils.groups on rank 3."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_: 3 if "rank" in name else None


def test_the_recorder_finds_every_kind_of_wait():
    with fake_gpu() as waits:
        x, host = on_device(4, dtype=torch.float32), torch.zeros(4)
        assert float(x.sum()) == 1.0
        assert bool((x > 0).any())
        assert [x[x > 0].shape, x.nonzero().shape] == [(4,), (4, 1)]
        assert x.long().bincount(minlength=3).shape == (3,)
        assert x.long().repeat_interleave(x.long(), output_size=9).shape == (9,)
        x[host.long()]
        host.to(device(), non_blocking=True)  # not pinned
        x.cpu()
        assert sum(waits.found.values()) == 8
        assert not waits.queued
        host.pin_memory().to(device(), non_blocking=True)
        torch.empty(4, pin_memory=True).copy_(x, non_blocking=True)
        assert sum(waits.found.values()) == 8
        assert sum(waits.queued.values()) == 2
        with pytest.raises(RuntimeError, match="device"):
            x + host
