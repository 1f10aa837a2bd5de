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
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not given(parameter):
                fill_initial(parameter, module, path, name, model.config.initializer_range, seed)


def fill_initial(value: Tensor, module: nn.Module, path: str, name: str, std: float, seed: int) -> None:
    """Writes the initial value of one parameter of a model.

    Args:
        value: in its shape, of any floating type, wherever it is to be.
        module: its owner, of which no parameter is read.
        path: the owner's name in the model.
        name: the parameter's name in its owner.
        std: standard deviation.
    """
    stream = f"{seed}:{path}.{name}"
    if isinstance(module, Experts):
        for row, expert in zip(value, module.expert_ids, strict=True):
            _fill(row, std, f"{stream}:{expert}")
    elif isinstance(module, RetrofitInjection):
        module.start(name, value)
    elif isinstance(module, Linear) and name == "bias":
        value.fill_(module.initial_bias)
    elif isinstance(module, Linear) and module.zero or isinstance(module, IterationEmbedding):
        value.zero_()
    elif isinstance(module, nn.LayerNorm):
        value.fill_(float(name == "weight"))
    elif isinstance(module, RMSNorm):
        value.fill_(1.0)
    elif isinstance(module, CausalMixing):
        _fill(value, module.initial_std, stream)
    else:
        _fill(value, std, stream)


def _fill(value: Tensor, std: float, stream: str) -> None:
    seed = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(seed)
    if value.dtype == torch.float32 and value.device.type == "cpu" and value.is_contiguous():
        value.normal_(generator=generator).mul_(std)  # what randn gives, without its copy
    else:
        value.copy_(torch.randn(value.shape, generator=generator).mul_(std))
