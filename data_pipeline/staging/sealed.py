"""What a build keeps in its work folder, with checksums: a torn or overwritten file is named, not used.

A sealed file holds JSON behind its own sha256. An array's checksum is returned to its writer, which keeps it
in a sealed file.
"""

import hashlib
import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from common.files import write_file
from data_pipeline.errors import DataError


def damaged(path: Path, why: str) -> DataError:
    """The error that names a file of a work folder."""
    return DataError(f"{path} is damaged ({why}): delete the folder work/ of this build and start it again")


def write_sealed(path: Path, values: Any) -> None:
    """Write JSON and its checksum; the file is whole or absent. Raises OSError."""
    text = json.dumps(values).encode()
    write_file(path, hashlib.sha256(text).hexdigest().encode() + b"\n" + text)


def read_sealed(path: Path) -> Any:
    """What `write_sealed` wrote. Raises DataError for anything else."""
    try:
        digest, _, text = path.read_bytes().partition(b"\n")
    except FileNotFoundError as error:
        raise damaged(path, "it is missing") from error
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise damaged(path, "its checksum differs")
    return json.loads(text)


def write_array(path: Path, array: np.ndarray) -> int:
    """Write an array as .npy, whole or absent, and return the file's crc32. Raises OSError."""
    buffer = io.BytesIO()
    np.save(buffer, array)  # to a file, a full disk would be an OSError without number
    write_file(path, buffer.getvalue())
    return zlib.crc32(buffer.getbuffer())


def read_array(path: Path, crc32: int) -> np.ndarray:
    """What `write_array` wrote. Raises DataError for anything else."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise damaged(path, "it is missing") from error
    if zlib.crc32(data) != crc32:
        raise damaged(path, "its checksum differs")
    array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    return array
