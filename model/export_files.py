"""The files of an exported checkpoint: config.json, and weights in one file or in several with an index."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from common.files import read_object, replacing
from model.config.model import ModelConfig
from model.weight_files import WEIGHTS_NAME as WEIGHTS_NAME
from model.weight_files import Stored, all_finite, check_size, read_header, weights_path
from model.weight_writer import MAX_SHARD_BYTES, WeightWriter, describe, shards, writing_weights

CONFIG_NAME = "config.json"
# Further files that evaluation needs; pretrain/export.py writes them.
TOKENIZER_NAME, TRAINING_DATA_NAME = "tokenizer.model", "training_data.json"
CONVERSIONS_NAME = "conversion.json"  # how model.convert made the folder
INIT_NAME = "init.json"  # beside a run's export/: the weights that the run began with
# How the names of parameters begin that only training needs: exports lack them.
TRAINING_ONLY = "kv_projections."
FIX = "export the checkpoint again"


def require_finite(name: str, value: Tensor, where: object) -> None:
    """Raises ValueError, one line, for a tensor that holds NaN or infinity.

    Args:
        where: what it belongs to, for the message.
    """
    if not all_finite(value):
        raise ValueError(f"{name} holds NaN or infinity in {where}; use an earlier checkpoint or export")


@contextmanager
def saving_weights(
    directory: Path, config: ModelConfig, stored: Mapping[str, Stored], limit: int = MAX_SHARD_BYTES
) -> Iterator[WeightWriter]:
    """A writer of an export's weights, one tensor at a time; all files are whole before the first replaces
    an older one.

    The folder has no config.json while files are renamed, so that nothing reads new weights with an old
    config, however this ends.

    Args:
        stored: all tensors, in the order in which they fill the files.
        limit: bytes of weights in a file.

    Raises:
        ValueError: a tensor was not written. OSError: see common.files.replacing.
    """
    created, path = not directory.is_dir(), directory / CONFIG_NAME
    directory.mkdir(parents=True, exist_ok=True)
    try:
        # What is entered last is renamed first.
        with (
            replacing(path) as new_config,
            writing_weights(directory, shards(stored, limit), stored) as writer,
        ):
            yield writer
            writer.finish()
            new_config.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
            path.unlink(missing_ok=True)
    except BaseException:
        if created and not any(directory.iterdir()):
            directory.rmdir()
        raise


def save_weights(directory: Path, config: ModelConfig, state: Mapping[str, Tensor]) -> None:
    """Writes an export from tensors in memory; see saving_weights."""
    stored = {name: describe(value) for name, value in state.items()}
    with saving_weights(directory, config, stored) as writer:
        for name, value in state.items():
            writer.write(name, value)


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
    weights = weights_path(Path(directory))
    if weights.is_file():
        check_size(config, read_header(weights, FIX), path, FIX)
    return config
