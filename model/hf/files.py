"""The files of a Hugging Face folder, and what all kinds of config.json share."""

import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Size, Tensor

from common.schema import as_type
from model.config.model import ModelConfig
from model.export_files import WEIGHTS_NAME, read_object
from model.weight_files import FLOATS, Stored, check_values, read_header, read_tensors

MTP_NAME = "mtp.safetensors"
INDEX_NAME = "model.safetensors.index.json"
FIX = "download the folder again, or save it there again with save_pretrained"
# Masks and tables that older versions of transformers saved beside the weights.
HARMLESS = re.compile(r"(^|\.)(((attn|attention)\.(masked_)?bias)|rotary_emb\.inv_freq|position_ids)$")


def check_config(values: dict[str, Any], kind: str, fixed: dict[str, Any]) -> None:
    """Raises ValueError for a config.json that this network does not compute.

    Args:
        kind: the model's name, for the error line.
        fixed: keys that may be absent, with the only value that this network computes.
    """
    for name, expected in fixed.items():
        if values.get(name, expected) != expected:
            raise ValueError(
                f"config.json has {name}={values[name]!r}, but only {expected!r} is supported for {kind}; "
                "choose another checkpoint"
            )
    if values.get("quantization_config"):
        raise ValueError("config.json has a quantization_config; convert the weights to bf16 first")


def read_fields(
    values: dict[str, Any], kind: str, names: Mapping[str, str], defaults: dict[str, Any]
) -> dict[str, Any]:
    """Values of config.json by the names and with the types of ModelConfig.

    Args:
        kind: the model's name, for the error line.
        names: our name -> its name in config.json.
        defaults: by the latter; other names must be present.

    Raises:
        ValueError: one line for what is missing or of another type.
    """
    missing = [name for name in names.values() if name not in values and name not in defaults]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}; it does not describe a {kind} model")
    hints = typing.get_type_hints(ModelConfig, include_extras=True)
    given = {**defaults, **values}
    return {ours: as_type(hints[ours], given[name], f"config.json: {name}") for ours, name in names.items()}


def take(tensors: dict[str, Tensor], name: str, shape: Size) -> Tensor:
    """Removes a tensor and returns it.

    Raises:
        ValueError: it is missing or of another shape.
    """
    if name not in tensors:
        raise ValueError(
            f"{name} is missing; the folder is not complete or config.json describes another model"
        )
    tensor = tensors.pop(name)
    if tensor.shape != shape:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)}, expected {tuple(shape)}; config.json describes another model"
        )
    return tensor


def read_headers(hf: Path) -> dict[str, Stored]:
    """Name -> shape and type of every tensor in a folder, without reading their values.

    Raises:
        ValueError, FileNotFoundError: a file is missing or damaged, the files contradict their index or each
            other, or a tensor is not in bf16 or wider.
    """
    stored: dict[str, Stored] = {}
    for path, expected in _weight_files(hf).items():
        header = read_header(path, FIX)
        for name, tensor in header.items():
            if name in stored:
                raise ValueError(f"{path} holds {name}, which another file of the folder holds too; {FIX}")
            if tensor.dtype not in FLOATS and HARMLESS.search(name) is None:
                raise ValueError(
                    f"{path}: {name} is in {tensor.dtype}, but weights are in bf16 or wider; convert the "
                    "checkpoint, or choose another one"
                )
        if expected is not None and header.keys() != expected:
            name = min(header.keys() ^ expected)
            holds = "holds" if name in header else "lacks"
            raise ValueError(f"{path} {holds} {name}, but {INDEX_NAME} says otherwise; {FIX}")
        stored |= header
    return stored


def read_weights(hf: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all tensors in a folder that read_headers has accepted.

    Raises:
        ValueError, FileNotFoundError: a file is missing or damaged, or a tensor is not finite.
    """
    for path in _weight_files(hf):
        for name, tensor in read_tensors(path, FIX):
            if HARMLESS.search(name) is None:
                check_values(name, tensor, path, FIX)
            yield name, tensor


def _weight_files(hf: Path) -> dict[Path, set[str] | None]:
    """The files of weights, each with the names that it must hold; None: whatever it holds."""
    index, whole = hf / INDEX_NAME, hf / WEIGHTS_NAME
    files: dict[Path, set[str] | None] = {}
    if index.is_file():
        if whole.is_file():
            raise ValueError(
                f"{hf} has both {WEIGHTS_NAME} and {INDEX_NAME}; delete the one that is outdated"
            )
        where = f"{index}: weight_map"
        shards = as_type(dict[str, str], read_object(index, FIX).get("weight_map"), where)
        for name, file in shards.items():
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(f"{where} names {file!r}, which is not a safetensors file in it; {FIX}")
            files.setdefault(hf / file, set()).add(name)  # type: ignore[union-attr]
    elif not whole.is_file() and (pickled := sorted(path.name for path in hf.glob("*.bin"))):
        raise FileNotFoundError(
            f"{whole} is missing; {pickled[0]} is not read, since pickled files can run code: load it with "
            "transformers and save it again with save_pretrained"
        )
    else:
        files[whole] = None
    if (hf / MTP_NAME).is_file():
        files.setdefault(hf / MTP_NAME, None)
    return files


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError, FileNotFoundError: the file is missing or holds no JSON object."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give a folder in the Hugging Face format")
    return read_object(path, FIX)
