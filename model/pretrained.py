"""Exported checkpoints: a folder with model.safetensors and config.json."""

import json
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config.model import ModelConfig
from model.transformer import ZeroModel

WEIGHTS_NAME, CONFIG_NAME = "model.safetensors", "config.json"
# What lies beside them for evaluation; pretrain/export.py writes them.
TOKENIZER_NAME, TRAINING_DATA_NAME = "tokenizer.model", "training_data.json"


def save_weights(directory: Path, config: ModelConfig, state: dict[str, Tensor]) -> None:
    """Writes the two files, each under a temporary name that is then renamed."""
    directory.mkdir(parents=True, exist_ok=True)
    weights, text = directory / WEIGHTS_NAME, json.dumps(config.to_dict(), indent=2) + "\n"
    save_file({name: t.detach().cpu().contiguous() for name, t in state.items()}, f"{weights}.tmp")
    os.replace(f"{weights}.tmp", weights)
    (directory / f"{CONFIG_NAME}.tmp").write_text(text)
    os.replace(directory / f"{CONFIG_NAME}.tmp", directory / CONFIG_NAME)


def load_config(directory: str | Path) -> ModelConfig:
    """Reads config.json.

    Raises:
        FileNotFoundError: the folder or the file is missing.
        ValueError: not a config of ours.
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


def load_pretrained(directory: str | Path) -> ZeroModel:
    """The exported model in eval mode, recurrence as configured.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or the weights are not those of the config.
    """
    config = load_config(directory)
    path = Path(directory) / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; export the checkpoint again")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); export the checkpoint again") from None
    model = ZeroModel(config)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in state.items()}
    if expected != found:
        name = next(n for n in sorted(expected | found) if expected.get(n) != found.get(n))
        raise ValueError(
            f"{path} does not fit {CONFIG_NAME}: {name} is {found.get(name, 'missing')}, "
            f"expected {expected.get(name, 'no such tensor')}; use files of one export"
        )
    model.load_state_dict(state)
    return model.eval()
