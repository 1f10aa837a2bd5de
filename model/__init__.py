"""The network, on torch and safetensors alone."""

from model.attention import MultiHeadLatentAttention
from model.config.model import ModelConfig, RecurrenceConfig
from model.interface import ModelOutput
from model.pretrained import load_pretrained
from model.recurrence import LatentReasoningUnit
from model.transformer import ZeroModel

__all__ = [
    "LatentReasoningUnit",
    "ModelConfig",
    "ModelOutput",
    "MultiHeadLatentAttention",
    "RecurrenceConfig",
    "ZeroModel",
    "load_pretrained",
]
