"""Initial weights: a function of (seed, parameter name, global expert number) alone."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from .layers import Linear, RMSNorm
from .moe import Experts
from .recurrence import CausalMixing, IterationEmbedding


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Normal weights of the config's standard deviation, each from a stream named after the parameter."""
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}"
            if isinstance(module, Experts):
                for row, expert in zip(parameter, module.expert_ids, strict=True):
                    _fill(row, model, f"{seed}:{full_name}:{expert}")
            elif isinstance(module, Linear) and name == "bias":
                parameter.fill_(module.initial_bias)
            elif (
                isinstance(module, Linear)
                and module.zero
                or isinstance(module, IterationEmbedding | CausalMixing)
            ):
                parameter.zero_()
            elif isinstance(module, RMSNorm):
                parameter.fill_(1.0)
            else:
                _fill(parameter, model, f"{seed}:{full_name}")


def _fill(parameter: Tensor, model: Any, stream: str) -> None:
    seed = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(parameter.shape, generator=generator) * model.config.initializer_range
    parameter.copy_(values)
