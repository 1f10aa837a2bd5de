"""Run by test_offload under the deepspeed launcher: every offload against the same run without it.

    offload_worker.py KIND ...

Each run accumulates two micro-batches, has one step refused, and is resumed from a checkpoint, with the same
offload and with another. Prints one line of JSON per optimizer KIND, ZeRO stage and offload.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from elastic_worker import DS_CONFIGS, MODEL, ROOT, ROWS, T, batch
from torch import Tensor

from model.losses import total_loss
from pretrain import elastic
from pretrain.checkpoint import TrainingState
from pretrain.config import RunConfig, check_layout
from pretrain.ds_config import load_ds_config
from pretrain.engine import Engine
from pretrain.process_group import all_reduce_sum, init_process_group, rank, world_size
from pretrain.saver import Saver
from pretrain.trainer import update_router_biases

REFUSED, SAVED, STEPS, LR, EP_SIZE = 2, 4, 6, 1e-2, 2
OPTIMIZER, PARAMETERS = "offload_optimizer", "offload_param"
CASES: list[tuple[int, tuple[str, ...]]] = [
    *((stage, offload) for stage in DS_CONFIGS for offload in ((), (OPTIMIZER,))),
    (3, (PARAMETERS,)),
    (3, (OPTIMIZER, PARAMETERS)),
]


def build(kind: str, stage: int, offload: tuple[str, ...]) -> tuple[Engine, TrainingState]:
    config = RunConfig(ep_size=EP_SIZE, global_batch_size=ROWS, micro_batch_size=2)
    config.optimizer.kind, config.optimizer.ema_decay = kind, 0.9
    config.optimizer.clip = 0.3 if kind == "adamw" else 0.0
    micro, accumulation = check_layout(config, MODEL, world_size())
    ds_config = load_ds_config(str(ROOT / "ds_configs" / DS_CONFIGS[stage]), config, micro, accumulation)
    for part in offload:
        ds_config["zero_optimization"][part] = {"device": "cpu"}
    state = TrainingState(SAVED, MODEL.to_dict(), "", 0, ROWS, world_size(), EP_SIZE, stage, kind)
    return Engine(config, MODEL, ds_config), state


def train(engine: Engine, steps: range) -> list[list[float]]:
    """Loss, gradient norm, and 1.0 if the step was applied."""
    history = []
    for step in steps:
        tokens, targets = (part.split(2) for part in batch(step))
        engine.train()
        losses = []
        for number in range(2):
            output = engine.forward(tokens=tokens[number], targets=targets[number], num_steps=1 + step % 3)
            losses.append(total_loss(MODEL, output.loss_sums, {"targets": ROWS * (T - 1), "rows": ROWS}))
            engine.backward(losses[-1])
            if number == 0:
                engine.step(LR)
        loss = all_reduce_sum(sum(losses).detach())
        engine.step(LR, loss * float("nan") if step == REFUSED else loss)
        update_router_biases(engine)
        history.append([loss.item(), engine.grad_norm().item(), float(engine.step_applied())])
    return history


def weights(engine: Engine) -> dict[str, Tensor]:
    averages = {f"average of {name}": value.clone() for name, value in engine.averaged_weights()}
    return averages | {name: value.clone() for name, value in engine.full_weights()}


def run(kind: str, stage: int, offload: tuple[str, ...], folder: Path) -> dict[str, Any]:
    engine, state = build(kind, stage, offload)
    history = train(engine, range(SAVED))
    saver = Saver(engine, folder, keep_last=1, keep_every=0, rank=rank())
    saver.save(state)
    history += train(engine, range(SAVED, STEPS))
    saver.wait()
    resumed, _ = build(kind, stage, offload)
    elastic.load(resumed, folder / f"checkpoints/step-{SAVED}", state, folder)
    again = train(resumed, range(SAVED, STEPS))
    ours, theirs = weights(engine), weights(resumed)
    alike = again == history[SAVED:] and all(torch.equal(ours[name], theirs[name]) for name in ours)
    switched, _ = build(kind, stage, () if offload else (OPTIMIZER,))
    elastic.load(switched, folder / f"checkpoints/step-{SAVED}", state, folder)
    pairs = zip(train(switched, range(SAVED, STEPS)), history[SAVED:], strict=True)
    apart = max(abs(one - other) for steps in pairs for one, other in zip(*steps, strict=True))
    return {"history": history, "weights": ours, "resumed_alike": alike, "switched": apart}


def main() -> None:
    init_process_group()
    for kind in (argument for argument in sys.argv[1:] if not argument.startswith("--")):
        plain: dict[int, dict[str, Any]] = {}
        for stage, offload in CASES:
            with tempfile.TemporaryDirectory() as scratch:
                shared = [scratch]
                torch.distributed.broadcast_object_list(shared)
                done = run(kind, stage, offload, Path(shared[0]))
                torch.distributed.barrier()
            without = plain.setdefault(stage, done)
            pairs = list(zip(done["history"], without["history"], strict=True))
            report = {
                "case": [kind, stage, *offload],
                "resumed_alike": done["resumed_alike"],
                "switched": done["switched"],
                "applied": [step[2] for step in done["history"]],
                "loss": max(abs(ours[0] - theirs[0]) for ours, theirs in pairs),
                "norm": max(abs(ours[1] - theirs[1]) for ours, theirs in pairs),
                "weights": max(
                    (value - without["weights"][name]).abs().max().item()
                    for name, value in done["weights"].items()
                ),
            }
            if rank() == 0:
                print("REPORT " + json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
