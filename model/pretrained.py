"""Loads a model from the files of an exported checkpoint."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from model.export_files import CONFIG_NAME, WEIGHTS_NAME, load_config
from model.transformer import ZeroModel


def load_pretrained(directory: str | Path) -> ZeroModel:
    """The exported model in eval mode, recurrence as configured.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or the weights do not fit the config.
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
