"""The learning-rate schedule, and which optimizer and which weight decay each parameter gets."""

import math
from typing import Any

import torch
from torch import nn

from model.causal_mixing import CausalMixing
from model.lm_head import LMHead
from model.moe import Router
from pretrain.config import OptimizerConfig
from pretrain.init import Start

# Muon is for matrices that map hidden states to hidden states; its author leaves embeddings, the head and
# vectors to AdamW, and Moonlight (arXiv 2502.16982) the router too. A depthwise convolution's kernel is one
# vector per tap.
_NOT_FOR_MUON = (nn.Embedding, LMHead, Router, CausalMixing)
MUON_MOMENTUM = 0.95  # Nesterov; the reference implementation's (Jordan et al. 2024)


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0).

    A linear warm-up, then: constant; cosine down to min_lr (SGDR, arXiv 1608.03983); or wsd, constant
    (MiniCPM, arXiv 2404.06395, section 4) until the last wsd_decay_steps, where it falls to min_lr as
    1 - sqrt(progress), which did better than linear and cosine (Hägele et al., arXiv 2405.18392, section 3).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    end = max(config.decay_steps or max_steps, config.warmup_steps + 1)
    start = config.warmup_steps if config.schedule == "cosine" else end - config.decay_length(max_steps)
    progress = min(max((step - start) / (end - start), 0.0), 1.0)
    share = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress**0.5
    return config.min_lr + (config.lr - config.min_lr) * share


def parameter_groups(
    model: nn.Module, config: OptimizerConfig, start: Start | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for torch.optim; every parameter that is not frozen is in one.

    Weight decay acts on everything with two or more axes except embeddings (learned input vectors: tokens,
    pause tokens, initial memory); norms, biases and scales of iteration embeddings are vectors. So it acts
    on the head, the router, halting heads and convolution kernels, as in Megatron-LM and Mamba.

    With Muon the hidden matrices, (..., out, in), have a group of their own; experts are batches of matrices.
    A matrix with one row or column, such as a halting head's, counts as a vector. Every parameter is marked
    with `use_muon`, which DeepSpeed reads.

    Parameters of given weights have groups of their own, NAME_old, if their learning rate is not that of new
    ones; `lr_scale` is the ratio.
    """
    scale = 1.0 if start is None else start.old_lr_scale
    new = {id(p) for name, p in model.named_parameters() if start is None or name in start.missing}
    owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    groups: dict[str, list[nn.Parameter]] = {"muon": [], "decay": [], "no_decay": []}
    for parameter in (p for p in model.parameters() if p.requires_grad):
        owner = owners[id(parameter)]
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 holds shards of it
        matrix = len(shape) >= 2 and not isinstance(owner, nn.Embedding)
        hidden = matrix and min(shape[-2:]) > 1 and not isinstance(owner, _NOT_FOR_MUON)
        muon = config.kind == "muon" and hidden
        groups["muon" if muon else "decay" if matrix else "no_decay"].append(parameter)
        if config.kind == "muon":
            parameter.use_muon = muon  # type: ignore[attr-defined]
    adamw = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    # The published iteration in bf16; DeepSpeed's default, "gram", is the same polynomial in fp16.
    muon_options = {"lr": config.muon_lr, "momentum": MUON_MOMENTUM, "ns_method": "standard"}
    options: dict[str, dict[str, Any]] = {
        name: {
            "name": name,
            "weight_decay": 0.0 if name == "no_decay" else config.weight_decay,
            **(muon_options if name == "muon" else adamw),
            **({"use_muon": name == "muon"} if config.kind == "muon" else {}),
        }
        for name in groups
    }
    if scale == 1:
        return [{**options[name], "params": held} for name, held in groups.items() if held]
    split = []
    for name, held in groups.items():
        parts = [p for p in held if id(p) in new], [p for p in held if id(p) not in new]
        old = {"name": f"{name}_old", "lr": options[name]["lr"] * scale, "lr_scale": scale}
        split += [{**options[name], "params": parts[0]}, {**options[name], **old, "params": parts[1]}]
    return [group for group in split if group["params"]]


def choose_adamw_kernel(optimizer: torch.optim.Optimizer, device: str) -> None:
    """Fused AdamW on a GPU, one launch per group; on a CPU it rounds otherwise than torch's plain one.

    Also after loading: a checkpoint holds the choice of the machine that wrote it. Fused, the count of steps
    lies beside the weights, else on the CPU.

    Args:
        optimizer: torch's AdamW, or DeepSpeed's Muon around it, as ZeRO holds it.
        device: "cpu" or "cuda", where training runs.
    """
    fused = device != "cpu"
    for group in optimizer.param_groups:
        if "fused" in group:
            group["fused"] = fused or None
    for parameter, state in optimizer.state.items():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].to(parameter.device if fused else "cpu")
