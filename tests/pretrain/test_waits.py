"""A whole step, model included, and its line on a pretended GPU: nothing makes the host wait."""

from concurrent.futures import Executor, Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import fake_tensor

from data_pipeline.loading.loader import Batch
from model import ModelConfig, ZeroModel
from pretrain import process_group, step_inputs, transfer
from pretrain.config import DataConfig, RunConfig
from pretrain.stability import SpikeGuard
from pretrain.trainer import Trainer

from ..fake_gpu import device, fake_gpu, on_gpu

ROWS, LENGTH = 4, 16
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "intermediate_size": 64, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "max_position_embeddings": LENGTH,
}  # fmt: skip
LOOP = {
    "placement": "block", "ranges": [[1, 1]], "num_steps": 2, "max_steps": 3,
    "depth_sampling": "poisson", "depth_per": "sequence",
}  # fmt: skip
MODELS = {"next tokens": {"num_nextn_predict_layers": 1}, "loop of drawn depths": {"recurrence": LOOP}}


class Event:
    """Stands for torch.Event, which knows no pretended device; says whether it was waited for."""

    all: list["Event"] = []

    def __init__(self, on: torch.device) -> None:
        assert on == device()
        self.recorded = self.waited_for = False
        self.all.append(self)

    def record(self) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded
        self.waited_for = True


class Loader:
    """Batches with padding and two documents a row."""

    damaged: dict[Any, str] = {}

    def batch(self, step: int) -> Batch:
        tokens = np.ones((ROWS, LENGTH), np.int32)
        starts = np.tile(np.array([0, 5, 12, LENGTH], np.int32), (ROWS, 1))
        return Batch(tokens, tokens, starts, np.full(ROWS, 12, np.int32), [], [])


class Engine:
    """DeepSpeed's place: one process that sums gradients, and the guard, whose verdict DeepSpeed reads."""

    def __init__(self, config: RunConfig, model: ZeroModel) -> None:
        self.model, self.guard = model, SpikeGuard(config.stability, device())
        self.refused: list[Tensor] = []

    def train(self, step: int) -> None:
        self.model.train()
        self.model.training_step = step

    def eval(self) -> None:
        self.model.eval()

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float, loss: Tensor | None = None, comparable: Any = True) -> None:
        if loss is not None:
            grads = [p.grad.float().norm() for p in self.model.parameters() if p.grad is not None]
            self.norm = torch.stack(grads).norm()
            self.refused.append(self.guard.refuses(loss, self.norm, comparable))

    def step_applied(self) -> bool:
        return True

    def grad_norm(self) -> Tensor:
        return self.norm


class Here(Executor):
    """Runs everything in this thread, where the pretended GPU is."""

    def submit(self, work: Any, /, *arguments: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work(*arguments, **options))
        return future


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank with the pretended GPU; its sums over ranks are their own results."""
    accelerator = SimpleNamespace(
        current_device_name=lambda: str(device()),
        device_name=lambda: device().type,
        max_memory_allocated=lambda: 1,
    )
    group = SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: 1, all_reduce=lambda values: None)
    monkeypatch.setattr(process_group, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(process_group, "dist", group)
    monkeypatch.setattr(transfer.torch, "Event", Event)
    monkeypatch.setattr(Event, "all", [])
    from_numpy = torch.from_numpy

    def fake_from_numpy(values: Any) -> Tensor:
        """Host memory that is as pretended as the GPU: the mode takes no other."""
        return torch.empty(values.shape, dtype=from_numpy(values).dtype)

    monkeypatch.setattr(torch, "from_numpy", fake_from_numpy)
    monkeypatch.setattr(
        fake_tensor, "CONSTANT_NUMEL_LIMIT", 0
    )  # whose numbers it would keep and compute with


def trainer_of(model: dict[str, Any], lines: list[dict[str, Any]], tmp_path) -> Trainer:
    model_config = ModelConfig.from_dict({**SIZES, **model})
    config = RunConfig(
        output_dir=str(tmp_path), global_batch_size=ROWS, max_steps=100, eval_batches=3,
        data=DataConfig(sequence_length=LENGTH),
    )  # fmt: skip
    engine: Any = Engine(config, on_gpu(lambda: ZeroModel(model_config)))
    requests: Any = SimpleNamespace(reason=lambda: None)
    loader: Any = Loader()
    trainer = Trainer(config, model_config, engine, loader, loader, 2, None, requests)  # type: ignore[arg-type]
    trainer.log = SimpleNamespace(write=lines.append)  # type: ignore[assignment]
    return trainer


@pytest.mark.parametrize("name", MODELS)
def test_a_step_and_its_line_wait_for_nothing(name, one_gpu, tmp_path):
    lines: list[dict[str, Any]] = []
    with fake_gpu() as waits:
        trainer = trainer_of(MODELS[name], lines, tmp_path)
        waits.found.clear()
        waits.answer = 2  # loop steps of a row
        first, second = (trainer._train_step(Here().submit(trainer._read, step)) for step in (0, 1))
        assert [event.waited_for for event in Event.all] == [False, False]
        waits.answer = 0  # requests to stop
        trainer._report(first)
        assert [event.waited_for for event in Event.all] == [True, False]
    assert not waits.found
    assert {place for place, _ in waits.queued} >= {
        "pretrain/transfer.py:to_device",
        "pretrain/transfer.py:_queued_copy",
    }
    assert [line["step"] for line in lines] == [1]
    assert second.step == 2


def test_a_validation_waits_for_its_result_alone(one_gpu, tmp_path):
    with fake_gpu(answer=0) as waits:
        trainer = trainer_of({}, [], tmp_path)
        waits.found.clear()
        trainer.validation_loss(Here())
        batches = trainer.config.eval_batches
        # Each batch's flag once the next batch is queued, and at the end the sums.
        assert [event.waited_for for event in Event.all] == [True] * (batches - 1) + [False, True]
    assert not waits.found


@pytest.mark.parametrize("planted", ["unpinned", "read"])
def test_a_planted_wait_is_found(planted, one_gpu, tmp_path, monkeypatch):
    if planted == "unpinned":
        monkeypatch.setattr(step_inputs, "pinned", lambda value: value)
    else:
        monkeypatch.setattr(Engine, "grad_norm", lambda self: self.norm * float(self.norm))
    with fake_gpu() as waits:
        trainer = trainer_of({}, [], tmp_path)
        waits.found.clear()
        trainer._train_step(Here().submit(trainer._read, 0))
    assert {kind for _, kind in waits.found} == {"copy" if planted == "unpinned" else "item"}
