"""Weights in safetensors files, one or several with an index: read only as far as the header fits.

Nothing else is read as weights: pickled files can run code. weight_writer.py writes them.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.files import read_object
from common.schema import as_type
from model.config.model import ModelConfig
from model.counts import num_parameters
from model.weight_headers import contradiction

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"  # which file holds which tensor, as transformers writes it
FLOATS = {"F64", "F32", "F16", "BF16"}  # as safetensors names them


class Stored(NamedTuple):
    """A tensor by the header of its file."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


def weights_path(folder: Path) -> Path:
    """The path by which a folder's weights are read: of its one file, or of the index of several.

    Raises:
        ValueError: the folder has both.
    """
    whole, index = folder / WEIGHTS_NAME, folder / INDEX_NAME
    if not index.is_file():
        return whole
    if whole.is_file():
        raise ValueError(
            f"{folder} has both {WEIGHTS_NAME} and {INDEX_NAME}; delete the one that is outdated"
        )
    return index


class OpenWeights(Mapping[str, Tensor]):
    """The tensors of open files, each read from disk whenever it is asked for.

    The bytes are read, not mapped: a file that is cut meanwhile is an error and not a SIGBUS.

    Args:
        files: each with the names that it must hold; None: whatever it holds.
        fix: what to do about a damaged file, for the error line.

    Raises:
        ValueError, FileNotFoundError: a file is damaged or missing, or two hold a tensor of the same name;
            reading a tensor may raise the first too.
    """

    def __init__(self, files: Mapping[Path, set[str] | None], fix: str) -> None:
        self.stored: dict[str, Stored] = {}
        self.fix = fix
        self._where: dict[str, tuple[Path, safe_open]] = {}
        for path, expected in files.items():
            self._open(path, expected)

    def _open(self, path: Path, expected: set[str] | None) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {self.fix}")
        with self._readable(path):
            file = safe_open(path, "pt", backend="pread")
            names = set(file.keys())
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if name in self.stored:
                    raise ValueError(
                        f"{path} holds {name}, which another file of the folder holds too; {self.fix}"
                    )
                part = file.get_slice(name)
                self.stored[name] = Stored(tuple(part.get_shape()), part.get_dtype())
                self._where[name] = path, file
            if expected is not None and names != expected:
                name = min(names ^ expected)
                holds = "holds" if name in names else "lacks"
                raise ValueError(f"{path} {holds} {name}, but {INDEX_NAME} says otherwise; {self.fix}")

    @contextmanager
    def _readable(self, path: Path) -> Iterator[None]:
        try:
            yield
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({contradiction(path) or error}); {self.fix}") from None

    def __getitem__(self, name: str) -> Tensor:
        path, file = self._where[name]
        with self._readable(path):
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def checked(self, name: str) -> Tensor:
        """A tensor whose values are finite. Raises ValueError: see check_values."""
        tensor = self[name]
        check_values(name, tensor, self.path(name), self.fix)
        return tensor

    def check_kind(self, name: str) -> None:
        """Raises ValueError unless a tensor is of a floating type of at least 16 bits, by its header."""
        if (kind := self.stored[name].dtype) not in FLOATS:
            raise _not_a_weight(self.path(name), name, kind, self.fix)

    def path(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._where[name][0]


def weight_files(path: Path, fix: str) -> dict[Path, set[str] | None]:
    """The files that an index names, each with the names of its tensors, or `path` itself if it is no index.

    Raises:
        ValueError, FileNotFoundError: the index is missing, damaged, or names files outside its folder.
    """
    if path.name != INDEX_NAME:
        return {path: None}
    where = f"{path}: weight_map"
    files: dict[Path, set[str] | None] = {}
    for name, file in as_type(dict[str, str], read_object(path, fix).get("weight_map"), where).items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{where} names {file!r}, which is not a safetensors file in it; {fix}")
        files.setdefault(path.parent / file, set()).add(name)  # type: ignore[union-attr]
    return files


def open_weights(path: Path, fix: str) -> OpenWeights:
    """The tensors of a file, or of the files that an index names. Raises: see OpenWeights, weight_files."""
    return OpenWeights(weight_files(path, fix), fix)


def read_header(path: Path, fix: str) -> dict[str, Stored]:
    """Name -> shape and type of every tensor, without reading its values; see open_weights."""
    return open_weights(path, fix).stored


def read_tensors(path: Path, fix: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) one after another, so that memory need not hold all of them; see open_weights."""
    yield from open_weights(path, fix).items()


def check_values(name: str, tensor: Tensor, where: Path | str, fix: str) -> None:
    """Raises ValueError unless the tensor is of a floating type of at least 16 bits, and finite."""
    kind = str(tensor.dtype).removeprefix("torch.")
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise _not_a_weight(where, name, kind, fix)
    if not all_finite(tensor):
        raise ValueError(f"{where}: {name} holds NaN or infinity; {fix}")


def _not_a_weight(where: Path | str, name: str, kind: str, fix: str) -> ValueError:
    return ValueError(f"{where}: {name} is in {kind}, but weights are in bfloat16 or wider; {fix}")


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


@contextmanager
def unchanged(*paths: Path) -> Iterator[None]:
    """Raises ValueError if one of the files is replaced or written to while the `with` block reads it.

    Of an index, the files that it names are watched too.
    """
    before = {path: _stamp(path) for path in _with_shards(paths)}
    yield
    for path, stamp in before.items():
        if _stamp(path) != stamp:
            raise ValueError(f"{path} was written while it was read; wait for its writer and start again")


def _with_shards(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        yield path
        if path.name == INDEX_NAME:
            with suppress(ValueError, OSError):  # the block itself will say what is wrong with the index
                yield from weight_files(path, "")


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
