"""Files that are whole or absent."""

import json
import os
from pathlib import Path
from typing import Any


def write_file(path: Path, data: bytes) -> None:
    """Write under a temporary name, then rename: the file is whole or absent, on disk on return."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to disk; only then is a rename durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, values: Any, indent: int = 1) -> None:
    """Write JSON that is whole or absent; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(values, indent=indent) + "\n").encode())
