"""The files of an exported checkpoint: model.safetensors and config.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from common.files import replacing
from model.config.model import ModelConfig
from model.weight_files import all_finite, check_size, read_header, write_tensors

WEIGHTS_NAME, CONFIG_NAME = "model.safetensors", "config.json"
# Further files that evaluation needs; pretrain/export.py writes them.
TOKENIZER_NAME, TRAINING_DATA_NAME = "tokenizer.model", "training_data.json"
CONVERSIONS_NAME = "conversion.json"  # how model.convert made the folder
INIT_NAME = "init.json"  # beside a run's export/: the weights that the run began with
# How the names of parameters begin that only training needs: exports lack them.
TRAINING_ONLY = "kv_projections."
FIX = "export the checkpoint again"


def require_finite(weights: Mapping[str, Tensor], where: object) -> None:
    """Raises ValueError, one line, for the first tensor that holds NaN or infinity.

    Args:
        where: what the tensors are, for the message.
    """
    for name, value in weights.items():
        if value.is_floating_point() and not all_finite(value):
            raise ValueError(f"{name} holds NaN or infinity in {where}; use an earlier checkpoint or export")


def save_weights(directory: Path, config: ModelConfig, state: dict[str, Tensor]) -> None:
    """Writes the two files, both whole before the first replaces an older one.

    The folder has no config.json between the two, so that nothing reads new weights with an old config,
    however this ends.

    Raises:
        OSError: see common.files.replacing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / CONFIG_NAME
    # What is entered last is renamed first.
    with replacing(path) as new_config, replacing(directory / WEIGHTS_NAME) as new_weights:
        write_tensors(new_weights, state)
        new_config.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        path.unlink(missing_ok=True)


def load_config(directory: str | Path) -> ModelConfig:
    """Reads config.json and compares its sizes with the header of the weights, if they are there.

    Raises:
        FileNotFoundError: the folder or the file is missing.
        ValueError: not a ZeroModel config, or one of a larger model than the weights'.
    """
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; give the export/ folder of a run as the checkpoint, or export it again if "
            "that was interrupted"
        )
    values = read_object(path, FIX)
    if "model_type" in values:
        raise ValueError(
            f"{path} describes a Hugging Face model; convert it first: python -m model.hf import --hf "
            f"{directory} --out DIR"
        )
    try:
        config = ModelConfig.from_stored(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    weights = Path(directory) / WEIGHTS_NAME
    if weights.is_file():
        check_size(config, read_header(weights, FIX), path, FIX)
    return config


def read_object(path: Path, fix: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # RecursionError: brackets without end
        raise ValueError(f"{path} is not valid JSON ({error}); {fix}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no keys; {fix}")
    return values
