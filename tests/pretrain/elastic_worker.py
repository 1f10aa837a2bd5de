"""Run by test_resume under the deepspeed launcher: layouts write checkpoints, other layouts load them.

    elastic_worker.py save FOLDER       each layout of these ranks trains, saves, and trains on
    elastic_worker.py load FOLDER       each layout of these ranks loads each of those and trains on

A checkpoint is compared in memory to the bit, the steps after it to rounding. Prints one line of JSON a pair.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import groups, safe_get_full_optimizer_state

from model import ModelConfig, RecurrenceConfig
from model.losses import IGNORE_INDEX, total_loss
from pretrain import checkpoint, elastic
from pretrain.checkpoint import Saver, TrainingState
from pretrain.config import RunConfig, check_layout, load_ds_config
from pretrain.engine import Engine, all_reduce_sum, init_process_group, rank, world_size
from pretrain.expert_parallel import gather_experts, is_expert
from pretrain.trainer import update_router_biases

ROOT = Path(__file__).parents[2]
ROWS, T, LR, BEFORE, AFTER = 8, 13, 1e-2, 3, 3
DS_CONFIGS = {1: "zero1.json", 2: "zero2.json", 3: "zero3_ep.json"}
MODEL = ModelConfig(
    vocab_size=97,
    hidden_size=48,
    num_hidden_layers=2,
    intermediate_size=72,
    moe_intermediate_size=24,
    n_routed_experts=4,
    num_experts_per_tok=2,
    initializer_range=0.1,
    recurrence=RecurrenceConfig("block", [[1, 1]], 2),
    router_bias_update_rate=0.01,
)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's tokens and targets of a global batch that depends on the step alone."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 97, (ROWS, T), generator=generator)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = IGNORE_INDEX
    mine = slice(rank() * ROWS // world_size(), (rank() + 1) * ROWS // world_size())
    return tokens[mine], targets[mine]


def build(stage: int, ep_size: int) -> tuple[Engine, TrainingState]:
    """An engine of a layout; groups of an earlier layout are forgotten, as in a process of its own."""
    for name in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP"):
        getattr(groups, name).clear()
    config = RunConfig(ep_size=ep_size, global_batch_size=ROWS, micro_batch_size=ROWS)
    config.optimizer.clip, config.optimizer.weight_decay = 0.3, 0.5
    micro, accumulation = check_layout(config, MODEL, world_size())
    ds_config = load_ds_config(str(ROOT / "ds_configs" / DS_CONFIGS[stage]), config, micro, accumulation)
    state = TrainingState(0, MODEL.to_dict(), "", 0, ROWS, world_size(), ep_size, stage)
    return Engine(config, MODEL, ds_config), state


def train(engine: Engine, steps: range) -> list[list[float]]:
    """Loss, gradient norm and learning rate of each step; the rate is the step's, as in a schedule."""
    history = []
    for step in steps:
        tokens, targets = batch(step)
        engine.train()
        output = engine.forward(tokens=tokens, targets=targets, num_steps=1 + step % 3)
        loss = total_loss(MODEL, output.loss_sums, {"targets": ROWS * (T - 1), "rows": ROWS})
        engine.backward(loss)
        engine.step(LR / (1 + step))
        update_router_biases(engine)
        history.append([all_reduce_sum(loss.detach().double()).item(), engine.grad_norm()])
    return history


def state_of(engine: Engine) -> dict[str, torch.Tensor]:
    """Weights, both Adam moments and biases of the whole model."""
    if not engine.deepspeed.zero_optimization_partition_weights():
        # DeepSpeed links the optimizer's state to its parameters after the first GROUP of the first step.
        engine.deepspeed.optimizer._hp_optimizer_states_linked = False
        engine.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()
    state = {name: value.clone() for name, value in engine.full_weights()}
    for name, parameter in engine.model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            value = safe_get_full_optimizer_state(parameter, key).view(
                getattr(parameter, "ds_shape", parameter.shape)
            )
            whole = gather_experts(value, engine.ep_size) if is_expert(parameter) else value
            state[f"{name}.{key}"] = whole.clone()
    return state


def save(folder: Path) -> None:
    for stage, ep_size in itertools.product(DS_CONFIGS, [n for n in (1, 2) if n <= world_size()]):
        run = folder / f"zero{stage}_ep{ep_size}"
        engine, state = build(stage, ep_size)
        train(engine, range(BEFORE))
        saver = Saver(engine, run, keep_last=2, keep_every=0, rank=rank())
        saver.save(TrainingState(**{**state.__dict__, "step": BEFORE}))
        expected = state_of(engine)
        history = train(engine, range(BEFORE, BEFORE + AFTER))  # while the files are written
        saver.wait()
        if rank() == 0:
            torch.save({"state": expected, "history": history}, run / "expected.pt")


def load(folder: Path, sources: list[str], targets: list[tuple[int, int]]) -> None:
    for source, (stage, ep_size) in itertools.product(sources, targets):
        run = folder / source
        expected: dict[str, Any] = torch.load(run / "expected.pt")
        engine, state = build(stage, ep_size)
        step = elastic.load(engine, run / "checkpoints" / f"step-{BEFORE}", state, run)
        loaded = state_of(engine)
        assert loaded.keys() == expected["state"].keys()
        different = [name for name in loaded if not torch.equal(loaded[name], expected["state"][name])]
        history = train(engine, range(step, step + AFTER))
        report = {
            "source": source,
            "target": f"{world_size()} ranks, zero{stage}, ep{ep_size}",
            "different": different,
            "loss": max(abs(a[0] - b[0]) for a, b in zip(history, expected["history"], strict=True)),
            "norm": max(abs(a[1] - b[1]) for a, b in zip(history, expected["history"], strict=True)),
            "left": [path.name for path in (run / "checkpoints").iterdir()],
        }
        if rank() == 0:
            print("REPORT " + json.dumps(report), flush=True)


def main() -> None:
    init_process_group()
    folder = Path(sys.argv[-1])
    if "save" in sys.argv:
        save(folder)
        return
    sources = sorted(path.name for path in folder.iterdir())
    sizes = [n for n in (1, 2, 4) if world_size() % n == 0]
    load(folder, sources, list(itertools.product(DS_CONFIGS, sizes)))


if __name__ == "__main__":
    main()
