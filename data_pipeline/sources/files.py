"""Files as streams of text, rows and archive members; every error names the file and the line, row or member.

The suffix says how a file is compressed (.gz, .xz, .bz2, .zst). A compressed file counts as whole only if its
last stream ends where the file does: the standard readers, zstandard's above all, mistake some cuts for the
end.
"""

import bz2
import io
import json
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.errors import DataError

PLAIN_CHUNK = 1 << 20  # bytes
# Bytes of compressed input at a time; few, because the worst input grows to 32,768 times its size.
COMPRESSED_CHUNK = 1 << 14


def require_file(path: Path) -> Path:
    """`path` as a Path. Raises DataError if there is no such file."""
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"{path} does not exist: set --data or DATA_ROOT to the folder that holds the data sets"
        )
    return path


# ---- bytes


def _zstandard() -> tuple[Callable[[], Any], type[Exception]]:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj, zstandard.ZstdError


# Suffix -> a new decompressor and the error it raises on damage.
_DECOMPRESSORS: dict[str, Callable[[], tuple[Callable[[], Any], type[Exception]]]] = {
    ".gz": lambda: (lambda: zlib.decompressobj(wbits=31), zlib.error),
    ".tgz": lambda: (lambda: zlib.decompressobj(wbits=31), zlib.error),
    ".xz": lambda: (lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), lzma.LZMAError),
    ".bz2": lambda: (bz2.BZ2Decompressor, OSError),
    ".zst": _zstandard,
}


def _chunks(path: Path) -> Iterator[bytes]:
    """The content of a file, decompressed, in pieces. Raises OSError for a damaged or cut compressed file."""
    with require_file(path).open("rb") as file:
        if path.suffix not in _DECOMPRESSORS:
            yield from iter(lambda: file.read(PLAIN_CHUNK), b"")
            return
        new, damage = _DECOMPRESSORS[path.suffix]()
        decompressor = new()
        try:
            while data := file.read(COMPRESSED_CHUNK):
                while data:
                    if decompressor.eof:  # streams may follow one another, with zeros between them
                        data = data.lstrip(b"\0")
                        if not data:
                            break
                        decompressor = new()
                    if text := decompressor.decompress(data):
                        yield text
                    data = decompressor.unused_data if decompressor.eof else b""
        except damage as error:
            raise OSError(f"damaged: {error}") from error
        if not decompressor.eof:
            raise OSError("it ends too early")


class Stream(io.RawIOBase):
    """A file read forward, decompressed. Raises OSError as `_chunks` does, and for a seek backwards."""

    def __init__(self, path: Path) -> None:
        self._chunks = _chunks(Path(path))
        self._chunk = memoryview(b"")
        self._position = 0
        self.last = b""  # what the last read() returned

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._chunk:
            self._chunk = memoryview(next(self._chunks, b""))
        count = min(len(buffer), len(self._chunk))
        buffer[:count] = self._chunk[:count]
        self._chunk = self._chunk[count:]
        self._position += count
        return count

    def read(self, size: int = -1) -> bytes:
        """`size` bytes, fewer only at the end of the file; never allocates more than the file has."""
        parts = []
        while size:
            if not self._chunk:
                self._chunk = memoryview(next(self._chunks, b""))
            if not self._chunk:
                break
            part = bytes(self._chunk if size < 0 else self._chunk[:size])
            parts.append(part)
            self._chunk = self._chunk[len(part) :]
            size -= len(part) if size > 0 else 0
        self.last = b"".join(parts)
        self._position += len(self.last)
        return self.last

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or offset < self._position:
            raise OSError(f"a seek backwards from byte {self._position} to {offset}")
        while self._position < offset and self.read(min(PLAIN_CHUNK, offset - self._position)):
            pass
        return self._position


# ---- text


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, compressed or not, with their line feeds.

    Raises DataError for a missing, cut or damaged file, and with the line's number for other encodings.
    """
    number = 0
    try:
        for number, line in enumerate(io.BufferedReader(Stream(path), PLAIN_CHUNK), start=1):
            yield decode(line, f"{path} line {number}")
    except OSError as error:
        raise DataError(f"{path} line {number + 1}: cannot be read ({error}): download it again") from error


def decode(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 text ({error.reason} at byte {error.start}): download it again"
        ) from error


# ---- rows


def json_lines(path: Path, keys: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, row) of a JSON lines file, compressed or not; blank lines are skipped.

    Raises DataError for a line that is not a JSON object, lacks one of `keys` or holds half of a surrogate
    pair, which no encoding can write.
    """
    for number, line in enumerate(text_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
            if "\\ud" in line or "\\uD" in line:
                json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: half of a surrogate pair ({error.object[error.start]!r}): fix it"
            ) from error
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(f"{where}: not JSON ({reason}): download it again") from error
        missing = [key for key in keys if not isinstance(row, dict) or key not in row]
        if missing:
            raise DataError(f"{where}: no field {missing[0]!r}: name another file or field")
        yield number, row


def json_value(path: Path) -> Any:
    """The value of a JSON file.

    Raises DataError if it is not JSON, with the line, or holds half of a surrogate pair, see `json_lines`.
    """
    text = decode(require_file(path).read_bytes(), str(path))
    try:
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {error.lineno}: not JSON ({error.msg}): download it again") from error
    except UnicodeEncodeError as error:
        raise DataError(f"{path}: half of a surrogate pair ({error.object[error.start]!r})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise DataError(f"{path}: not JSON of problems ({error}): download it again") from error


def parquet_rows(path: Path, keys: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, {key: value}) of a parquet file; only the columns `keys` are read.

    Raises DataError for a missing or cut file, columns that are missing or not text, and damage as far
    as parquet can tell (its pages may have checksums, and compression often finds the rest).
    """
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        # pre_buffer or no buffer_size would hold a whole column of a row group at once.
        options = {"pre_buffer": False, "buffer_size": PLAIN_CHUNK, "page_checksum_verification": True}
        with parquet.ParquetFile(require_file(path), **options) as file:
            names = file.schema_arrow.names
            for key in keys:
                if names.count(key) != 1:
                    raise DataError(
                        f"{path}: no column {key!r}, or several: it has {', '.join(names)}: name one"
                    )
                _check_text_column(path, key, file.schema_arrow.field(key).type)
            for batch in file.iter_batches(batch_size=256, columns=list(keys), use_threads=False):
                for values in zip(*(batch.column(key) for key in keys), strict=True):
                    row = {key: value.as_py() for key, value in zip(keys, values, strict=True)}
                    number += 1
                    yield number, row
            if number != file.metadata.num_rows:
                raise DataError(
                    f"{path} row {number + 1}: the end, not row {file.metadata.num_rows}: download it again"
                )
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} row {number + 1}: cannot be read ({reason}): download it again") from error


def _check_text_column(path: Path, key: str, kind: Any) -> None:
    from pyarrow import types

    value = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(value) or types.is_large_string(value) or types.is_string_view(value)):
        raise DataError(f"{path}: column {key!r} is {kind}, not string: name another")


def text_fields(row: dict[str, Any], keys: Sequence[str], where: str) -> list[str]:
    """The values of `keys`, each checked to be text."""
    for key in keys:
        if not isinstance(row[key], str):
            raise DataError(f"{where}: field {key!r} is {type(row[key]).__name__}, not text: fix the file")
    return [row[key] for key in keys]


# ---- archives


def tar_members(path: Path, wanted: Callable[[str], Any] = lambda name: True) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the `wanted` files of a tar, compressed or not, in the order of the archive.

    Nothing is extracted, so no name can reach the disk. Raises DataError for a cut or damaged archive, and
    for a wanted member that is a link, a device or a sparse file or whose name leaves the archive's folder.
    """
    stream = Stream(require_file(path))
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                if member.isdir() or not wanted(member.name):
                    continue
                _check_member(path, member)
                file = archive.extractfile(member)
                assert file is not None
                yield member.name, file.read()
        # tarfile mistakes a damaged header for the end, and a compressed file's checksum follows the last
        # member: only zeros may follow, and reading them compares the checksum.
        size = 0
        while not any(stream.last) and stream.last:
            size += len(stream.last)
            stream.read(PLAIN_CHUNK)
        if stream.last or size < 2 * tarfile.BLOCKSIZE:
            raise tarfile.ReadError("no end of archive after its last member")
    except DataError:
        raise
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{path} is not a whole tar archive ({error}): download it again") from error


def _check_member(path: Path, member: tarfile.TarInfo) -> None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise DataError(f"{path}: member {member.name!r} leaves its folder: pack it with relative names")
    if not member.isreg() or member.issparse():
        raise DataError(
            f"{path}: member {member.name!r} is not a regular file: pack it with tar --dereference"
        )
