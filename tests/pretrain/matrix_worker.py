"""Run by test_matrix under the deepspeed launcher: layouts and plain torch train on the same batches.

    matrix_worker.py CASES.json

Prints one JSON line per case, with the largest differences over the steps.
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from model import ModelConfig, RecurrenceConfig, ZeroModel
from model.config.execution import ExecutionConfig
from model.losses import IGNORE_INDEX, total_loss
from model.recurrence import sample_depth
from pretrain.config import RunConfig, check_layout
from pretrain.ds_config import load_ds_config
from pretrain.engine import Engine, build_optimizer
from pretrain.expert_parallel import gather_experts, is_expert
from pretrain.process_group import all_reduce_sum, init_process_group, rank, world_size
from pretrain.trainer import update_router_biases

LR, ROWS, STEPS, T = 1e-3, 16, 2, 13
DS_CONFIGS = {1: "ds_configs/zero1.json", 2: "ds_configs/zero2.json", 3: "ds_configs/zero3_ep.json"}
LOOPS = {
    "none": RecurrenceConfig(),
    "fixed": RecurrenceConfig("block", [[1, 1]], 2),
    "random": RecurrenceConfig("block", [[1, 1]], 2, depth_sampling="poisson", max_steps=4),
}


def batch(step: int) -> tuple[Tensor, Tensor]:
    """One global batch; ranks and micro-batches hold different numbers of targets, some rows none."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 61, (ROWS, T), generator=generator)
    targets = tokens.roll(-1, 1).clone()
    targets[:, -1] = IGNORE_INDEX
    targets[ROWS // 2 :, 3 + step :] = IGNORE_INDEX
    targets[-1] = IGNORE_INDEX
    return tokens, targets


def configs(case: dict[str, Any]) -> tuple[RunConfig, ModelConfig]:
    run = RunConfig(
        ep_size=case["ep_size"],
        global_batch_size=ROWS,
        micro_batch_size=ROWS // world_size() // case["accumulation"],
        execution=ExecutionConfig(
            checkpointing=case["checkpointing"], precision=case.get("precision", "auto")
        ),
    )
    run.optimizer.clip = case["clip"]
    model = ModelConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        balance_loss_weight=0.01,
        initializer_range=0.1,
        recurrence=LOOPS[case["loop"]],
    )
    return run, model


def plain(run: RunConfig, config: ModelConfig) -> list[dict[str, Any]]:
    execution = ExecutionConfig(precision=run.execution.precision)
    model = ZeroModel(config, seed=run.seed, execution=execution).train()
    optimizer = build_optimizer(model, run.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = LR
    history = []
    for step in range(STEPS):
        tokens, targets = batch(step)
        output = model(tokens, targets=targets, num_steps=sample_depth(config, run.seed, step))
        output.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        limit = run.optimizer.clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
        optimizer.zero_grad()
        for layer in model.moe_layers():
            layer.update_bias(layer.load)
            layer.load.zero_()
        history.append({"loss": output.loss.item(), "norm": norm.item(), "gradients": gradients})
    history[-1]["weights"] = model.state_dict()
    return history


def distributed(
    run: RunConfig, config: ModelConfig, case: dict[str, Any]
) -> tuple[list[dict[str, Any]], float]:
    """Results of each step, and how much router biases differ between ranks at the end."""
    micro, accumulation = check_layout(run, config, world_size())
    ds_config = load_ds_config(DS_CONFIGS[case["stage"]], run, micro, accumulation)
    ds_config["bf16"]["enabled"] = case.get("bf16", False)
    engine = Engine(run, config, ds_config)
    history: list[dict[str, Any]] = []
    for step in range(STEPS):
        tokens, targets = batch(step)
        counts = {"targets": int((targets != IGNORE_INDEX).sum()), "rows": ROWS}
        total = torch.zeros((), dtype=torch.float64)
        engine.train()
        mine = slice(rank() * ROWS // world_size(), (rank() + 1) * ROWS // world_size())
        parts = list(zip(tokens[mine].split(micro), targets[mine].split(micro), strict=True))
        gradients: dict[str, Tensor] = {}
        for number, (part_tokens, part_targets) in enumerate(parts, start=1):
            depth = sample_depth(config, run.seed, step)
            output = engine.forward(tokens=part_tokens, targets=part_targets, num_steps=depth)
            loss = total_loss(config, output.loss_sums, counts)
            total += loss.detach().double()
            engine.backward(loss)
            if number == len(parts):
                gradients = full_gradients(engine, run.ep_size)
            engine.step(LR)
        update_router_biases(engine)
        loss, norm = all_reduce_sum(total).item(), engine.grad_norm().item()
        history.append({"loss": loss, "norm": norm, "gradients": gradients})
    biases = torch.cat([torch.zeros(1), *engine.buffers().values()])
    spread = (all_reduce_sum(biases.clone()) - world_size() * biases).abs().max().item()
    history[-1]["weights"] = dict(engine.full_weights())
    engine.deepspeed.destroy()
    return history, spread


def full_gradients(engine: Engine, ep_size: int) -> dict[str, Tensor]:
    """Gradients by name, before clipping, experts of all ranks concatenated."""
    gradients = {}
    for name, parameter in engine.model.named_parameters():
        gradient = safe_get_full_grad(parameter)
        if gradient is not None:
            gradient = gradient.view(getattr(parameter, "ds_shape", parameter.shape)).float()
            gradients[name] = gather_experts(gradient, ep_size) if is_expert(parameter) else gradient
    return gradients


def refusal(run: RunConfig, config: ModelConfig) -> str:
    """What the engine says to a run in fp32 on a GPU."""
    with patch("pretrain.engine.device", lambda: torch.device("cuda")):
        try:
            Engine(run, config, {})
        except ValueError as error:
            return str(error)
    return ""


def compare(ours: list[dict[str, Any]], expected: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest differences over the steps."""
    report: dict[str, Any] = dict.fromkeys(("loss", "norm", "gradient", "gradient_relative"), 0.0)
    report["missing"], report["smallest_norm"] = [], float("inf")
    report["first_loss"] = abs(ours[0]["loss"] - expected[0]["loss"])
    for a, b in zip(ours, expected, strict=True):
        report["loss"] = max(report["loss"], abs(a["loss"] - b["loss"]))
        report["norm"] = max(report["norm"], abs(a["norm"] - b["norm"]))
        report["smallest_norm"] = min(report["smallest_norm"], b["norm"])
        report["missing"] += sorted(b["gradients"].keys() - a["gradients"].keys())
        names = b["gradients"].keys() & a["gradients"].keys()
        apart = {name: a["gradients"][name] - b["gradients"][name] for name in names}
        report["gradient"] = max(report["gradient"], *(d.abs().max().item() for d in apart.values()))
        share = sum(d.square().sum().item() for d in apart.values()) ** 0.5 / b["norm"]
        report["gradient_relative"] = max(report["gradient_relative"], share)
    weights, others = ours[-1]["weights"], expected[-1]["weights"]
    report["weights"] = max((weights[n] - others[n]).abs().max().item() for n in others)
    rounded = {name: value.bfloat16().float() for name, value in weights.items()}
    report["beyond_bf16"] = sum(not torch.equal(rounded[n], value) for n, value in weights.items())
    return report


def main() -> None:
    cases = json.loads(Path(sys.argv[-1]).read_text())
    init_process_group()
    for case in cases:
        run, config = configs(case)
        ours, spread = distributed(run, config, case)
        if rank() == 0:
            report = compare(ours, plain(run, config)) | {"case": case, "bias_spread": spread}
            if "precision" in case:
                report["refusal"] = refusal(run, config)
            print("REPORT " + json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
