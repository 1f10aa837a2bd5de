"""Loads a model from the files of an exported checkpoint."""

from collections.abc import Mapping
from pathlib import Path

from model.export_files import CONFIG_NAME, FIX, WEIGHTS_NAME, load_config
from model.transformer import ZeroModel
from model.weight_files import check_values, read_header, read_tensors, unchanged

Shape = tuple[int, ...]


def load_pretrained(directory: str | Path) -> ZeroModel:
    """The exported model in eval mode, recurrence as configured.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or was written meanwhile, the weights do not fit the config, are not
            finite, or are not floating-point numbers of 16 bits or more.
    """
    path = Path(directory) / WEIGHTS_NAME
    with unchanged(Path(directory) / CONFIG_NAME, path):
        config = load_config(directory)
        found = {name: tensor.shape for name, tensor in read_header(path, FIX).items()}
        model = ZeroModel(config)  # not larger than the weights: see load_config
        state = model.state_dict()
        check_fits({name: tuple(tensor.shape) for name, tensor in state.items()}, found, path)
        for name, tensor in read_tensors(path, FIX):
            check_values(name, tensor, path, FIX)
            state[name].copy_(tensor)
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
