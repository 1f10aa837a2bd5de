"""Files as streams of text, JSON rows and archive members; every error names the file."""

import bz2
import gzip
import json
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from data_pipeline.errors import DataError


def require_file(path: Path) -> Path:
    """`path` as a Path. Raises DataError if there is no such file."""
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"{path} does not exist: set --data or DATA_ROOT to the folder that holds the data sets"
        )
    return path


class _Text:
    """A text file opened as UTF-8 whose decoding errors name the file."""

    def __init__(self, path: Path) -> None:
        self.path = require_file(path)

    def __enter__(self) -> IO[str]:
        self.file = self.path.open(encoding="utf-8", newline="\n")
        return self.file

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.file.close()
        if isinstance(error, UnicodeDecodeError):
            raise DataError(f"{self.path} is not UTF-8 text ({error.reason}): download it again") from error


def open_text(path: Path) -> _Text:
    return _Text(path)


def json_lines(path: Path, keys: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path} line {number}: not JSON ({error.msg}): download it again") from error
            missing = [key for key in keys if not isinstance(row, dict) or key not in row]
            if missing:
                raise DataError(f"{path} line {number}: no field {missing[0]!r}: is this the right file?")
            yield number, row


_OPENERS: dict[str, Callable[..., Any]] = {
    ".xz": lzma.open, ".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open,
}  # fmt: skip


def tar_members(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the regular files of a tar, compressed or not, in the order of the archive."""
    opener = _OPENERS.get(require_file(path).suffix, open)
    try:
        with opener(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                if member.isfile():
                    file = archive.extractfile(member)
                    assert file is not None
                    yield member.name, file.read()
            # tarfile takes a damaged header for the end, and a compressed file's checksum stands behind the
            # last member: only zeros may follow, and reading them compares the checksum.
            if opener is open:
                stream.seek(archive.offset)
            rest = stream.read()
            if len(rest) < tarfile.BLOCKSIZE or any(rest):
                raise tarfile.ReadError("no end of archive after its last member")
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} is not a whole tar archive ({error}): download it again") from error


def decode(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text ({error.reason} at byte {error.start})") from error
