"""A web server on loopback whose answers go wrong in the ways real ones do, by the first part of the path."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

CUT = 100_000  # bytes after which `cut` and `cutplain` close the connection


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.requests: list[tuple[str, str | None]] = []  # (path, Range)
        self.go_on = threading.Event()  # lets `hold` send its second half

    def url(self, mode: str, path: str = "") -> str:
        return f"http://127.0.0.1:{self.server_port}/{mode}/{path}"


class Handler(BaseHTTPRequestHandler):
    """MODE/PATH below the root. Modes: range; plain, which ignores Range; cut, with ranges, and cutplain,
    which break off after CUT bytes; changed, which does so once and then has another file; hold, which stops
    half-way, and holdtar, which does so in shards; wrong, another content of the same length; silent, without
    a length; error.
    """

    server: Server

    def do_GET(self) -> None:  # noqa: N802 (the name is the base class's)
        mode, _, name = unquote(urlsplit(self.path).path).lstrip("/").partition("/")
        asked = self.headers.get("Range")
        self.server.requests.append((self.path, asked))
        path = self.server.root / name
        if mode == "error" or not path.is_file():
            self.send_error(503 if mode == "error" else 404)
            return
        data = path.read_bytes()
        if mode == "wrong" or (mode == "changed" and len(self.server.requests) > 1):
            data = data[::-1]
        tag = f'"{hashlib.sha256(data).hexdigest()}"'
        if self.headers.get("If-Range", tag) != tag:
            asked = None
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and "plain" not in mode else 0
        if start >= len(data) > 0:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", tag)
        if mode != "silent":
            self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        rest = data[start:]
        if (mode == "hold" or (mode == "holdtar" and name.endswith(".tar"))) and not start:
            self.wfile.write(rest[: len(rest) // 2])
            self.wfile.flush()
            self.server.go_on.wait(60)
            rest = rest[len(rest) // 2 :]
        cut = mode.startswith("cut") or (mode == "changed" and len(self.server.requests) == 1)
        self.wfile.write(rest[:CUT] if cut else rest)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(root: Path) -> Iterator[Server]:
    with Server(root) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield server
        finally:
            server.go_on.set()
            server.shutdown()
