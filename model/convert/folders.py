"""The folders that a conversion reads and writes: exports, with the record of how they were converted."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from common.files import read_object, write_file, write_json
from common.locks import FolderLock
from model.config.model import ModelConfig
from model.export_files import (
    CONFIG_NAME,
    CONVERSIONS_NAME,
    TOKENIZER_NAME,
    TRAINING_DATA_NAME,
    require_finite,
    saving_weights,
)
from model.pretrained import shapes
from model.weight_files import Stored

_FIX = "choose another --out"


@contextmanager
def writing(checkpoint: Path, out: Path) -> Iterator[None]:
    """Holds `out` for the `with` block, so that a mistake about it shows before the work and not after.

    Raises:
        ValueError: `out` is the checkpoint, another command writes there, or it holds a Hugging Face folder.
    """
    if out.resolve() == checkpoint.resolve():
        raise ValueError(f"--out {out} is the checkpoint itself, which would be overwritten; {_FIX}")
    with FolderLock(out, "a conversion", _FIX):
        path = out / CONFIG_NAME
        if path.is_file() and "model_type" in read_object(path, f"delete it or {_FIX}"):
            raise ValueError(f"{out} is a Hugging Face folder, whose files would be overwritten; {_FIX}")
        yield


def write(
    checkpoint: Path, out: Path, config: ModelConfig, state: Mapping[str, Tensor], record: dict[str, Any]
) -> None:
    """Writes the converted export; config.json, without which nothing reads the folder, comes last.

    Args:
        checkpoint: its tokenizer and description of training data are copied.
        state: in fp32; read one tensor after another.
        record: what was done and measured; appended to the checkpoint's own conversions in conversion.json.

    Raises:
        ValueError: a weight is not finite, or the checkpoint's conversion.json is damaged.
        OSError: see common.files.replacing.
    """
    conversions = [*earlier_conversions(checkpoint), record]
    planned = {name: Stored(shape, "F32") for name, shape in shapes(config).items()}
    with saving_weights(out, config, planned) as writer:
        for name in planned:
            value = state[name]
            require_finite(name, value, "the converted weights")
            writer.write(name, value)
        (out / CONFIG_NAME).unlink(missing_ok=True)
        for name in (TOKENIZER_NAME, TRAINING_DATA_NAME):
            if (checkpoint / name).is_file():
                write_file(out / name, (checkpoint / name).read_bytes())
            else:
                (out / name).unlink(missing_ok=True)  # of the model that was there before
        write_json(out / CONVERSIONS_NAME, {"conversions": conversions}, indent=2)


def earlier_conversions(checkpoint: Path) -> list[Any]:
    """The records of the conversions that made an export, the first one first.

    Raises:
        ValueError: conversion.json is damaged.
    """
    path = checkpoint / CONVERSIONS_NAME
    if not path.is_file():
        return []
    fix = "convert the original again, or delete the file"
    found = read_object(path, fix).get("conversions")
    if not isinstance(found, list):
        raise ValueError(f"{path} has no list of conversions; {fix}")
    return found
