"""Files that are whole or absent, and what can be read of one that was damaged."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path, needed: int | None = None) -> Iterator[Path]:
    """A temporary path beside `path`, to be written in the `with` block, then put on disk and renamed.

    If the block fails, the temporary file is deleted and `path` stays as it was, or absent.

    Args:
        needed: bytes that will be written, if they are known.

    Raises:
        OSError: for a full or failing disk, with `path`, the room that is needed and left, and what is safe.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.filename not in (None, str(temporary)):
            raise  # about another file, such as one that was to be copied
        raise writing_failed(error, path, needed=needed) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def writing_failed(
    error: OSError, path: Path, safe: str = "nothing was replaced", needed: int | None = None
) -> OSError:
    """`error` with the path that was being written, the room needed and left there, and what is safe."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    room = f"{shutil.disk_usage(folder).free:,} bytes free"
    if needed is not None:
        room = f"{needed:,} bytes needed, {room}"
    reason = f"{error.strerror or error} ({room}); {safe}"
    return OSError(error.errno, reason, str(path))


def write_file(path: Path, data: bytes) -> None:
    """Write under a temporary name, then rename: the file is whole or absent, on disk on return.

    Raises:
        OSError: see `replacing`.
    """
    with replacing(path, len(data)) as temporary:
        temporary.write_bytes(data)


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


@dataclass(frozen=True)
class JsonLines:
    """What a file of one JSON object per line holds."""

    path: Path
    records: list[dict[str, Any]] = field(default_factory=list)
    damaged: list[tuple[int, bytes]] = field(default_factory=list)  # line number from 1, content
    torn: bytes = b""  # after the last line's end: a process was killed while it wrote

    def warnings(self) -> list[str]:
        """A line for every damaged one; a torn end is normal after a kill and not among them."""
        return [f"{self.path} line {number} is damaged and not used" for number, _ in self.damaged]


def read_json_lines(path: Path) -> JsonLines:
    """Every line that is a JSON object, and apart from them those that are not. Raises OSError."""
    *lines, torn = path.read_bytes().split(b"\n")
    found = JsonLines(path, torn=torn)
    for number, line in enumerate(lines, 1):
        record = json_object(line)
        if record is None:
            found.damaged.append((number, line))
        else:
            found.records.append(record)
    return found


def json_object(line: bytes) -> dict[str, Any] | None:
    """The JSON object that a line holds; None if it holds anything else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def read_object(path: Path, fix: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # RecursionError: brackets without end
        raise ValueError(f"{path} is not valid JSON ({error}); {fix}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no keys; {fix}")
    return values
