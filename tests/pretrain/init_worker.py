"""Run by test_init under the deepspeed launcher: runs that start from given weights, against plain torch.

    init_worker.py CASES.json FOLDER

The start, in FOLDER, is an export of another seed without a loop. Every case turns a loop on, whose
parameters are new, trains on the engine and in one plain process, then saves; a second engine of its
`resumed` layout loads the checkpoint, and both go on. Prints one JSON line per case.
"""

import copy
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from deepspeed.utils import groups
from optim_worker import HIDDEN, original_muon, orthogonalised
from safetensors.torch import load_file
from torch import Tensor

from model import ModelConfig, RecurrenceConfig, ZeroModel
from model.export_files import save_weights
from model.losses import IGNORE_INDEX, total_loss
from pretrain import elastic
from pretrain.checkpoint import TrainingState
from pretrain.config import InitConfig, RunConfig, check_layout
from pretrain.ds_config import load_ds_config
from pretrain.engine import Engine
from pretrain.export import with_base
from pretrain.init import Start, find, fit, save_base
from pretrain.parts import Part
from pretrain.process_group import all_reduce_sum, init_process_group, rank, world_size
from pretrain.saver import Saver
from pretrain.trainer import update_router_biases

ROWS, T, LR, STEPS, DECAY, CLIP = 8, 13, 3e-3, 3, 0.3, 0.3
MUON_LR = 0.02
DS_CONFIGS = {1: "ds_configs/zero1.json", 2: "ds_configs/zero2.json", 3: "ds_configs/zero3_ep.json"}
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "intermediate_size": 72,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.1,
    "router_bias_update_rate": 0.01,
}
START = ModelConfig(**SIZES)
MODEL = ModelConfig(**SIZES, recurrence=RecurrenceConfig("block", [[1, 1]], 2))
# Written out: what the code under test finds by rule.
UNDECAYED = re.compile(r"norm\.weight$|\.bias$|embed_tokens")
NEW = re.compile(r"^model\.recurrence\.0\.")


def batch(step: int, whole: bool = False) -> tuple[Tensor, Tensor]:
    """Tokens and targets of a global batch that depends on the step alone: this rank's, or all."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, SIZES["vocab_size"], (ROWS, T), generator=generator)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = IGNORE_INDEX
    part = slice(rank() * ROWS // world_size(), (rank() + 1) * ROWS // world_size())
    mine = slice(None) if whole else part
    return tokens[mine], targets[mine]


def run_config(case: dict[str, Any]) -> RunConfig:
    config = RunConfig(ep_size=case["ep_size"], global_batch_size=ROWS, micro_batch_size=ROWS)
    config.optimizer.weight_decay, config.optimizer.clip = DECAY, CLIP
    config.optimizer.ema_decay, config.optimizer.lr, config.optimizer.muon_lr = 0.5, LR, MUON_LR
    config.optimizer.kind = case.get("kind", "adamw")
    if config.optimizer.kind == "muon":
        config.optimizer.clip = 0.0
    config.init = InitConfig("allow", case["frozen"], case["scale"])
    return config


def build(case: dict[str, Any], config: RunConfig, folder: Path) -> tuple[Engine, Start, TrainingState]:
    for name in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP"):
        getattr(groups, name).clear()  # an earlier layout's, as in a new process
    micro, accumulation = check_layout(config, MODEL, world_size())
    ds_config = load_ds_config(DS_CONFIGS[case["stage"]], config, micro, accumulation)
    start = fit(*find(folder / "start", folder), MODEL, config.init, config.ep_size)
    state = TrainingState(
        0, MODEL.to_dict(), "", 0, ROWS, world_size(), case["ep_size"], case["stage"],
        config.optimizer.kind, origin=start.origin,
    )  # fmt: skip
    return Engine(config, MODEL, copy.deepcopy(ds_config), start=start), start, state


def train(engine: Engine, steps: range) -> list[list[float]]:
    history = []
    for step in steps:
        tokens, targets = batch(step)
        engine.train(step)
        output = engine.forward(tokens=tokens, targets=targets, num_steps=1 + step % 3)
        loss = total_loss(MODEL, output.loss_sums, {"targets": ROWS * (T - 1), "rows": ROWS})
        engine.backward(loss)
        engine.step(LR, all_reduce_sum(loss.detach().clone()))
        update_router_biases(engine)
        history.append([all_reduce_sum(loss.detach().double()).item(), engine.grad_norm().item()])
    return history


def plain(case: dict[str, Any], config: RunConfig, folder: Path, steps: int) -> tuple[Any, dict[str, Tensor]]:
    """AdamW, and Muon for hidden matrices, in plain torch on whole batches; what is frozen is in neither."""
    model = ZeroModel(MODEL, seed=config.seed).train()
    result = model.load_state_dict(load_file(folder / "start/model.safetensors"), strict=False)
    assert not result.unexpected_keys
    assert all(NEW.match(name) for name in result.missing_keys)
    chosen, muon = [], []
    frozen = re.compile(case["frozen_regex"]) if case["frozen"] else None
    for name, parameter in model.named_parameters():
        if frozen is not None and frozen.search(name):
            parameter.requires_grad_(False)
            continue
        scale = 1.0 if NEW.match(name) else case["scale"]
        if config.optimizer.kind == "muon" and HIDDEN.search(name):
            muon.append((parameter, MUON_LR * scale, torch.zeros_like(parameter)))
            continue
        decay = 0.0 if UNDECAYED.search(name) else DECAY
        chosen.append({"params": [parameter], "lr": LR * scale, "weight_decay": decay})
    optimizer = torch.optim.AdamW(chosen, betas=(0.9, 0.95), eps=1e-8)
    history = []
    for step in range(steps):
        tokens, targets = batch(step, whole=True)
        loss = model(tokens, targets=targets, num_steps=1 + step % 3).loss
        loss.backward()
        trained = [p for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(trained, config.optimizer.clip or float("inf"))
        optimizer.step()
        for weight, rate, momentum in muon:
            muon_step(weight, rate, momentum)
        model.zero_grad()
        for layer in model.moe_layers():
            layer.update_bias(layer.load)
            layer.load.zero_()
        history.append([loss.item(), norm.item()])
    return history, {name: value.detach() for name, value in model.state_dict().items()}


@torch.no_grad()
def muon_step(weight: torch.nn.Parameter, rate: float, momentum: Tensor) -> None:
    """Jordan et al. 2024: Nesterov momentum of 0.95, orthogonalised, and decoupled weight decay."""
    assert weight.grad is not None
    momentum.lerp_(weight.grad, 0.05)
    update = orthogonalised(weight.grad.lerp(momentum, 0.95))
    update *= max(1.0, weight.shape[-2] / weight.shape[-1]) ** 0.5
    weight.mul_(1 - rate * DECAY).sub_(rate * update)


def largest(ours: Any, theirs: Any) -> float:
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        return max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    return max(abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))


def in_parts(parts: Iterable[Part], whole: dict[str, torch.Tensor]) -> bool:
    """Whether the parts, put together, are the whole tensors; rows come in order."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, value, row in parts:
        rows = found.setdefault(name, [])
        assert row in (None, sum(map(len, rows)))
        rows.append(value.clone())
    joined = {name: rows[0] if len(rows) == 1 else torch.cat(rows) for name, rows in found.items()}
    return joined.keys() == whole.keys() and all(torch.equal(joined[name], whole[name]) for name in whole)


def run(case: dict[str, Any], folder: Path, out: Path) -> dict[str, Any]:
    config = run_config(case)
    engine, start, state = build(case, config, folder)
    history = train(engine, range(STEPS))
    saver = Saver(engine, out, 1, 0, rank())
    saver.save(TrainingState(**{**vars(state), "step": STEPS}))
    saver.wait()
    if rank() == 0 and start.frozen:
        save_base(out, start)
    engine.barrier()
    further = train(engine, range(STEPS, 2 * STEPS))
    tensors = [(name, value.clone()) for name, value in engine.full_weights()]
    averages = {name: value.clone() for name, value in engine.averaged_weights()}
    assert in_parts(engine.weight_parts(), dict(tensors))
    assert in_parts(engine.averaged_parts(), averages)
    weights = {part.name: part.value for part in with_base(out, (Part(*tensor) for tensor in tensors), state)}
    engine.deepspeed.destroy()

    other = {**case, **case["resumed"]}
    resumed, _, wanted = build(other, run_config(other), folder)
    step = elastic.load(resumed, out / "checkpoints" / f"step-{STEPS}", wanted, out)
    again = train(resumed, range(step, 2 * STEPS))
    same = {name: value.clone() for name, value in resumed.full_weights()}
    averages_again = {name: value.clone() for name, value in resumed.averaged_weights()}
    resumed.deepspeed.destroy()
    if rank() > 0:
        return {}
    report = {
        "case": case,
        "layout": case["resumed"],
        "resumed": largest([[loss] for loss, _ in again], [[loss] for loss, _ in further]),
        "resumed_weights": largest(same, dict(tensors)),
        "resumed_averages": largest(averages_again, averages),
        "trained": sorted(dict(tensors)),
        "frozen_unchanged": all(
            torch.equal(weights[name], value)
            for name, value in load_file(start.weights).items()  # type: ignore[arg-type]
            if name in start.frozen
        ),
        "file_bytes": sum(f.stat().st_size for f in (out / f"checkpoints/step-{STEPS}").rglob("*.pt")),
    }
    expected_history, expected = plain(case, config, folder, 2 * STEPS)
    report["loss"] = largest(
        [[loss] for loss, _ in history + further], [[loss] for loss, _ in expected_history]
    )
    report["norm"] = largest(history + further, expected_history)
    report["weights"] = largest(weights, expected)
    report["moved"] = largest(weights, plain(case, config, folder, 0)[1])
    return report


def save_start(folder: Path) -> None:
    model = ZeroModel(START, seed=6)
    for layer in model.moe_layers():
        layer.gate.e_score_correction_bias.copy_(torch.tensor([0.1, -0.2, 0.05, 0.05]))
    save_weights(folder, START, dict(model.state_dict()))


def main() -> None:
    *_, cases, folder = sys.argv
    init_process_group()
    if rank() == 0:
        save_start(Path(folder) / "start")
    torch.distributed.barrier()
    original_muon.ns_compute_dtype = lambda method: torch.float32  # bf16 magnifies rounding
    for number, case in enumerate(json.loads(Path(cases).read_text())):
        report = run(case, Path(folder), Path(folder) / f"run{number}")
        if rank() == 0:
            print("REPORT " + json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
