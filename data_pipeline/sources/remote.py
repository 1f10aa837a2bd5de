"""Files from elsewhere, each fetched once, whole or not at all.

`http` and `https` go through the standard library, every other protocol through fsspec. Nothing here runs a
shell or chains protocols.
"""

import errno
import fcntl
import hashlib
import http.client
import io
import os
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

from data_pipeline.errors import DataError

CHUNK = 1 << 16  # bytes; a download that is killed loses no more
TIMEOUT = 60.0  # seconds without a byte
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_url(file: str) -> bool:
    """Whether `file` is a URL. Raises DataError for `pipe:`, chained protocols and broken URLs."""
    if file.startswith("pipe:") or "::" in file:
        raise DataError(f"{file!r}: commands and chained protocols are refused: give a plain path or URL")
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", file):
        return False
    try:
        urlsplit(file)
    except ValueError as error:
        raise DataError(f"{file!r} is not a URL ({error}): fix it") from error
    return True


def expand(url: str) -> list[str]:
    """The URLs that a pattern with * or ? matches, sorted; http has no listing and is taken literally.

    Raises DataError for an unknown protocol, one that needs a package, and a pattern without a match.
    """
    if _is_http(url) or not re.search(r"[*?]", url):
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


def download(url: str, file: io.FileIO) -> None:
    """All of `url` into `file`, open for appending, from its start. Raises DataError if it cannot be read."""
    file.truncate(0)  # what an earlier process left may be of another version
    download_http(url, file) if _is_http(url) else _fetch_fsspec(url, file)


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
            fcntl.flock(file, fcntl.LOCK_EX)
            mine = part.exists() and os.path.samestat(os.fstat(file.fileno()), part.stat())
            if path.exists():  # another process was faster
                if mine:
                    part.unlink()
                yield None
                return
            if mine:
                with _write_errors(part):
                    yield file
                    os.fsync(file.fileno())
                part.replace(path)
                return


@contextmanager
def _write_errors(part: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise DataError(
            f"{part}: {error.strerror} after {part.stat().st_size} bytes: free some space and run it again"
        ) from error


# ---- http


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def download_http(url: str, file: io.FileIO) -> None:
    """Append to `file`, open for appending, what it lacks of `url`; start over if the server cannot resume.

    A broken connection is resumed as long as that brings new bytes. Raises DataError for other
    protocols, an answer like 404, a server that cannot be reached and a download that stays cut.
    """
    if not _is_http(url):
        raise DataError(f"{url!r} is not an http or https URL: fix it")
    headers = {"User-Agent": "zeromodel", "Accept-Encoding": "identity"}
    reached = -1
    with _bar(url, None) as bar:
        while reason := _transfer(url, file, headers, bar):
            size = file.seek(0, os.SEEK_END)
            if size <= reached:
                got = f"cut after {size} bytes" if size else "cannot be reached"
                raise DataError(f"{url}: {got} ({reason}): check the network and run it again")
            reached = size


def _transfer(url: str, file: io.FileIO, headers: dict[str, str], bar: Any) -> str:
    """One request for the rest of `url`; returns why it broke off, "" if the file is complete."""
    start = file.seek(0, os.SEEK_END)
    try:
        request = Request(url, headers=headers | ({"Range": f"bytes={start}-"} if start else {}))
        with urlopen(request, timeout=TIMEOUT) as answer:
            if answer.status == 206 and not answer.headers.get("Content-Range", "").startswith(
                f"bytes {start}-"
            ):
                return f"it sent {answer.headers.get('Content-Range')!r} for a range from {start}"
            if answer.status != 206:
                start = 0
                file.truncate(0)
            if answer.headers.get("ETag", "").startswith('"'):  # a changed file is sent from the start
                headers["If-Range"] = answer.headers["ETag"]
            length = answer.headers.get("Content-Length")
            total = start + int(length) if length else None
            bar.total, bar.n = total, start
            while data := answer.read(CHUNK):
                _write(file, data)
                bar.update(len(data))
        size = file.seek(0, os.SEEK_END)
        return "" if total in (None, size) else f"{total} bytes were announced"
    except HTTPError as error:
        if error.code == 416 and start:  # nothing is left to send, or the file has become shorter
            if error.headers.get("Content-Range") == f"bytes */{start}":
                return ""
            file.truncate(0)
            return _transfer(url, file, headers, bar)
        raise DataError(f"{url}: {error.code} {error.reason}: fix the URL, or give a mirror") from error
    except URLError as error:
        return str(error.reason)
    except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        return str(error) or type(error).__name__


def _write(file: io.FileIO, data: bytes) -> None:
    """All of `data`: an unbuffered file may take less at a time."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _bar(url: str, total: int | None) -> Any:
    name = url.rsplit("/", 1)[-1]
    return tqdm(desc=name, total=total, unit="B", unit_scale=True, disable=None)


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
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{url} cannot be fetched ({reason}): fix it") from error


def _fetch_fsspec(url: str, file: io.FileIO) -> None:
    with _backend_errors(url):
        system, path = _open_system(url)
        size = system.size(path)
        with system.open(path, "rb") as source, _bar(path, size) as bar:
            while data := source.read(CHUNK):
                _write(file, data)
                bar.update(len(data))
        if size is not None and file.tell() != size:
            raise OSError(f"{file.tell()} bytes of {size}")
