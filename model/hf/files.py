"""The files of a Hugging Face folder, and what all kinds of config.json share."""

import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.files import read_object
from common.schema import as_type
from model.config.model import ModelConfig
from model.weight_files import OpenWeights, weight_files, weights_path

MTP_NAME = "mtp.safetensors"
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


def open_folder(hf: Path) -> OpenWeights:
    """The tensors of a folder, each read when it is asked for; see checked.

    Raises:
        ValueError, FileNotFoundError: a file is missing or damaged, the files contradict their index or each
            other, or a tensor is not in bf16 or wider.
    """
    path = weights_path(hf)
    if not path.is_file() and (pickled := sorted(path.name for path in hf.glob("*.bin"))):
        raise FileNotFoundError(
            f"{path} is missing; {pickled[0]} is not read, since pickled files can run code: load it with "
            "transformers and save it again with save_pretrained"
        )
    files = weight_files(path, FIX)
    if (hf / MTP_NAME).is_file():
        files.setdefault(hf / MTP_NAME, None)
    weights = OpenWeights(files, FIX)
    for name in weights:
        if HARMLESS.search(name) is None:
            weights.check_kind(name)
    return weights


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError, FileNotFoundError: the file is missing or holds no JSON object."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give a folder in the Hugging Face format")
    return read_object(path, FIX)
