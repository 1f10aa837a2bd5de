"""Download the published data sets from their official sources into the data folder.

    python data_pipeline/download.py [NAMES...] --out DIR [--mirror URL] [--list]

Every file is compared with its sha256 before it gets its name; good files are left alone and an interrupted
download resumes where it stopped. A mirror is a web server that lays the files out as the data folder does.
"""

import argparse
import hashlib
import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from common.errors import user_errors
from common.nearest import nearest
from data_pipeline.errors import DataError
from data_pipeline.sources.http_download import download_http
from data_pipeline.sources.problems import PROBLEM_SETS
from data_pipeline.sources.published import GITHUB, DataSet, File
from data_pipeline.sources.remote import unfinished
from data_pipeline.sources.traced import PROSQA

TINYSHAKESPEARE = DataSet(
    "tinyshakespeare",
    "MIT; the text is in the public domain",
    "https://github.com/karpathy/char-rnn",
    (
        File(
            "text/tinyshakespeare.txt",
            f"{GITHUB}/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt",
            "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        ),
    ),
)
DATA_SETS = (*(problems for problems in PROBLEM_SETS if problems.files), PROSQA, TINYSHAKESPEARE)


def download(data_set: DataSet, out: Path, mirror: str | None = None) -> int:
    """Bring the files of `data_set` into the folder `out`; returns how many were missing.

    Raises DataError for a file that cannot be fetched or has another sha256, before or after the download; an
    existing file of one of the names is never overwritten.
    """
    missing = [file for file in data_set.files if not _is_there(file, out)]
    if not missing:
        return 0
    if mirror is None and data_set.archive:
        archive = out / data_set.archive.path
        if not _is_there(data_set.archive, out):
            _download(data_set.archive.source, data_set.archive, out)
        for file in missing:
            _extract(archive, file, out)
        archive.unlink(missing_ok=True)  # another process may have done so
    else:
        for file in missing:
            _download(f"{mirror.rstrip('/')}/{quote(file.path)}" if mirror else file.source, file, out)
    return len(missing)


def _is_there(file: File, out: Path) -> bool:
    path = out / file.path
    if not path.exists():
        return False
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != file.sha256:
        raise DataError(
            f"{path} has sha256 {found}, not {file.sha256}: move it away, or choose another --out"
        )
    return True


def _download(url: str, file: File, out: Path) -> None:
    with unfinished(out / file.path) as part:
        while part:
            resumed = part.seek(0, os.SEEK_END) > 0
            download_http(url, part, checked=True)
            part.seek(0)
            found = hashlib.file_digest(part, "sha256").hexdigest()
            if found == file.sha256:
                return
            part.truncate(0)
            if not resumed:  # else its beginning may be of another version
                raise DataError(f"{url} has sha256 {found}, not {file.sha256}: it has changed or is damaged")


def _extract(archive: Path, file: File, out: Path) -> None:
    """One member of a zip to its own path; the member's name is compared, never used."""
    with unfinished(out / file.path) as part:
        if not part:
            return
        part.truncate(0)
        try:
            with zipfile.ZipFile(archive) as members, members.open(file.source) as member:
                shutil.copyfileobj(member, part)
        except (zipfile.BadZipFile, KeyError) as error:
            raise DataError(f"{archive}: no good member {file.source!r} ({error}): delete it") from error
        part.seek(0)
        found = hashlib.file_digest(part, "sha256").hexdigest()
        if found != file.sha256:
            raise DataError(f"{archive}: {file.source} has sha256 {found}, not {file.sha256}: delete it")


def _select(names: Sequence[str]) -> list[DataSet]:
    known = {data_set.name: data_set for data_set in DATA_SETS}
    for name in names:
        if name not in known:
            raise DataError(f"unknown data set {name!r}; {nearest(name, list(known))}")
    return [known[name] for name in dict.fromkeys(names or known)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Download the published data sets.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="data sets (default: all)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("DATA_ROOT", "data")),
        help="data folder (default: DATA_ROOT, else data)",
    )
    parser.add_argument("--mirror", metavar="URL", help="server that holds the files as the data folder does")
    parser.add_argument("--list", action="store_true", help="list the data sets and download nothing")
    arguments = parser.parse_args(argv)
    with user_errors(DataError, OSError):
        for data_set in _select(arguments.names):
            about = f"{data_set.name:16} licence: {data_set.licence}; {data_set.homepage}"
            if arguments.list:
                print(about, *(f"  {file.path}" for file in data_set.files), sep="\n")
            else:
                new = download(data_set, arguments.out, arguments.mirror)
                print(f"{about}; {new} new, {len(data_set.files) - new} already there", flush=True)


if __name__ == "__main__":
    main()
