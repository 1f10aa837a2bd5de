"""The network. Imports torch and safetensors, nothing else."""

from .config import ModelConfig, RecurrenceConfig
from .pretrained import load_pretrained
from .transformer import ModelOutput, ZeroModel

__all__ = ["ModelConfig", "ModelOutput", "RecurrenceConfig", "ZeroModel", "load_pretrained"]
