"""Run by test_run.py under the deepspeed launcher: two ranks and plain torch train students.

Prints one JSON line per case, with the largest differences over the steps.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from traces import IDS, VOCABULARY, documents, packed

from distill.main import NEW
from distill.methods import with_method
from distill.student import Student
from model import ModelConfig
from model.export_files import save_weights
from model.latent_cot.targets import loss_counts
from model.losses import total_loss
from pretrain.config import InitConfig, LoraConfig, RunConfig, check_layout
from pretrain.ds_config import load_ds_config
from pretrain.engine import Engine
from pretrain.init import find, fit
from pretrain.lora import adapt
from pretrain.process_group import all_reduce_sum, init_process_group, rank, world_size
from pretrain.zero_optimizer import build_optimizer

CLIP, LR, ROWS, STEPS = 0.3, 1e-3, 4, 3
GPT2: dict[str, Any] = {
    "norm": "layer_norm",
    "hidden_act": "gelu",
    "use_bias": True,
    "position_embedding": "learned",
    "tie_word_embeddings": True,
}
EXPERTS = {"use_moe": True, "n_routed_experts": 4, "moe_intermediate_size": 16}
METHODS: dict[str, dict[str, Any]] = {
    "kava": {"use_mla": True},
    "coconut": {"distillation": {"stage_steps": 1}},
    "lotus": {"distillation": {"latent_block": 2}, **GPT2},
    "kava, experts on both ranks": {
        "distillation": {"use_projection": True, "use_layernorm": True, "prj_dim": 16},
        **EXPERTS,
    },
    "kava, lora": {"use_mla": True, "distillation": {"use_projection": True}},
    "codi, lora": EXPERTS,
}
LORA = LoraConfig(r=4, alpha=8, dropout=0.0)


def batch(step: int) -> dict[str, Tensor]:
    """Rows with different numbers of documents; one micro-batch of the first rank has none."""
    d = documents(6, seed=step)
    return packed([d[:2], [], d[2:5], d[5:]], 160)


def model_config(method: str, changes: dict[str, Any]) -> ModelConfig:
    distillation = {"method": method.split(",")[0], **IDS, **changes.get("distillation", {})}
    sizes = dict(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, intermediate_size=48, use_moe=False
    )
    values = {**sizes, "initializer_range": 0.1, "use_mla": False, **changes}
    return ModelConfig.from_dict(
        with_method({**values, "latent_cot": {"num_latents": 4}, "distillation": distillation})
    )


def lora(method: str) -> LoraConfig | None:
    return LORA if "lora" in method else None


def weights_to_start_from(config: ModelConfig) -> dict[str, Tensor]:
    """Weights of another seed, without the new parameters."""
    state = Student(config, seed=5).state_dict()
    return {name: value for name, value in state.items() if not name.startswith(NEW)}


def reference(
    config: ModelConfig, lora: LoraConfig | None
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Plain torch, in this process, on whole batches."""
    model = Student(config, seed=0).train()
    model.load_state_dict(weights_to_start_from(config), strict=False)
    if lora is not None:
        adapt(model, lora, 0, [name for name, _ in model.named_parameters() if name.startswith(NEW)])
    optimizer = build_optimizer(model, RunConfig().optimizer)
    for group in optimizer.param_groups:
        group["lr"] = LR
    history = []
    for step in range(STEPS):
        model.training_step = step
        loss = model(**batch(step)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        history.append({"loss": loss.item(), "norm": norm.item()})
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return history, {name: value for name, value in model.state_dict().items() if name not in frozen}


def distributed(
    config: ModelConfig, lora: LoraConfig | None
) -> tuple[list[dict[str, float]], dict[str, Tensor], int]:
    """Also the steps in the spike guard's history."""
    ep_size = world_size() if config.has_experts and lora is None else 1
    run = RunConfig(global_batch_size=ROWS, micro_batch_size=1, ep_size=ep_size, lora=lora)
    run.optimizer.clip = CLIP
    micro, accumulation = check_layout(run, config, world_size())
    ds_config = load_ds_config(sys.argv[-1], run, micro, accumulation)
    with tempfile.TemporaryDirectory() as folder:
        save_weights(Path(folder), config, weights_to_start_from(config))
        start = fit(*find(Path(folder), Path(folder)), config, InitConfig(), ep_size, Student, NEW)
        engine = Engine(run, config, ds_config, Student, start)
    history = []
    for step in range(STEPS):
        inputs, total = batch(step), torch.zeros((), dtype=torch.float64)
        parts = (inputs[name] for name in ("tokens", "targets", "cu_seqlens"))
        counts = {**loss_counts(config, step, *parts), "rows": ROWS}
        engine.train(step)
        own = ROWS // world_size()
        for row in range(rank() * own, (rank() + 1) * own):
            output = engine.forward(**{name: value[row : row + 1] for name, value in inputs.items()})
            loss = total_loss(config, output.loss_sums, counts)
            total += loss.detach().double()
            engine.backward(loss)
            engine.step(LR)
        history.append({"loss": all_reduce_sum(total).item(), "norm": engine.grad_norm().item()})
    weights = dict(engine.full_weights())
    start = weights_to_start_from(config)
    for name, parameter in engine.model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, start[name.replace("base_layer.", "")]), name
    remembered = int(engine.guard.history[0].isfinite().sum())
    engine.deepspeed.destroy()
    return history, weights, remembered


def main() -> None:
    init_process_group()
    for method, changes in METHODS.items():
        config = model_config(method, changes)
        adapters = lora(method)
        ours, weights, remembered = distributed(config, adapters)
        plain, expected = reference(config, adapters)
        if rank() == 0:
            assert set(weights) == set(expected)
            report = {
                "method": method,
                "remembered": remembered,
                "loss": max(abs(a["loss"] - b["loss"]) for a, b in zip(ours, plain, strict=True)),
                "norm": max(abs(a["norm"] - b["norm"]) for a, b in zip(ours, plain, strict=True)),
                "smallest_norm": min(b["norm"] for b in plain),
                "weights": max((weights[n] - expected[n]).abs().max().item() for n in expected),
            }
            print("REPORT " + json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
