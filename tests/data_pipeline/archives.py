"""Archives for tests."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path


def tar(path: Path, members: dict[str, str | bytes], compress: Callable[[bytes], bytes]) -> Path:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, text in members.items():
            data = text.encode() if isinstance(text, str) else text
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    path.write_bytes(compress(buffer.getvalue()))
    return path
