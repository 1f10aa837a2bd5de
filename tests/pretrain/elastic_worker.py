"""Run by test_resume under the deepspeed launcher: layouts write checkpoints, other layouts load them.

    elastic_worker.py adamw|muon FOLDER save|each|all ...

save: each layout of these ranks trains, saves, and continues. each: each of them loads one of those
checkpoints; all: every one. Loaded states are compared bit-exactly, the steps after them up to rounding.
Some of the layouts offload the optimizer. Prints one line of JSON per pair.
"""

import importlib
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import groups, safe_get_full_optimizer_state

from model import ModelConfig, RecurrenceConfig
from model.losses import IGNORE_INDEX, total_loss
from pretrain import elastic
from pretrain.checkpoint import TrainingState
from pretrain.config import RunConfig, check_layout
from pretrain.ds_config import load_ds_config
from pretrain.engine import Engine
from pretrain.expert_parallel import gather_experts, is_expert
from pretrain.process_group import all_reduce_sum, init_process_group, rank, world_size
from pretrain.saver import Saver
from pretrain.trainer import update_router_biases
from pretrain.universal import convert_to_universal

ROOT = Path(__file__).parents[2]
ROWS, T, LR, BEFORE, AFTER = 8, 13, 1e-2, 3, 3
DS_CONFIGS = {1: "zero1.json", 2: "zero2.json", 3: "zero3_ep.json"}
MODEL = ModelConfig(
    vocab_size=97,
    hidden_size=48,
    num_hidden_layers=2,
    intermediate_size=72,
    moe_intermediate_size=24,
    hidden_act="relu2" if "muon" in sys.argv else "silu",  # experts of two matrices, and of three
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


def offloads(stage: int, ep_size: int) -> bool:
    return (stage + ep_size) % 2 == 1


def build(kind: str, stage: int, ep_size: int) -> tuple[Engine, TrainingState]:
    """An engine of a layout; an earlier layout's groups are forgotten, as in a new process."""
    for name in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP"):
        getattr(groups, name).clear()
    config = RunConfig(ep_size=ep_size, global_batch_size=ROWS, micro_batch_size=ROWS)
    config.optimizer.kind, config.optimizer.weight_decay = kind, 0.5
    config.optimizer.clip = 0.3 if kind == "adamw" else 0.0
    micro, accumulation = check_layout(config, MODEL, world_size())
    ds_config = load_ds_config(str(ROOT / "ds_configs" / DS_CONFIGS[stage]), config, micro, accumulation)
    if offloads(stage, ep_size):
        ds_config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    state = TrainingState(0, MODEL.to_dict(), "", 0, ROWS, world_size(), ep_size, stage, kind)
    return Engine(config, MODEL, ds_config), state


def train(engine: Engine, steps: range) -> list[list[float]]:
    """Loss and gradient norm of each step; the learning rate is a function of the step, as in training."""
    history = []
    for step in steps:
        tokens, targets = batch(step)
        engine.train()
        output = engine.forward(tokens=tokens, targets=targets, num_steps=1 + step % 3)
        loss = total_loss(MODEL, output.loss_sums, {"targets": ROWS * (T - 1), "rows": ROWS})
        engine.backward(loss)
        engine.step(LR / (1 + step), all_reduce_sum(loss.detach().clone()))
        update_router_biases(engine)
        history.append([all_reduce_sum(loss.detach().double()).item(), engine.grad_norm().item()])
    return history


def state_of(engine: Engine) -> dict[str, torch.Tensor]:
    """Weights, both moments of what Adam updates, and buffers of the whole run."""
    if not engine.deepspeed.zero_optimization_partition_weights():
        # DeepSpeed links the optimizer's state to its parameters after the first GROUP of the first step.
        engine.deepspeed.optimizer._hp_optimizer_states_linked = False
        engine.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()
    tensors = [*engine.full_weights(), *engine.checkpoint_buffers().items()]
    state = {name: value.clone() for name, value in tensors}
    for name, parameter in engine.model.named_parameters():
        if getattr(parameter, "use_muon", False):
            continue
        for key in ("exp_avg", "exp_avg_sq"):
            value = safe_get_full_optimizer_state(parameter, key).view(
                getattr(parameter, "ds_shape", parameter.shape)
            )
            whole = gather_experts(value, engine.ep_size) if is_expert(parameter) else value
            state[f"{name}.{key}"] = whole.clone()
    return state


def momenta(engine: Engine, state: TrainingState) -> dict[str, torch.Tensor]:
    """Muon's, of the whole run, from a checkpoint of it."""
    found = [name for name, p in engine.model.named_parameters() if getattr(p, "use_muon", False)]
    if not found:
        return {}
    with tempfile.TemporaryDirectory() as scratch:
        shared = [scratch]
        torch.distributed.broadcast_object_list(shared)
        saver = Saver(engine, Path(shared[0]), keep_last=1, keep_every=0, rank=rank())
        saver.save(state)
        saver.wait()
        files = Path(shared[0]) / "checkpoints" / f"step-{state.step}"
        universal = convert_to_universal(files, Path(scratch) / "own")
        stored = {name: torch.load(universal / "zero" / name / "exp_avg.pt") for name in found}
        engine.barrier()
    return {
        f"{name}.momentum": (value["param"] if isinstance(value, dict) else value).flatten()
        for name, value in stored.items()
    }


def save(kind: str, folder: Path) -> None:
    for stage, ep_size in itertools.product(DS_CONFIGS, [n for n in (1, 2) if n <= world_size()]):
        run = folder / f"zero{stage}_ep{ep_size}"
        engine, state = build(kind, stage, ep_size)
        train(engine, range(BEFORE))
        saver = Saver(engine, run, keep_last=2, keep_every=0, rank=rank())
        state = TrainingState(**{**state.__dict__, "step": BEFORE})
        momentum = momenta(engine, state)
        saver.save(state)
        expected = state_of(engine) | momentum
        history = train(engine, range(BEFORE, BEFORE + AFTER))  # while the files are written
        saver.wait()
        if rank() == 0:
            torch.save({"state": expected, "history": history}, run / "expected.pt")


def load(kind: str, folder: Path, source: str, stage: int, ep_size: int) -> dict[str, Any]:
    """One layout loads another's checkpoint and continues: how far its steps are from the other's."""
    run = folder / source
    expected: dict[str, Any] = torch.load(run / "expected.pt")
    engine, state = build(kind, stage, ep_size)
    step = elastic.load(engine, run / "checkpoints" / f"step-{BEFORE}", state, run)
    loaded = state_of(engine) | momenta(engine, state)
    assert loaded.keys() == expected["state"].keys()
    other_norms = kind == "muon" and ("zero3" in source) != (stage == 3)
    if other_norms:  # of gradients under ZeRO-3, of Muon's updates under 1 and 2
        assert loaded.pop("spike_guard.history").isnan().all()
    different = [
        name  # the spike guard's history holds NaN where there was no step yet
        for name in loaded
        if not torch.allclose(loaded[name], expected["state"][name], rtol=0, atol=0, equal_nan=True)
    ]
    history = train(engine, range(step, step + AFTER))
    pairs = list(zip(history, expected["history"], strict=True))
    return {
        "pair": f"{source} -> {world_size()} ranks, zero{stage}_ep{ep_size}",
        "different": different,
        "loss": max(abs(ours[0] - theirs[0]) for ours, theirs in pairs),
        "norm": 0.0 if other_norms else max(abs(ours[1] - theirs[1]) for ours, theirs in pairs),
        "smallest_norm": min(norm for _, norm in history),
        "left": sorted(path.name for path in (run / "checkpoints").iterdir()),
    }


def main() -> None:
    init_process_group()
    kind, folder, actions = sys.argv[-3], Path(sys.argv[-2]), sys.argv[-1].split(",")
    if kind == "muon":  # its iteration in bf16 magnifies rounding
        original = importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
        original.ns_compute_dtype = lambda method: torch.float32
    if "save" in actions:
        save(kind, folder)
    sources = sorted(path.name for path in folder.iterdir())
    targets = [(stage, n) for stage in DS_CONFIGS for n in (1, 2, 4) if world_size() % n == 0]
    if "all" in actions:
        pairs = list(itertools.product(sources, targets))
    else:  # shifted by one, so that every checkpoint is converted
        pairs = list(zip(sources[1:] + sources[:1], itertools.cycle(targets), strict=False))
    for source, (stage, ep_size) in pairs:
        report = load(kind, folder, source, stage, ep_size)
        if rank() == 0:
            print("REPORT " + json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
