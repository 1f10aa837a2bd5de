"""Files from elsewhere, each fetched once, whole or not at all.

`http` and `https` go through the standard library, every other protocol through fsspec. Nothing here runs a
shell or chains protocols.
"""

import errno
import fcntl
import hashlib
import io
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from common.files import sync_folder
from data_pipeline.errors import DataError
from data_pipeline.sources.http_download import CHUNK, download_http, is_http, one_line, progress, write

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_url(file: str) -> bool:
    """Whether `file` is a URL. Raises DataError for `pipe:`, chained protocols and broken URLs."""
    if file.startswith("pipe:") or "::" in file:
        raise DataError(f"{file!r}: commands and chained protocols are refused: give a plain path or URL")
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", file):
        return False
    if not file.isprintable():
        raise DataError(f"{file!r} has control characters: fix it")
    try:
        urlsplit(file)
    except ValueError as error:
        raise DataError(f"{file!r} is not a URL ({error}): fix it") from error
    return True


def expand(url: str) -> list[str]:
    """The URLs that a pattern with * or ? matches, sorted; http has no listing and is taken literally.

    Raises DataError for an unknown protocol, one that needs a package, and a pattern without a match.
    """
    if is_http(url) or not re.search(r"[*?]", url):
        return [url]
    with _backend_errors(url):
        system, path = _open_system(url)
        found = sorted(system.unstrip_protocol(name) for name in system.glob(path))
    if not found:
        raise DataError(f"{url} matches no file: fix the pattern")
    return found


def fetch(url: str, cache: Path) -> Path:
    """The local copy of `url` in the folder `cache`, fetched if it is not there.

    The name is a hash of the URL and its last part, so that the suffix still tells the format. A copy is
    never compared with the source again: delete it to fetch anew.
    """
    name = re.sub(r"[^A-Za-z0-9._-]", "_", unquote(urlsplit(url).path).rstrip("/").rsplit("/", 1)[-1])
    path = Path(cache) / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name[-100:]}"
    with unfinished(path) as file:
        if file:
            download(url, file)
    return path


def download(url: str, file: io.FileIO, checked: bool = False) -> None:
    """All of `url` into `file`, open for appending.

    Args:
        checked: the caller compares the file with a known sha256, so that what `file` holds may be continued
            and an answer without an announced end is taken. Otherwise the file starts empty, and nothing that
            could be short or a mixture of two versions is taken.

    Raises DataError if it cannot be read, or not safely.
    """
    if is_http(url):
        download_http(url, file, checked)
    else:
        _fetch_fsspec(url, file)


@contextmanager
def unfinished(path: Path) -> Iterator[io.FileIO | None]:
    """PATH.part to append to, renamed to `path` on leaving without an error; None if `path` is there already.

    The part is locked, so that one of several processes fetches and the others wait for it.
    """
    part = path.with_name(f"{path.name}.part")
    if path.exists():
        yield None
        return
    part.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with part.open("a+b", buffering=0) as file:  # nothing buffered that closing would try to write again
            _lock(file, part)
            mine = part.exists() and os.path.samestat(os.fstat(file.fileno()), part.stat())
            if path.exists():  # another process was faster
                if mine:
                    part.unlink()
                yield None
                return
            if mine:
                with writing(part):
                    yield file
                    os.fsync(file.fileno())
                part.replace(path)
                sync_folder(part.parent)
                return


def _lock(file: io.FileIO, part: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        raise DataError(
            f"{part} cannot be locked ({error.strerror}), so two processes could mix their bytes: choose a "
            "folder on another file system"
        ) from error


@contextmanager
def writing(part: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise DataError(
            f"{part}: {error.strerror} after {part.stat().st_size} bytes, "
            f"{shutil.disk_usage(part.parent).free} are free: free some space and run it again"
        ) from error


# ---- fsspec


def _open_system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    system, path = url_to_fs(url)
    return system, path


@contextmanager
def _backend_errors(url: str) -> Iterator[None]:
    """Each backend of fsspec has its own errors; all of them mean that this URL cannot be read."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        reason = one_line(f"{type(error).__name__}: {error}")
        raise DataError(f"{url} cannot be fetched ({reason}): fix it") from error


def _fetch_fsspec(url: str, file: io.FileIO) -> None:
    file.truncate(0)
    with _backend_errors(url):
        system, path = _open_system(url)
        size, version = system.size(path), system.ukey(path)
        if size is None:
            raise OSError("its size is unknown, so that a cut could not be told from its end")
        with system.open(path, "rb") as source, progress(url, size) as bar:
            while data := source.read(CHUNK):
                write(file, data)
                bar.update(len(data))
        if file.tell() != size:
            raise OSError(f"{file.tell()} bytes of {size}")
        system.invalidate_cache()
        if system.ukey(path) != version:
            raise OSError("it changed while it was read; run it again")
