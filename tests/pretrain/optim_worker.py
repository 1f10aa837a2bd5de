"""Run by test_optim under the deepspeed launcher: Muon under ZeRO against Muon in plain torch.

Prints one JSON line per case.
"""

import copy
import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from equality_worker import ROWS, batch
from safetensors.torch import load_file
from torch import Tensor

from model import ModelConfig, RecurrenceConfig, ZeroModel
from model.losses import IGNORE_INDEX, total_loss
from pretrain.checkpoint import EMA, TrainingState
from pretrain.config import OptimizerConfig, RunConfig, check_layout
from pretrain.ds_config import load_ds_config
from pretrain.engine import Engine
from pretrain.process_group import all_reduce_sum, init_process_group, rank, world_size
from pretrain.saver import Saver

# Imported after pretrain.engine, which keeps it from being compiled.
original_muon = importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
MUON_UPDATE = original_muon.muon_update
STEPS, LR, MUON_LR, DECAY, AVERAGE = 3, 1e-3, 0.02, 0.1, 0.7
CASES: dict[str, dict[str, Any]] = {
    "ZeRO-3, expert parallel, accumulation": {"ds": "zero3_ep", "ep_size": 2, "micro": 2},
    "ZeRO-3, in bf16": {"ds": "zero3_ep", "ep_size": 1, "micro": 4, "iterate_in": torch.bfloat16},
    "ZeRO-1": {"ds": "zero1", "ep_size": 1, "micro": 4},
    "ZeRO-2, expert parallel, accumulation": {"ds": "zero2", "ep_size": 2, "micro": 2},
}
# Written out: what the code under test finds by rule.
HIDDEN = re.compile(
    r"(q_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj|gate_proj|up_proj|down_proj|eh_proj|injection"
    r"|recurrence\.0\.gate)\.weight$|experts\.w[123]$"
)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Newton-Schulz of Jordan et al. 2024, in the precision of the matrix (..., m, n)."""
    x = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if matrix.shape[-2] > matrix.shape[-1] else x


def reference(config: RunConfig, model_config: ModelConfig, precision: torch.dtype) -> dict[str, Tensor]:
    """The same steps on whole batches in this process: names, weights and their average."""
    model = ZeroModel(model_config, seed=config.seed).train()
    matrices = {n: p for n, p in model.named_parameters() if HIDDEN.search(n)}
    rest = {n: p for n, p in model.named_parameters() if n not in matrices}
    decayed = [p for n, p in rest.items() if p.dim() > 1 and "embed_tokens" not in n]
    vectors = [p for p in rest.values() if not any(p is d for d in decayed)]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=LR,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    momenta = {n: torch.zeros_like(p) for n, p in matrices.items()}
    average = {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in range(STEPS):
        tokens, targets = batch(step)
        output = model(tokens, targets=targets, num_steps=1 + step % 2)
        output.loss.backward()
        adamw.step()
        with torch.no_grad():
            for name, weight in matrices.items():
                grad = weight.grad
                assert grad is not None
                momenta[name] = 0.95 * momenta[name] + 0.05 * grad
                blend = 0.05 * grad + 0.95 * momenta[name]
                update = orthogonalised(blend.to(precision)).float()
                update = update * max(1.0, weight.shape[-2] / weight.shape[-1]) ** 0.5
                weight.copy_(weight * (1 - MUON_LR * DECAY) - MUON_LR * update)
            for name, weight in model.named_parameters():
                average[name] = AVERAGE * average[name] + (1 - AVERAGE) * weight
        model.zero_grad()
        for layer in model.moe_layers():
            layer.load.zero_()
    return {n: p.detach() for n, p in model.named_parameters()} | {
        f"average of {n}": v for n, v in average.items()
    }


def train(engine: Engine, config: RunConfig, model_config: ModelConfig, steps: range) -> None:
    micro, _ = check_layout(config, model_config, world_size())
    engine.train()
    for step in steps:
        tokens, targets = batch(step)
        counts = {"targets": int((targets != IGNORE_INDEX).sum()), "rows": ROWS}
        mine = slice(rank() * ROWS // world_size(), (rank() + 1) * ROWS // world_size())
        parts = zip(tokens[mine].split(micro), targets[mine].split(micro), strict=True)
        for part_tokens, part_targets in parts:
            output = engine.forward(tokens=part_tokens, targets=part_targets, num_steps=1 + step % 2)
            engine.backward(total_loss(model_config, output.loss_sums, counts))
            engine.step(LR)


def snapshot(engine: Engine) -> dict[str, Tensor]:
    """Weights and their average, by name."""
    names = {n for n, _ in engine.model.named_parameters()}
    weights = {n: v.clone() for n, v in engine.full_weights() if n in names}
    averages = {f"average of {n}": v.clone() for n, v in engine.averaged_weights() if n in names}
    assert all(torch.equal(v, weights[n]) for n, v in engine.full_weights() if n in names)  # put back
    return weights | averages


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def distributed(
    config: RunConfig, model_config: ModelConfig, ds_config: str, checkpoint: Path, first: Path
) -> tuple[dict[str, Tensor], Tensor, bool, bool]:
    """What STEPS steps gave, and what a second engine makes of their checkpoint.

    Returns:
        Snapshot; calls of Muon on all ranks, and how many of them were on experts; whether the second engine
        does one more step alike; whether it takes over the average of the first case, of another layout.
    """
    calls: list[int] = []
    original_muon.muon_update = counted(MUON_UPDATE, calls)
    micro, accumulation = check_layout(config, model_config, world_size())
    resolved = load_ds_config(ds_config, config, micro, accumulation)
    engine = Engine(config, model_config, copy.deepcopy(resolved))
    train(engine, config, model_config, range(STEPS))
    total, result = all_reduce_sum(torch.tensor([len(calls), calls.count(3)])), snapshot(engine)
    state = TrainingState(
        step=STEPS,
        model=model_config.to_dict(),
        data_fingerprint="",
        seed=config.seed,
        global_batch_size=ROWS,
        world_size=world_size(),
        ep_size=config.ep_size,
        zero_stage=resolved["zero_optimization"]["stage"],
        optimizer="muon",
    )
    saver = Saver(engine, checkpoint.parents[1], keep_last=2, keep_every=0, rank=rank())
    saver.save(state)
    saver.wait()
    train(engine, config, model_config, range(STEPS, STEPS + 1))
    resumed = Engine(config, model_config, copy.deepcopy(resolved))
    resumed.load(checkpoint)
    as_saved = same(snapshot(resumed), result)
    train(resumed, config, model_config, range(STEPS, STEPS + 1))
    alike = as_saved and same(snapshot(resumed), snapshot(engine))
    resumed.load_average(first)
    names = [n for n, _ in engine.model.named_parameters()]
    stored = {n: load_file(first / EMA / f"{n}.safetensors")[n] for n in names}
    taken = same({n: v.clone() for n, v in resumed.averaged_weights() if n in stored}, stored)
    return result, total, alike, taken


def distance(one: dict[str, Tensor], other: dict[str, Tensor], names: list[str]) -> float:
    return sum((one[n] - other[n]).square().sum().item() for n in names) ** 0.5


def counted(function: Callable[..., Tensor], calls: list[int]) -> Callable[..., Tensor]:
    def call(grad: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(grad.dim())
        return function(grad, *args, **kwargs)

    return call


def main() -> None:
    init_process_group()
    first = Path(sys.argv[-1]) / "0/checkpoints/step-3"
    for number, (name, case) in enumerate(CASES.items()):
        precision = case.get("iterate_in", torch.float32)
        original_muon.ns_compute_dtype = lambda method, precision=precision: precision
        config = RunConfig(
            ep_size=min(case["ep_size"], world_size()),
            global_batch_size=ROWS,
            micro_batch_size=case["micro"],
            optimizer=OptimizerConfig(
                kind="muon", lr=LR, muon_lr=MUON_LR, weight_decay=DECAY, clip=0.0, ema_decay=AVERAGE
            ),
        )
        model_config = ModelConfig(
            vocab_size=97,
            hidden_size=48,
            num_hidden_layers=2,
            intermediate_size=64,
            moe_intermediate_size=24,
            n_routed_experts=4,
            num_experts_per_tok=2,
            num_nextn_predict_layers=1,
            embedding_mixing=3,
            recurrence=RecurrenceConfig("block", [[1, 1]], 2, injection="gate", iteration_embedding=True),
        )
        ds_config, checkpoint = (
            f"{sys.argv[-2]}/{case['ds']}.json",
            first.parents[2] / f"{number}/checkpoints/step-3",
        )
        ours, calls, alike, taken = distributed(config, model_config, ds_config, checkpoint, first)
        plain = reference(config, model_config, precision)
        if rank() == 0:
            initial = dict(ZeroModel(model_config, seed=config.seed).named_parameters())
            hidden = [n for n in initial if HIDDEN.search(n)]
            assert set(ours) == set(plain)
            apart = {n: (v - plain[n]).abs().max().item() for n, v in ours.items()}
            report = {
                "case": name,
                "iterated_in": str(precision),
                "ep_size": config.ep_size,
                "calls": calls.tolist(),
                "resumed_alike": alike,
                "average_taken": taken,
                "hidden": [len(hidden), sum(initial[n].dim() == 3 for n in hidden)],
                "moved": min((initial[n] - plain[n]).abs().max().item() for n in hidden),
                "muon": max(apart[n] for n in hidden),
                "muon_relative": distance(ours, plain, hidden) / distance(initial, plain, hidden),
                "adamw": max(apart[n] for n in initial if n not in hidden),
                "average": max(apart[f"average of {n}"] for n in initial),
                "average_lags": max(
                    (plain[f"average of {n}"] - plain[n]).abs().max().item() for n in initial
                ),
            }
            print("REPORT " + json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
