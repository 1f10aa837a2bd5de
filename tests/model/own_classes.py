"""The exported class around a model of ours, without a folder in between."""

from typing import Any

import torch
from torch import Tensor

from model import ZeroModel
from model.hf.remote.configuration_zeromodel import ZeroModelConfig
from model.hf.remote.modeling_zeromodel import ZeroModelForCausalLM

LEFT = torch.tensor([0, 3, 6])  # padded tokens of each row


def wrapped(model: ZeroModel, **ids: Any) -> ZeroModelForCausalLM:
    """The class with a model's weights, in eval mode."""
    made = ZeroModelForCausalLM(ZeroModelConfig(zeromodel=model.config.to_dict(), **ids))
    made.network.load_state_dict(model.state_dict())
    return made.to(model.lm_head.weight.dtype if not model.lm_head.tied else torch.float32).eval()


def left_mask(tokens: Tensor) -> Tensor:
    """(3, T), with other padding on the left of each row."""
    return (torch.arange(tokens.shape[1]) >= LEFT[:, None]).long()


def assert_close(a: Tensor, b: Tensor) -> None:
    """To 1e-5 x max(1, the largest)."""
    assert a.shape == b.shape
    a, b = a.detach(), b.detach()
    assert float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))
