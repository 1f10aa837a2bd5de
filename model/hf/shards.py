"""Weights copied from one safetensors file to several, without holding more than one of them."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from common.files import write_json
from model.export_files import FIX, WEIGHTS_NAME
from model.hf.files import INDEX_NAME
from model.weight_files import Stored, check_values, read_tensors, save_tensors

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
DEFAULT_SIZE = "5GB"


def size_in_bytes(text: str) -> int:
    """`500MB` -> 500,000,000, in transformers' units.

    Raises:
        ValueError: another form.
    """
    match = re.fullmatch(r"([1-9]\d{0,8})(KB|MB|GB)", text)
    if match is None:
        raise ValueError(f"--max_shard_size={text!r} is not a size; give a number and KB, MB or GB: 5GB")
    return int(match[1]) * UNITS[match[2]]


class ShardPlan:
    """Which tensor goes into which file.

    Args:
        stored: the tensors in the order in which they are read.
        limit: bytes of weights in a file; a tensor that is larger has a file of its own.
    """

    def __init__(self, stored: Mapping[str, Stored], limit: int) -> None:
        groups, held = [list[str]()], 0
        self.total = 0
        for name, tensor in stored.items():
            size = tensor.size * ITEM_BYTES[tensor.dtype]
            if groups[-1] and held + size > limit:
                groups.append([])
                held = 0
            groups[-1].append(name)
            held, self.total = held + size, self.total + size
        stem, count = WEIGHTS_NAME.removesuffix(".safetensors"), len(groups)
        names = [WEIGHTS_NAME]
        if count > 1:
            names = [f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
        self.files = dict(zip(names, groups, strict=True))

    @property
    def written(self) -> list[str]:
        """Names of all files."""
        return [*self.files, *([INDEX_NAME] if len(self.files) > 1 else [])]

    def write(self, source: Path, out: Path, rename: Callable[[str], str]) -> None:
        """Copies the weights, each checked, and writes the index.

        Raises:
            ValueError: a weight is not finite or not a float of 16 bits or more. OSError: see save_tensors.
        """
        tensors = self._checked(source)
        for file, names in self.files.items():
            save_tensors(out / file, {rename(name): next(tensors) for name in names})
        if len(self.files) > 1:
            where = {rename(name): file for file, names in self.files.items() for name in names}
            index = {"metadata": {"total_size": self.total}, "weight_map": where}
            write_json(out / INDEX_NAME, index, indent=2)

    def _checked(self, source: Path) -> Iterator[Tensor]:
        for name, tensor in read_tensors(source, FIX):
            check_values(name, tensor, source, FIX)
            yield tensor
