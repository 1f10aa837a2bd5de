"""Downloads by http and https that are whole and of one version, or an error.

A broken connection is resumed as long as that brings new bytes. Only a strong ETag tells whether the rest is
of the same version; without one the download starts over, unless the caller compares checksums.
"""

import http.client
import io
import os
import re
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

from tqdm import tqdm

from data_pipeline.errors import DataError

CHUNK = 1 << 16  # bytes; a download that is killed loses no more
TIMEOUT = 60.0  # seconds without a byte
# urllib's own, without those for ftp, file and data: no redirect leads there.
HANDLERS = (
    ProxyHandler,
    UnknownHandler,
    HTTPHandler,
    HTTPSHandler,
    HTTPDefaultErrorHandler,
    HTTPRedirectHandler,
    HTTPErrorProcessor,
)
ELSEWHERE = "give a mirror, or download it yourself and name the local file"


def is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def download_http(url: str, file: io.FileIO, checked: bool = False) -> None:
    """All of `url` into `file`, open for appending.

    Args:
        checked: the caller compares the file with a known sha256. Then what the file holds is continued, and
            an answer may lack both length and ETag. Otherwise the file is emptied first, and nothing that
            could be short or a mixture of two versions is accepted.

    Raises DataError for another protocol, an answer like 404, a server that cannot be reached, a download
    that stays cut and, unless `checked`, an answer that is compressed or announces no end.
    """
    if not is_http(url):
        raise DataError(f"{url!r} is not an http or https URL: fix it")
    if not checked:
        file.truncate(0)
    reached = -1
    with progress(url, None) as bar:
        transfer = _Transfer(url, file, checked, bar)
        while reason := transfer.attempt():
            size = file.seek(0, os.SEEK_END)
            if size <= reached:
                got = f"cut after {size} bytes" if size else "cannot be fetched"
                raise DataError(f"{url}: {got} ({reason}): check the network and run it again")
            reached = size


class _Transfer:
    """One file on its way, and which version of it has begun to arrive."""

    def __init__(self, url: str, file: io.FileIO, checked: bool, bar: Any) -> None:
        self._url, self._file, self._checked, self._bar = url, file, checked, bar
        self._opener = OpenerDirector()
        for handler in HANDLERS:
            self._opener.add_handler(handler())
        self._etag = ""  # a strong one
        self._total: int | None = None  # bytes of the whole file

    def attempt(self) -> str:
        """One request for what is missing; returns why it broke off, "" if the file is complete."""
        start = self._file.seek(0, os.SEEK_END)
        if start and not (self._etag or self._checked):
            return self._start_over()
        headers = {"User-Agent": "zeromodel", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
            if self._etag:
                headers["If-Range"] = self._etag  # a changed file is sent from its start
        try:
            answer = self._opener.open(Request(self._url, headers=headers), timeout=TIMEOUT)
        except HTTPError as error:
            with error:
                return self._refused(error, start)
        except (http.client.HTTPException, OSError) as error:
            return _reason(error)
        except ValueError as error:  # of an address, perhaps one that the server redirects to
            raise DataError(f"{self._url} cannot be fetched ({one_line(str(error))}): fix it") from error
        with answer:
            return self._receive(answer, start)

    def _start_over(self) -> str:
        self._file.truncate(0)
        self._etag, self._total = "", None
        return self.attempt()

    def _refused(self, error: HTTPError, start: int) -> str:
        if error.code == 416 and start:  # nothing is left to send, or the file has become shorter
            known = self._etag or self._checked
            if known and error.headers.get("Content-Range") == f"bytes */{start}":
                return ""
            return self._start_over()
        later = error.code == 429 or error.code >= 500
        fix = "run it again later" if later else "fix the URL"
        raise DataError(
            f"{self._url}: {error.code} {one_line(str(error.reason))}: {fix}, or give a mirror"
        ) from error

    def _receive(self, answer: http.client.HTTPResponse, start: int) -> str:
        if answer.status not in (200, 206):
            raise DataError(f"{self._url}: {answer.status} {one_line(answer.reason)}: fix the URL")
        if answer.status == 206 and not self._continues(answer, start):
            found = one_line(answer.headers.get("Content-Range", "no range"))
            return self._start_over() if start else f"it sent a part that was not asked for, {found}"
        if answer.status == 200:
            start = 0
            self._file.truncate(0)
            self._total = self._announced(answer)
        etag = answer.headers.get("ETag", "")
        self._etag = etag if etag.startswith('"') else ""
        self._check_encoding(answer.headers.get("Content-Encoding", ""))
        self._bar.total, self._bar.n = self._total, start
        while True:
            try:
                data = answer.read(CHUNK)
            except (http.client.HTTPException, OSError, ValueError) as error:
                return _reason(error)
            if not data:
                break
            write(self._file, data)
            self._bar.update(len(data))
        size = self._file.seek(0, os.SEEK_END)
        return "" if self._total in (None, size) else f"{self._total} bytes were announced"

    def _continues(self, answer: http.client.HTTPResponse, start: int) -> bool:
        """Whether this is the rest, up to the end, of the version whose first `start` bytes are here."""
        found = re.fullmatch(r"bytes ([0-9]+)-([0-9]+)/([0-9]+)", answer.headers.get("Content-Range", ""))
        if not start or not found:
            return False
        first, last, total = map(int, found.groups())
        if first != start or last + 1 != total or self._total not in (None, total):
            return False
        if self._etag and answer.headers.get("ETag") != self._etag:
            return False
        self._total = total
        return True

    def _announced(self, answer: http.client.HTTPResponse) -> int | None:
        """Bytes of the body; None if its end is marked in the body, or not at all."""
        lengths = set(answer.headers.get_all("Content-Length", []))
        if answer.chunked:
            return None
        if not lengths:
            if self._checked:
                return None
            raise DataError(
                f"{self._url} announces no length, so that a cut could not be told from its end: {ELSEWHERE}"
            )
        length = lengths.pop()
        if lengths or not re.fullmatch(r"[0-9]{1,18}", length):
            raise DataError(
                f"{self._url}: Content-Length {one_line(length)!r} is not one number: {ELSEWHERE}"
            )
        return int(length)

    def _check_encoding(self, encoding: str) -> None:
        """A .gz that is sent "as gzip" is the file itself. A checksum tells for every other."""
        name = urlsplit(self._url).path
        own = encoding.lower() in ("", "identity") or (encoding.lower() == "gzip" and name.endswith(".gz"))
        if not own and not self._checked:
            raise DataError(f"{self._url} is sent compressed ({one_line(encoding)}): {ELSEWHERE}")


def _reason(error: Exception) -> str:
    return one_line(str(getattr(error, "reason", "") or error)) or type(error).__name__


def one_line(text: str) -> str:
    """What a server says, fit for a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]


def write(file: io.FileIO, data: bytes) -> None:
    """All of `data`: an unbuffered file may take less at a time."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def progress(url: str, total: int | None) -> Any:
    """A bar of bytes on a terminal."""
    name = url.rsplit("/", 1)[-1]
    return tqdm(desc=name, total=total, unit="B", unit_scale=True, disable=None)
