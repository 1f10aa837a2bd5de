"""A rank without DeepSpeed, whose checkpoints take a millisecond."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from model import ModelConfig
from pretrain import checkpoint
from pretrain.checkpoint import TrainingState
from pretrain.saver import Saver

STATE = TrainingState(0, ModelConfig(vocab_size=97, hidden_size=48).to_dict(), "data", 0, 8, 1, 1, 3)


class OneRank:
    """What a Saver saves; its tensors hold the step."""

    def __init__(self) -> None:
        self.step = 0

    def copied(self) -> None:
        """Nothing is copied."""

    def snapshot(self) -> dict[str, Any]:
        value = torch.full((3000,), float(self.step))
        return {"weights.pt": {"w": value}, "ema/w.safetensors": save({"w": value})}

    def checkpoint_buffers(self) -> dict[str, Tensor]:
        return {"bias": torch.full((4,), float(self.step))}

    def gather(self, value: Any) -> list[Any]:
        return [value]


def saver(run: Path, keep_last: int = 2, keep_every: int = 0, **more: Any) -> Saver:
    return Saver(OneRank(), run, keep_last, keep_every, rank=0, **more)


def save_step(writer: Saver, step: int, **more: Any) -> None:
    """Saves a step and waits for it."""
    assert isinstance(writer.engine, OneRank)
    writer.engine.step = step
    writer.save(TrainingState(**{**STATE.__dict__, "step": step}), **more)
    writer.wait()


def step_held(folder: Path) -> int:
    """The step of a checkpoint; fails unless all its parts are of that step."""
    assert checkpoint.damage(folder) is None
    state, buffers = checkpoint.read(folder)
    weights = torch.load(folder / "weights.pt", weights_only=True)["w"]
    assert (weights == state.step).all()
    assert (buffers["bias"] == state.step).all()
    assert folder.name == f"step-{state.step}"
    return state.step
