"""Run by test_equality under the deepspeed launcher: two ranks and plain torch train.

    equality_worker.py DS_CONFIG eager|compiled

Prints one JSON line per case of that kind, with the largest differences over the steps.
"""

import copy
import dataclasses
import json
import sys
from unittest.mock import patch

import torch

from model import ModelConfig, RecurrenceConfig, ZeroModel
from model.config.execution import ExecutionConfig
from model.config.recurrence import DepthPoint, HaltingConfig
from model.losses import IGNORE_INDEX, total_loss
from pretrain.config import RunConfig, check_layout
from pretrain.depths import StepDepths, step_depths
from pretrain.ds_config import load_ds_config
from pretrain.engine import Engine
from pretrain.process_group import all_reduce_sum, init_process_group, rank, world_size
from pretrain.trainer import update_router_biases
from pretrain.zero_optimizer import build_optimizer

CLIP, LR, ROWS, STEPS, T = 0.3, 1e-3, 8, 5, 21
LOOP = RecurrenceConfig(placement="block", ranges=[[1, 1]], num_steps=2)
NONE = RecurrenceConfig()
HALTING = HaltingConfig(
    kind="ponder", threshold=0.3, ponder_weight=0.1, sparsity_weight=0.1, information_weight=0.1
)
CASES = {
    "expert parallel": {"ep_size": 2, "micro": 4},
    "experts that no token chooses": {
        "ep_size": 2,
        "micro": 4,
        "starve": True,
        "as_on_gpu": True,
        "model": {"hidden_act": "relu2", "rms_norm_affine": False},
    },
    "compiled": {"ep_size": 2, "micro": 4, "execution": {"compile": True}},
    "multi-token prediction and z-loss": {
        "ep_size": 2,
        "micro": 2,
        "model": {"num_nextn_predict_layers": 2, "router_z_loss_weight": 0.01},
    },
    "plain attention": {"ep_size": 2, "micro": 4, "model": {"use_mla": False, "num_key_value_heads": 2}},
    "expected loss, steps recomputed": {
        "ep_size": 2,
        "micro": 2,
        "execution": {"checkpointing": "iteration"},
        "model": {"recurrence": RecurrenceConfig("block", [[1, 1]], 2, halting=HALTING)},
    },
    "expected state of two loops over merged keys": {
        "ep_size": 2,
        "micro": 4,
        "model": {
            "qk_norm": True,
            "recurrence": RecurrenceConfig(
                "block",
                [[0, 0], [2, 2]],
                2,
                cache="ema",
                sandwich_norm=True,
                injection="gate",
                iteration_embedding=True,
                halting=dataclasses.replace(HALTING, kind="act", expectation="state", granularity="mixed"),
            ),
        },
    },
    "truncated back-propagation": {
        "ep_size": 2,
        "micro": 4,
        "model": {
            "recurrence": RecurrenceConfig("block", [[1, 1]], 2, backprop_steps=1),
            "embedding_mixing": 3,
        },
    },
    "rows of different depths, deeper with every step, and the first step of a retrofitted loop": {
        "ep_size": 2,
        "micro": 2,
        "model": {
            "recurrence": RecurrenceConfig(
                "block",
                [[1, 1]],
                2,
                depth_schedule=[DepthPoint(0, 1, 1), DepthPoint(3, 4, 3)],
                depth_sampling="poisson",
                depth_per="sequence",
                update="retrofit",
                iteration_embedding=True,
                halting=HaltingConfig(sparsity_weight=0.1, information_weight=0.1),
            ),
            "router_z_loss_weight": 0.01,
        },
    },
    "tied embeddings and what else GPT-2 has": {
        "ep_size": 1,
        "micro": 4,
        "model": {
            "recurrence": NONE,
            "use_mla": False,
            "use_moe": False,
            "norm": "layer_norm",
            "hidden_act": "gelu",
            "use_bias": True,
            "position_embedding": "learned",
            "tie_word_embeddings": True,
        },
    },
    "pause tokens": {"ep_size": 2, "micro": 4, "model": {"recurrence": NONE, "num_pause_tokens": 1}},
    "recurrent memory": {
        "ep_size": 1,
        "micro": 4,
        "model": {
            "recurrence": NONE,
            "use_moe": False,
            "num_memory_tokens": 2,
            "segment_length": 8,
        },
    },
    "refined latents": {
        "ep_size": 2,
        "micro": 2,
        "as_on_gpu": True,
        "execution": {"checkpointing": "block", "experts": "padded"},
        "model": {
            "recurrence": RecurrenceConfig(
                "kv", num_steps=2, position_mixing=3, query_conditioned=True, halting=HALTING
            )
        },
    },
}


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets of one global batch; ranks hold different numbers of targets, some rows none."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 97, (ROWS, T), generator=generator)
    targets = tokens.roll(-1, 1).clone()
    targets[:, -1] = IGNORE_INDEX
    targets[ROWS // 2 :, 4 + step :] = IGNORE_INDEX
    targets[-1] = IGNORE_INDEX
    return tokens, targets


def depths_at(config: ModelConfig, step: int, ranks: int) -> StepDepths:
    if config.recurrence.depth_per == "sequence":
        return step_depths(config, 0, step, ranks, ROWS)
    return StepDepths(torch.full((ranks, ROWS // ranks), 1 + step % 3), per_row=False)


def learn(model: ZeroModel, step: int) -> float:
    """Backward of a whole batch, or of each row alone where they have their own depths; the loss."""
    tokens, targets = batch(step)
    model.training_step, depths = step, depths_at(model.config, step, 1)
    if not depths.per_row:
        output = model(tokens, targets=targets, num_steps=depths.deepest)
        output.loss.backward()
        return output.loss.item()
    counts, total = {"targets": int((targets != IGNORE_INDEX).sum()), "rows": ROWS}, 0.0
    for row, depth in enumerate(depths.rows[0].tolist()):
        output = model(tokens[row : row + 1], targets=targets[row : row + 1], num_steps=depth)
        loss = total_loss(model.config, output.loss_sums, counts)
        loss.backward()
        total += loss.item()
    return total


def starve(model: ZeroModel) -> None:
    """A balancing bias that sends every token to the first rank's experts."""
    for layer in model.moe_layers():
        layer.gate.e_score_correction_bias.copy_(torch.tensor([5.0, 5.0, -5.0, -5.0]))


def reference(config: RunConfig, model_config: ModelConfig, starved: bool) -> list[dict]:
    """The same training in plain torch, in this process, on whole batches."""
    model = ZeroModel(model_config, seed=config.seed).train()
    if starved:
        starve(model)
    optimizer = build_optimizer(model, config.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = LR
    history = []
    for step in range(STEPS):
        loss = learn(model, step)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        loads = [layer.load.clone() for layer in model.moe_layers()]
        for layer, load in zip(model.moe_layers(), loads, strict=True):
            layer.update_bias(load)
            layer.load.zero_()
        history.append({"loss": loss, "norm": norm.item(), "loads": loads})
    history[-1]["weights"] = copy.deepcopy(model.state_dict())
    return history


def distributed(config: RunConfig, model_config: ModelConfig, starved: bool) -> list[dict]:
    micro, accumulation = check_layout(config, model_config, world_size())
    ds_config = load_ds_config(sys.argv[-2], config, micro, accumulation)
    engine = Engine(config, model_config, ds_config)
    if starved:
        starve(engine.model)
    history = []
    for step in range(STEPS):
        tokens, targets = batch(step)
        counts = {"targets": int((targets != IGNORE_INDEX).sum()), "rows": ROWS}
        total = torch.zeros((), dtype=torch.float64)
        engine.train(step)
        depths = depths_at(model_config, step, world_size())
        mine = slice(rank() * ROWS // world_size(), (rank() + 1) * ROWS // world_size())
        parts = zip(tokens[mine].split(micro), targets[mine].split(micro), strict=True)
        for number, (part_tokens, part_targets) in enumerate(parts):
            rows = slice(number * micro, (number + 1) * micro)
            loop = {"depths": depths.rows[rank(), rows]} if depths.per_row else {}
            passes = depths.passes(rows)
            output = engine.forward(tokens=part_tokens, targets=part_targets, num_steps=passes, **loop)
            loss = total_loss(model_config, output.loss_sums, counts)
            total += loss.detach().double()
            engine.backward(loss)
            engine.step(LR)
        loads = update_router_biases(engine)
        norm = engine.grad_norm().item()
        history.append(
            {"loss": all_reduce_sum(total).item(), "norm": norm, "loads": [] if loads is None else loads}
        )
    history[-1]["weights"] = dict(engine.full_weights())
    biases = torch.cat([torch.zeros(1), *engine.buffers().values()])
    history[-1]["skipped"] = skipped_step(engine, tokens[mine][:micro], targets[mine][:micro])
    history[-1]["bias_spread"] = (all_reduce_sum(biases.clone()) - world_size() * biases).abs().max().item()
    return history


def skipped_step(engine: Engine, tokens: torch.Tensor, targets: torch.Tensor) -> bool:
    """Whether steps with gradients that are not finite, and spikes, change neither weights nor biases."""
    before = {name: value.clone() for name, value in engine.full_weights()}
    cleared, applied = True, False
    engine.guard.history.copy_(torch.rand(engine.guard.history.shape))
    for factor, loss in ((float("nan"), 1.0), (1.0, 1e6)):
        for _ in range(engine.deepspeed.gradient_accumulation_steps()):
            output = engine.forward(tokens=tokens, targets=targets)
            engine.backward(output.loss * factor)
            engine.step(LR, torch.tensor(loss))
        update_router_biases(engine)
        cleared = cleared and all(int(layer.load.sum()) == 0 for layer in engine.model.moe_layers())
        applied = applied or engine.step_applied()
    unchanged = all(torch.equal(before[name], value) for name, value in engine.full_weights())
    return unchanged and cleared and not applied


def main() -> None:
    init_process_group()
    for name, case in CASES.items():
        if (name == "compiled") != (sys.argv[-1] == "compiled"):
            continue
        config = RunConfig(
            ep_size=case["ep_size"],
            global_batch_size=ROWS,
            micro_batch_size=case["micro"],
            execution=ExecutionConfig(**case.get("execution", {})),
        )
        config.optimizer.clip = CLIP
        model_config = ModelConfig(
            vocab_size=97,
            hidden_size=48,
            num_hidden_layers=3,
            intermediate_size=64,
            moe_intermediate_size=24,
            n_routed_experts=4,
            num_experts_per_tok=2,
            balance_loss_weight=0.01,
            initializer_range=0.1,
            **{"recurrence": LOOP, **case.get("model", {})},
        )
        starved = case.get("starve", False)
        folds = case.get("as_on_gpu", False)
        with patch("model.moe.folds_weights", lambda x, folds=folds: folds):
            ours = distributed(config, model_config, starved)
        plain = reference(config, model_config, starved)
        if rank() == 0:
            weights, expected = ours[-1]["weights"], plain[-1]["weights"]
            assert set(weights) == set(expected)
            initial = ZeroModel(model_config, seed=config.seed).state_dict()
            report = {
                "case": name,
                "loss": max(abs(a["loss"] - b["loss"]) for a, b in zip(ours, plain, strict=True)),
                "norm": max(abs(a["norm"] - b["norm"]) for a, b in zip(ours, plain, strict=True)),
                "smallest_norm": min(b["norm"] for b in plain),
                "moved": max((expected[n] - v).abs().max().item() for n, v in initial.items()),
                "weights": max((weights[n] - expected[n]).abs().max().item() for n in expected),
                "loads_equal": all(
                    torch.equal(x, y)
                    for a, b in zip(ours, plain, strict=True)
                    for x, y in zip(a["loads"], b["loads"], strict=True)
                ),
                "idle_experts": sum(int((load == 0).sum()) for load in plain[0]["loads"]),
                "bias_spread": ours[-1]["bias_spread"],
                "skipped": ours[-1]["skipped"],
            }
            print("REPORT " + json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
