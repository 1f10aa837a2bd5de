"""The files of a Hugging Face folder, and what all kinds of config.json share."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.export_files import WEIGHTS_NAME

MTP_NAME = "mtp.safetensors"
INDEX_NAME = "model.safetensors.index.json"


def check_config(values: dict[str, Any], kind: str, fixed: dict[str, Any], needed: Sequence[str]) -> None:
    """Raises ValueError for a config.json that this network does not compute.

    Args:
        kind: the model's name, for the error line.
        fixed: keys that may be absent, with the only value that this network computes.
        needed: keys that must be present.
    """
    for name, expected in fixed.items():
        if values.get(name, expected) != expected:
            raise ValueError(
                f"config.json has {name}={values[name]!r}, but only {expected!r} is supported; "
                "choose another checkpoint"
            )
    if values.get("quantization_config"):
        raise ValueError("config.json has a quantization_config; convert the weights to bf16 first")
    missing = [name for name in needed if name not in values]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}; it does not describe a {kind} model")


def rope_parameters(values: dict[str, Any]) -> tuple[float, str, dict[str, Any]]:
    """Base, kind and further values of `rope_parameters` (transformers 5), or of `rope_theta` and
    `rope_scaling` (earlier).
    """
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", values.get("rope_theta", 10000.0)))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    return theta, kind, rope


def take(tensors: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    """Removes a tensor and returns it.

    Raises:
        ValueError: it is missing, of another shape, or quantized.
    """
    if name not in tensors:
        raise ValueError(
            f"{name} is missing; the folder is not complete or config.json describes another model"
        )
    tensor = tensors.pop(name)
    if tensor.shape != shape or tensor.dtype.itemsize < 2:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} in {tensor.dtype}, expected {tuple(shape)} in bf16 or wider; "
            "convert the checkpoint first"
        )
    return tensor


def read_weights(hf: Path) -> dict[str, Tensor]:
    """All tensors of a folder by their names on disk.

    Raises:
        ValueError, FileNotFoundError: a file is missing or damaged.
    """
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(hf):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; download the folder again")
        try:
            tensors |= load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); download it again") from None
    return tensors


def _weight_files(hf: Path) -> list[Path]:
    index = hf / INDEX_NAME
    names = set(read_json(index).get("weight_map", {}).values()) if index.is_file() else {WEIGHTS_NAME}
    if (hf / MTP_NAME).is_file():
        names.add(MTP_NAME)
    return [hf / name for name in sorted(names)]


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    # Copies: safetensors refuses tensors that share memory, as the rows of stacked experts do.
    save_file({n: t.detach().clone().contiguous() for n, t in tensors.items()}, temporary, {"format": "pt"})
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give a folder in the Hugging Face format")
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no keys; download it again")
    return values
