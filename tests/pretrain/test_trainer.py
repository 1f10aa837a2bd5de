"""In which order a run does its steps, lines, validations and checkpoints, and what a crash leaves."""

from types import SimpleNamespace
from typing import Any

import pytest

from data_pipeline.errors import DataError
from model import ModelConfig
from pretrain import process_group
from pretrain.config import RunConfig
from pretrain.step_inputs import one_ahead
from pretrain.trainer import Trainer, TrainingError

from .test_waits import Here


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "dist", SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: 1))


class Recorded(Trainer):
    """A trainer whose parts only say that they were called."""

    def __init__(self, broken_step: int = 0, stop_at: int = 0, device_lost: bool = False, **config: Any):
        model: Any = ModelConfig(vocab_size=64, hidden_size=16)
        nothing: Any = SimpleNamespace(idle=lambda: True)
        run = RunConfig(max_steps=6, save_every=100, **config)
        super().__init__(run, model, nothing, nothing, None, 1, nothing, nothing)
        self.validation = nothing if run.eval_every else None
        self.broken_step, self.stop_at, self.device_lost = broken_step, stop_at, device_lost
        self.done: list[str] = []
        self.applied = True  # whether a step changes the weights

    def _read(self, step: int) -> Any:
        return step

    def _train_step(self, pending: Any) -> Any:
        assert pending.result() == self.step
        if self.step + 1 == self.broken_step:
            raise DataError("a damaged shard")
        self.step += 1
        self.done.append(f"step {self.step}")
        return SimpleNamespace(step=self.step, val_loss=None, applied=self.applied, results=self._results())

    def _results(self) -> Any:
        stop = SimpleNamespace(tolist=lambda step=self.step: [float(step == self.stop_at), 0.0])
        return SimpleNamespace(read=lambda: {"stop": stop})

    def _write(self, figures: Any) -> dict[str, Any]:
        if self.device_lost and figures.step + 1 == self.broken_step:
            raise RuntimeError("CUDA error: device-side assert triggered")
        validated = "" if figures.val_loss is None else f" with {figures.val_loss}"
        self.done.append(f"line {figures.step}{validated}")
        return {"skipped": "loss is nan"}

    def validation_loss(self, reader: Any) -> float:
        self.done.append(f"validation {self.step}")
        return 0.5

    def save(self) -> None:
        self.done.append(f"save {self.step}")


def done(trainer: Recorded) -> str:
    trainer._train(Here())
    return ", ".join(trainer.done)


def test_a_line_waits_for_the_next_step_unless_something_needs_it():
    assert done(Recorded()) == (
        "step 1, step 2, line 1, step 3, line 2, step 4, line 3, step 5, line 4, step 6, line 5, line 6, "
        "save 6"
    )
    trainer = Recorded(eval_every=2)
    trainer.config.save_every = 3
    assert done(trainer) == (
        "step 1, step 2, line 1, validation 2, line 2 with 0.5, step 3, line 3, save 3, "
        "step 4, validation 4, line 4 with 0.5, step 5, step 6, line 5, validation 6, line 6 with 0.5, save 6"
    )


@pytest.mark.parametrize(("stop_at", "eval_every", "last"), [(2, 0, 3), (2, 2, 2), (3, 2, 4)])
def test_a_stop_is_seen_with_the_line_that_holds_it_and_saves(stop_at, eval_every, last):
    trainer = Recorded(stop_at=stop_at, eval_every=eval_every)
    assert done(trainer).endswith(f"line {last}{' with 0.5' if eval_every else ''}, save {last}")


def test_a_crash_leaves_the_line_of_the_last_whole_step():
    trainer = Recorded(broken_step=4)
    with pytest.raises(DataError, match="a damaged shard"):
        trainer._train(Here())
    assert trainer.done[-2:] == ["line 2", "line 3"]


def test_a_device_that_is_lost_hides_no_error():
    trainer = Recorded(broken_step=4, device_lost=True)
    with pytest.raises(DataError, match="a damaged shard"):
        trainer._train(Here())
    assert trainer.done[-1] == "line 2"


def test_too_many_skipped_steps_leave_all_lines():
    trainer = Recorded()
    trainer.config.stability.max_skipped = 1
    trainer.applied = False
    with pytest.raises(TrainingError, match="step 1 was skipped, the last of 1 in a row"):
        trainer._train(Here())
    assert trainer.done == ["step 1", "step 2", "line 1", "line 2"]


def test_a_batch_is_read_while_the_one_before_is_in_use():
    read: list[int] = []

    def keep(number: int) -> int:
        read.append(number)
        return number

    assert [(number, len(read)) for number in one_ahead(Here(), keep, 3)] == [(0, 2), (1, 3), (2, 3)]
