"""What is wrong with the header of a safetensors file, in numbers, where the library's own words have none.

A file is the header's length (8 bytes), the header (JSON: name -> type, shape and place) and the tensors'
bytes, without gaps (https://github.com/huggingface/safetensors#format).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from common.schema import CountOrZero, from_plain

LENGTH_BYTES = 8
MOST_HEADER_BYTES = 100_000_000  # the library's limit
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: list[CountOrZero]
    data_offsets: tuple[int, int]


def contradiction(path: Path) -> str | None:
    """What the header says against the file or against itself; None: nothing that numbers show."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        most = min(size - LENGTH_BYTES, MOST_HEADER_BYTES)
        if length > most:
            return f"its header is {length:,} bytes long, where at most {max(most, 0):,} are possible"
        try:
            header = json.loads(file.read(length))
            if not isinstance(header, dict):
                return None
            shown = {name: name if name.isprintable() else repr(name) for name in header}
            entries = {
                shown[name]: from_plain(_Entry, value, shown[name])
                for name, value in header.items()
                if name != "__metadata__"
            }
        except (RecursionError, UnicodeDecodeError, json.JSONDecodeError):
            return None
        except ValueError as error:
            return str(error)
    return _misplaced(entries, size - LENGTH_BYTES - length)


def _misplaced(entries: dict[str, _Entry], room: int) -> str | None:
    """The first tensor in a file with `room` bytes of them that has too many, too few, or another's bytes."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        start, stop = entry.data_offsets
        needed = math.prod(entry.shape) * _BYTES.get(entry.dtype, 0)
        if entry.dtype in _BYTES and needed != stop - start:
            shape = tuple(entry.shape)
            return (
                f"{name} {shape} in {entry.dtype} takes {needed:,} bytes, but its place has {stop - start:,}"
            )
        if start != end:
            return f"{name} begins at byte {start:,} of the data, where the tensor before it ends at {end:,}"
        if stop > room:
            return f"{name} ends at byte {stop:,} of the data, which has {room:,}"
        end = stop
    return None if end == room else f"its tensors take {end:,} bytes, but the file has {room:,} for them"
