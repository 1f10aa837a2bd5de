"""Weights written one tensor at a time, in any order, to one safetensors file or to several with an index.

The library writes a file from all of its tensors at once. Here the header is written first, and every tensor
goes to its place once it is there, so that memory holds one at a time. The bytes are the library's: 8 of the
header's length, the header, padded to a multiple of 8, and the tensors, the widest types first and then by
name (https://github.com/huggingface/safetensors#format).
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.files import replacing
from model.weight_files import INDEX_NAME, WEIGHTS_NAME, Stored, open_weights
from model.weight_headers import LENGTH_BYTES

DTYPES = {  # of weights, in the order of a file
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_SHARD_BYTES = 5 * 10**9  # weights in a file, as in transformers
_BLOCK_BYTES = 2**25


def describe(tensor: Tensor) -> Stored:
    """What a header says of a weight. Raises ValueError for one that is no float of 16 bits or more."""
    if tensor.dtype not in _NAMES:
        raise ValueError(f"a weight is in {tensor.dtype}, but weights are stored in bfloat16 or wider")
    return Stored(tuple(tensor.shape), _NAMES[tensor.dtype])


def num_bytes(stored: Stored) -> int:
    """Of a weight in its file."""
    return stored.size * DTYPES[stored.dtype].itemsize


def shards(stored: Mapping[str, Stored], limit: int = MAX_SHARD_BYTES) -> dict[str, list[str]]:
    """File -> names of its tensors, as few files as hold them in their order.

    Args:
        limit: bytes of weights in a file; a tensor that is larger has a file of its own.
    """
    groups, held = [list[str]()], 0
    for name, tensor in stored.items():
        size = num_bytes(tensor)
        if groups[-1] and held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    if len(groups) == 1:
        return {WEIGHTS_NAME: groups[0]}
    stem, count = WEIGHTS_NAME.removesuffix(".safetensors"), len(groups)
    return {f"{stem}-{number:05}-of-{count:05}.safetensors": names for number, names in enumerate(groups, 1)}


def file_names(files: Mapping[str, Sequence[str]]) -> list[str]:
    """The names of all files that `writing_weights` makes for these shards."""
    return [*files, *([] if WEIGHTS_NAME in files else [INDEX_NAME])]


class WeightWriter:
    """Files of weights that are being written.

    Args:
        files: path of every file -> its tensors.
    """

    def __init__(self, files: Mapping[Path, Mapping[str, Stored]]) -> None:
        self._place: dict[str, tuple[Path, int, Stored]] = {}
        self._missing: dict[str, int] = {}  # bytes
        for path, stored in files.items():
            header, starts = _header(stored)
            path.write_bytes(header)
            for name, tensor in stored.items():
                self._place[name] = path, starts[name], tensor
                self._missing[name] = num_bytes(tensor)

    def write(self, name: str, tensor: Tensor, row: int | None = None) -> None:
        """Writes a tensor, or from `row` on those of its rows that `tensor` (rows, ...) is.

        Raises:
            ValueError: it has another type or shape than was planned.
            OSError: the disk is full or fails.
        """
        if name not in self._place:
            raise ValueError(f"{name} does not belong to the weights that are written")
        path, start, planned = self._place[name]
        given = describe(tensor)
        if row is not None:
            start += row * num_bytes(Stored(planned.shape[1:], planned.dtype))
            planned = planned._replace(shape=(given.shape[0], *planned.shape[1:]))
        if given != planned:
            raise ValueError(f"{name} is {_text(given)}, but {_text(planned)} was to be written")
        self._missing[name] -= num_bytes(given)
        with path.open("rb+") as file:
            file.seek(start)
            for block in _blocks(tensor.detach()):
                file.write(_raw(block.cpu()))

    def finish(self) -> None:
        """Raises ValueError unless every tensor was written, once."""
        for name, missing in self._missing.items():
            if missing:
                raise ValueError(f"{name} was not written as planned: {missing:,} bytes are missing")


def _blocks(tensor: Tensor) -> Iterable[Tensor]:
    """A tensor's rows in blocks, so that what is expanded, turned or on a device is not copied as a whole."""
    if tensor.dim() == 0 or tensor.numel() == 0:
        return (tensor,)
    row_bytes = tensor[0].numel() * tensor.element_size()
    return tensor.split(max(1, _BLOCK_BYTES // row_bytes))


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in host memory, copied only if they do not lie in order."""
    whole = tensor.contiguous()
    flat = whole.as_strided((whole.numel(),), (1,))  # a single number may have any stride
    return flat.view(torch.uint8).numpy().data


def _text(stored: Stored) -> str:
    return f"{stored.shape} in {stored.dtype}"


def _header(stored: Mapping[str, Stored]) -> tuple[bytes, dict[str, int]]:
    """What a file begins with, and where in it each tensor starts."""
    order = list(DTYPES)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end, starts = 0, {}
    for name in sorted(stored, key=lambda name: (order.index(stored[name].dtype), name)):
        starts[name], tensor = end, stored[name]
        end += num_bytes(tensor)
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (starts[name], end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    begin = LENGTH_BYTES + len(text)
    head = len(text).to_bytes(LENGTH_BYTES, "little") + text
    return head, {name: begin + start for name, start in starts.items()}


@contextmanager
def writing_weights(
    folder: Path, files: Mapping[str, Sequence[str]], stored: Mapping[str, Stored]
) -> Iterator[WeightWriter]:
    """A writer of weights whose files are all whole before the first replaces an older one.

    The index has every file but those whose names do not begin as WEIGHTS_NAME does. What the folder holds of
    weights in another division is deleted at the end.

    Args:
        files: see `shards`.

    Raises:
        ValueError: at the end, if a tensor was not written. OSError: see common.files.replacing.
    """
    stem = WEIGHTS_NAME.removesuffix(".safetensors")
    with ExitStack() as stack:
        temporary = {file: stack.enter_context(replacing(folder / file)) for file in file_names(files)}
        index = temporary.pop(INDEX_NAME, None)
        writer = WeightWriter(
            {path: {name: stored[name] for name in files[file]} for file, path in temporary.items()}
        )
        if index is not None:
            where = {name: file for file in files for name in files[file] if file.startswith(stem)}
            total = sum(num_bytes(stored[name]) for name in where)
            content = {"metadata": {"total_size": total}, "weight_map": where}
            index.write_text(json.dumps(content, indent=2) + "\n")
        yield writer
        writer.finish()
    for path in [*folder.glob(f"{stem}-*-of-*.safetensors"), folder / WEIGHTS_NAME, folder / INDEX_NAME]:
        if path.name not in file_names(files):
            path.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a file that is whole or absent, on disk on return; tensors may share memory.

    Raises:
        OSError: see common.files.replacing.
    """
    with replacing(path) as temporary:
        writer = WeightWriter({temporary: {name: describe(tensor) for name, tensor in tensors.items()}})
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def weights_digest(path: Path, fix: str) -> str:
    """sha256, in hexadecimal digits, of a file of weights; of an index, that of one file with all tensors.

    Raises:
        ValueError, FileNotFoundError: see weight_files.open_weights.
    """
    if path.name != INDEX_NAME:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    weights = open_weights(path, fix)
    header, starts = _header(weights.stored)
    digest = hashlib.sha256(header)
    for name in sorted(starts, key=lambda name: (starts[name], name)):
        digest.update(_raw(weights[name]))
    return digest.hexdigest()


def copy_weights(path: Path, copy: Path, fix: str) -> None:
    """Copies a file of weights, or those of an index into one file; for a `with replacing` block.

    Raises:
        ValueError, FileNotFoundError: see weight_files.open_weights. OSError: the disk is full or fails.
    """
    if path.name != INDEX_NAME:
        shutil.copyfile(path, copy)
        return
    weights = open_weights(path, fix)
    writer = WeightWriter({copy: weights.stored})
    for name, tensor in weights.items():
        writer.write(name, tensor)
