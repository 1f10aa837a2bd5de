"""Run by test_precision under the deepspeed launcher: files of ds_configs/ against fp32.

    precision_worker.py FILE ...

A run accumulates two micro-batches, has one step refused and is resumed from a checkpoint. Prints one line of
JSON per file: losses and gradient norms, whether the resumed steps repeat them, and how far the gradient that
the optimizer gets is from the fp32 sum of the micro-batches' gradients.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed
from deepspeed.utils import safe_get_full_grad
from elastic_worker import MODEL, ROOT, ROWS, T, batch
from offload_worker import EP_SIZE, SAVED, STEPS, train, weights
from torch import Tensor, nn

from model import ZeroModel
from model.losses import total_loss
from pretrain import elastic
from pretrain.checkpoint import TrainingState
from pretrain.config import RunConfig, check_layout
from pretrain.ds_config import load_ds_config
from pretrain.engine import Engine
from pretrain.process_group import init_process_group, rank, world_size
from pretrain.saver import Saver

COUNTS = {"targets": ROWS * (T - 1), "rows": ROWS}


def build(file: str, ep_size: int, rows: int) -> tuple[Engine, TrainingState]:
    """An engine that accumulates micro-batches of so many rows."""
    config = RunConfig(ep_size=ep_size, global_batch_size=ROWS, micro_batch_size=rows)
    config.optimizer.clip, config.optimizer.ema_decay = 0.3, 0.9
    micro, accumulation = check_layout(config, MODEL, world_size())
    ds_config = load_ds_config(str(ROOT / "ds_configs" / file), config, micro, accumulation)
    stage = ds_config["zero_optimization"]["stage"]
    state = TrainingState(SAVED, MODEL.to_dict(), "", 0, ROWS, world_size(), ep_size, stage, "adamw")
    return Engine(config, MODEL, ds_config), state


def resumed_alike(file: str, folder: Path) -> tuple[list[list[float]], bool]:
    """Loss, norm and whether the step was applied, of every step; whether a resumed run repeats the last."""
    engine, state = build(file, EP_SIZE, 2)
    history = train(engine, range(SAVED))
    saver = Saver(engine, folder, keep_last=1, keep_every=0, rank=rank())
    saver.save(state)
    history += train(engine, range(SAVED, STEPS))
    saver.wait()
    again, _ = build(file, EP_SIZE, 2)
    elastic.load(again, folder / f"checkpoints/step-{SAVED}", state, folder)
    alike = train(again, range(SAVED, STEPS)) == history[SAVED:]
    ours, theirs = weights(engine), weights(again)
    return history, alike and all(torch.equal(ours[name], theirs[name]) for name in ours)


def loss_of(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    return total_loss(MODEL, model(tokens=tokens, targets=targets, num_steps=2).loss_sums, COUNTS)


def accumulated_gradient(file: str) -> tuple[dict[str, Tensor], torch.dtype]:
    """What the optimizer gets after one micro-batch per row, and the weights' type in the forward pass."""
    engine, _ = build(file, 1, 1)
    engine.train()
    for tokens, targets in zip(*(part.split(1) for part in batch(0)), strict=True):
        engine.backward(loss_of(engine.deepspeed, tokens, targets))
        if not engine.deepspeed.is_gradient_accumulation_boundary():
            engine.step(0.0)
    dtype = next(engine.model.parameters()).dtype
    return {name: safe_get_full_grad(p).float() for name, p in engine.model.named_parameters()}, dtype


def summed_gradient(dtype: torch.dtype) -> dict[str, Tensor]:
    """The fp32 sum of every row's gradient in `dtype`, over all ranks, by plain torch."""
    model = ZeroModel(MODEL, seed=RunConfig().seed).train()
    for parameter in model.parameters():
        parameter.data = parameter.to(dtype)
    total = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    for tokens, targets in zip(*(part.split(1) for part in batch(0)), strict=True):
        model.zero_grad()
        loss_of(model, tokens, targets).backward()
        for name, parameter in model.named_parameters():
            total[name] += 0 if parameter.grad is None else parameter.grad.float()
    for value in total.values():
        torch.distributed.all_reduce(value)
    return total


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm of theirs, of all parameters together."""
    apart = sum((ours[name].view_as(value) - value).square().sum().item() for name, value in theirs.items())
    size = sum(value.square().sum().item() for value in theirs.values())
    return float((apart / size) ** 0.5)


def main() -> None:
    init_process_group()
    for file in (argument for argument in sys.argv[1:] if argument.endswith(".json")):
        with tempfile.TemporaryDirectory() as scratch:
            shared = [scratch]
            torch.distributed.broadcast_object_list(shared)
            history, alike = resumed_alike(file, Path(shared[0]))
            torch.distributed.barrier()
        gradient, dtype = accumulated_gradient(file)
        report = {
            "file": file,
            "history": history,
            "resumed_alike": alike,
            "dtype": str(dtype),
            "tf32": torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32,
            "gradient": distance(gradient, summed_gradient(dtype)),
        }
        if rank() == 0:
            print("REPORT " + json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
