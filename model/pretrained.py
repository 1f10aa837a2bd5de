"""Loads a model from the files of an exported checkpoint."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from model.config.model import ModelConfig
from model.export_files import CONFIG_NAME, FIX, load_config
from model.transformer import ZeroModel
from model.weight_files import OpenWeights, open_weights, unchanged, weights_path

Shape = tuple[int, ...]


def shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name -> shape of every tensor of a model's state."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in ZeroModel(config).state_dict().items()}


@contextmanager
def open_export(directory: Path) -> Iterator[tuple[ModelConfig, OpenWeights]]:
    """Config and tensors of an exported folder, which must not change inside the `with` block.

    Raises:
        ValueError, OSError: a file is missing, damaged, or of another kind than the others.
    """
    path = weights_path(directory)
    with unchanged(directory / CONFIG_NAME, path):
        config, weights = load_config(directory), open_weights(path, FIX)
        for name in weights:
            weights.check_kind(name)
        # The model is not larger than the weights: see load_config.
        check_fits(shapes(config), {name: tensor.shape for name, tensor in weights.stored.items()}, path)
        yield config, weights


def load_pretrained(directory: str | Path) -> ZeroModel:
    """The exported model in eval mode, recurrence as configured.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or was written meanwhile, the weights do not fit the config, are not
            finite, or are not floating-point numbers of 16 bits or more.
    """
    with open_export(Path(directory)) as (config, weights):
        model = ZeroModel(config, seed=None)
        state = model.state_dict()
        for name in weights:  # one at a time: memory holds the model and one tensor
            state[name].copy_(weights.checked(name))
    return model.eval()


def check_fits(expected: Mapping[str, Shape], found: Mapping[str, Shape], path: Path) -> None:
    """Raises ValueError unless a file of weights has the shapes of the model."""
    if expected == found:
        return
    name = next(n for n in sorted({*expected, *found}) if expected.get(n) != found.get(n))
    raise ValueError(
        f"{path} does not fit {CONFIG_NAME}: {name} is {found.get(name, 'missing')}, "
        f"expected {expected.get(name, 'no such tensor')}; use files of one export"
    )
