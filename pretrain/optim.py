"""The learning-rate schedule, and which optimizer and which weight decay each parameter gets."""

import math
from typing import Any

from torch import nn

from model.causal_mixing import CausalMixing
from model.lm_head import LMHead
from model.moe import Router
from pretrain.config import OptimizerConfig

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


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameter groups for torch.optim; every parameter that is not frozen is in one.

    Weight decay acts on everything with two or more axes except embeddings (learned input vectors: tokens,
    pause tokens, initial memory); norms, biases and scales of iteration embeddings are vectors. So it acts
    on the head, the router, halting heads and convolution kernels, as in Megatron-LM and Mamba.

    With Muon the hidden matrices, (..., out, in), have a group of their own; experts are batches of matrices.
    A matrix with one row or column, such as a halting head's, counts as a vector. Every parameter is marked
    with `use_muon`, which DeepSpeed reads.
    """
    owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    groups: dict[str, list[nn.Parameter]] = {"muon": [], "decay": [], "no_decay": []}
    for parameter in (p for p in model.parameters() if p.requires_grad):
        owner = owners[id(parameter)]
        matrix = parameter.dim() >= 2 and not isinstance(owner, nn.Embedding)
        hidden = matrix and min(parameter.shape[-2:]) > 1 and not isinstance(owner, _NOT_FOR_MUON)
        muon = config.kind == "muon" and hidden
        groups["muon" if muon else "decay" if matrix else "no_decay"].append(parameter)
        if config.kind == "muon":
            parameter.use_muon = muon  # type: ignore[attr-defined]
    adamw = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    # The published iteration in bf16; DeepSpeed's default, "gram", is the same polynomial in fp16.
    muon_options = {"lr": config.muon_lr, "momentum": MUON_MOMENTUM, "ns_method": "standard"}
    return [
        {
            "name": name,
            "params": parameters,
            "weight_decay": 0.0 if name == "no_decay" else config.weight_decay,
            **(muon_options if name == "muon" else adamw),
            **({"use_muon": name == "muon"} if config.kind == "muon" else {}),
        }
        for name, parameters in groups.items()
        if parameters
    ]
