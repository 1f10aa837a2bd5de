"""The files of an exported checkpoint: model.safetensors and config.json."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from common.files import write_file
from model.config.model import ModelConfig

WEIGHTS_NAME, CONFIG_NAME = "model.safetensors", "config.json"
# Further files that evaluation needs; pretrain/export.py writes them.
TOKENIZER_NAME, TRAINING_DATA_NAME = "tokenizer.model", "training_data.json"


def require_finite(weights: Mapping[str, Tensor], where: object) -> None:
    """Raises ValueError, one line, for the first tensor that holds NaN or infinity.

    Args:
        where: what the tensors are, for the message.
    """
    for name, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity in {where}; use an earlier checkpoint or export")


def save_weights(directory: Path, config: ModelConfig, state: dict[str, Tensor]) -> None:
    """Writes the two files, each under a temporary name that is then renamed."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = directory / WEIGHTS_NAME
    save_file({name: t.detach().cpu().contiguous() for name, t in state.items()}, f"{weights}.tmp")
    os.replace(f"{weights}.tmp", weights)
    write_file(directory / CONFIG_NAME, (json.dumps(config.to_dict(), indent=2) + "\n").encode())


def load_config(directory: str | Path) -> ModelConfig:
    """Reads config.json.

    Raises:
        FileNotFoundError: the folder or the file is missing.
        ValueError: not a ZeroModel config.
    """
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give the export/ folder of a run as the checkpoint")
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); export the checkpoint again") from None
    if "model_type" in values:
        raise ValueError(
            f"{path} describes a Hugging Face model; convert it first: python -m model.hf import --hf "
            f"{directory} --out DIR"
        )
    return ModelConfig.from_dict(values)
