"""The network, on torch and safetensors alone."""

from model.config.model import ModelConfig, RecurrenceConfig
from model.interface import ModelOutput
from model.pretrained import load_pretrained
from model.transformer import ZeroModel

__all__ = ["ModelConfig", "ModelOutput", "RecurrenceConfig", "ZeroModel", "load_pretrained"]
