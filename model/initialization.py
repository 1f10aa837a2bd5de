"""Initial weights: a function of (seed, parameter name, global expert number) alone."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model.causal_mixing import CausalMixing
from model.layers import Linear, RMSNorm
from model.moe import Experts
from model.recurrence import IterationEmbedding, RetrofitInjection


@torch.no_grad()
def initialize(model: Any, seed: int, given: Callable[[Tensor], bool] = lambda parameter: False) -> None:
    """Normal weights of the config's standard deviation, each parameter from a stream of its own.

    Args:
        given: whether a parameter already has its value, which then stays.
    """
    std = model.config.initializer_range
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if given(parameter):
                continue
            stream = f"{seed}:{module_name}.{name}"
            if isinstance(module, Experts):
                for row, expert in zip(parameter, module.expert_ids, strict=True):
                    _fill(row, std, f"{stream}:{expert}")
            elif isinstance(module, RetrofitInjection):
                module.start()
            elif isinstance(module, Linear) and name == "bias":
                parameter.fill_(module.initial_bias)
            elif isinstance(module, Linear) and module.zero or isinstance(module, IterationEmbedding):
                parameter.zero_()
            elif isinstance(module, nn.LayerNorm):
                parameter.fill_(float(name == "weight"))
            elif isinstance(module, RMSNorm):
                parameter.fill_(1.0)
            elif isinstance(module, CausalMixing):
                _fill(parameter, module.initial_std, stream)
            else:
                _fill(parameter, std, stream)


def _fill(parameter: Tensor, std: float, stream: str) -> None:
    seed = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(seed)
    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
