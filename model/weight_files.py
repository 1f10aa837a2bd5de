"""Weights in safetensors files: read only as far as the header fits, written whole or not at all.

Nothing else is read as weights: pickled files can run code.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.files import replacing
from model.config.model import ModelConfig
from model.counts import num_parameters
from model.weight_headers import contradiction

FLOATS = {"F64", "F32", "F16", "BF16"}  # as safetensors names them


class Stored(NamedTuple):
    """A tensor by the header of its file."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


def read_header(path: Path, fix: str) -> dict[str, Stored]:
    """Name -> shape and type of every tensor in a file, without reading its values.

    Args:
        fix: what to do about a damaged file, for the error line.

    Raises:
        ValueError, FileNotFoundError: the file is damaged or missing.
    """
    with _opened(path, fix) as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return {name: Stored(tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}


def read_tensors(path: Path, fix: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) one after another, so that memory need not hold all of them twice.

    The bytes are read, not mapped: a file that is cut meanwhile is an error and not a SIGBUS.

    Raises:
        ValueError, FileNotFoundError: see read_header.
    """
    with _opened(path, fix) as file:
        for name in file.keys():  # noqa: SIM118
            yield name, file.get_tensor(name)


@contextmanager
def readable_tensors(path: Path, fix: str) -> Iterator[Callable[[str], Tensor]]:
    """Inside, a function that reads the tensor of a name, as read_tensors does.

    Raises:
        ValueError, FileNotFoundError: see read_header.
    """
    with _opened(path, fix) as file:
        yield file.get_tensor


@contextmanager
def _opened(path: Path, fix: str) -> Iterator[safe_open]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {fix}")
    try:
        with safe_open(path, "pt", backend="pread") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({contradiction(path) or error}); {fix}") from None


def check_values(name: str, tensor: Tensor, where: Path | str, fix: str) -> None:
    """Raises ValueError unless the tensor is of a floating type of at least 16 bits, and finite."""
    kind = str(tensor.dtype).removeprefix("torch.")
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise ValueError(f"{where}: {name} is in {kind}, but weights are in bfloat16 or wider; {fix}")
    if not all_finite(tensor):
        raise ValueError(f"{where}: {name} holds NaN or infinity; {fix}")


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinity; in one pass, without a copy."""
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


def check_size(config: ModelConfig, stored: Mapping[str, Stored], where: Path, fix: str) -> None:
    """Raises ValueError if a config needs more layers than there are tensors, or twice the parameters.

    By arithmetic alone: a config of 10^9 layers, or 2 million wide, takes no time and no memory here. A model
    that passes may be built; comparing it with the weights then names the tensor that does not fit.
    """
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    if layers > len(stored):  # every layer has tensors of its own
        raise ValueError(
            f"{where} has num_hidden_layers={config.num_hidden_layers} and num_nextn_predict_layers="
            f"{config.num_nextn_predict_layers}, but its weights have only {len(stored)} tensors; {fix}"
        )
    needed, found = num_parameters(config), sum(tensor.size for tensor in stored.values())
    if needed > 2 * found:
        raise ValueError(
            f"{where} describes a model of {needed:,} parameters, but its weights have only {found:,}; {fix}"
        )


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a file that is whole or absent, on disk on return.

    Tensors may share memory, as the rows of stacked experts do; those are copied: safetensors refuses them.

    Raises:
        OSError: see common.files.replacing.
    """
    with replacing(path) as temporary:
        write_tensors(temporary, tensors)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a file, for a `with replacing` block; see save_tensors."""
    path.touch()
    mode = path.stat().st_mode  # safetensors would make a file that nobody else can read
    own: dict[str, Tensor] = {}
    seen = set[int]()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.nbytes() != value.nbytes or storage.data_ptr() in seen:
            value = value.clone()
        own[name] = value
        seen.add(storage.data_ptr())
    try:
        save_file(own, path, {"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
    path.chmod(mode)


@contextmanager
def unchanged(*paths: Path) -> Iterator[None]:
    """Raises ValueError if one of the files is replaced or written to while the `with` block reads it."""
    before = [_stamp(path) for path in paths]
    yield
    for path, stamp in zip(paths, before, strict=True):
        if _stamp(path) != stamp:
            raise ValueError(f"{path} was written while it was read; wait for its writer and start again")


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
