"""Download the published data sets from their official sources into the data folder.

    python data_pipeline/download.py [NAMES...] --out DIR [--mirror URL] [--list]

Every file is compared with its sha256 before it gets its name; good files are left alone and a broken
download goes on where it stopped. A mirror is a web server with the files laid out as in the data folder.
"""

import argparse
import hashlib
import os
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from common.errors import user_errors
from common.nearest import nearest
from data_pipeline.errors import DataError
from data_pipeline.sources.remote import download_http, unfinished


@dataclass(frozen=True)
class File:
    path: str  # below the data folder
    source: str  # URL, or the name in the data set's archive
    sha256: str


@dataclass(frozen=True)
class DataSet:
    name: str
    licence: str
    homepage: str
    files: tuple[File, ...]
    archive: File | None = None  # a zip that holds the files; removed once they are taken out


def _files(folder: str, base: str, sums: str) -> tuple[File, ...]:
    """Files of one place; `sums` is what sha256sum prints."""
    rows = [line.split() for line in sums.strip().splitlines()]
    return tuple(File(f"{folder}/{Path(name).name}", base + name, sha256) for sha256, name in rows)


_GITHUB = "https://raw.githubusercontent.com"
_GSM8K = f"{_GITHUB}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
_SHAKESPEARE = f"{_GITHUB}/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/"

DATA_SETS = (
    DataSet(
        "gsm8k",
        "MIT",
        "https://github.com/openai/grade-school-math",
        _files(
            "gsm8k",
            _GSM8K,
            """
    17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465  grade_school_math/data/train.jsonl
    3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14  grade_school_math/data/test.jsonl
    86bbb73e855821d7c401912fd4bf82e34313e6e3b6fd6f909f2b6cc9e209a53b  LICENSE
        """,
        ),
    ),
    DataSet(
        "logiqa",
        "none stated by its authors; published for research",
        "https://github.com/lgw863/LogiQA-dataset",
        _files(
            "logiqa",
            f"{_GITHUB}/lgw863/LogiQA-dataset/master/",
            """
    7d5bb1f58278e33b395744cd2ad8d7600faa0b3c4d615c659a44ec1181d759fa  Train.txt
    4c49e6753b7262c001506b9151135abf722247035ab075dad93acdea5789c01f  Eval.txt
    359acb78c37802208f7fde9e2f6574b8526527c63d6a336f90a53f1932cb4701  Test.txt
        """,
        ),
    ),
    DataSet(
        "babi",
        "CC BY 3.0",
        "https://research.facebook.com/downloads/babi/",
        # The address of the paper is gone; its authors' laboratory serves version 1.2 with ParlAI.
        (
            File(
                "babi/tasks_1-20_v1-2.tar.gz",
                "https://dl.fbaipublicfiles.com/parlai/babi/babi.tar.gz",
                "f7f0bee187efca0d81c3daac1b162cda4eb7f9505dee5ad6846eabbed3dbf92e",
            ),
        ),
    ),
    DataSet(
        "arc",
        "CC BY-SA 4.0",
        "https://allenai.org/data/arc",
        _files(
            "arc",
            "ARC-V1-Feb2018-2/",
            """
    c62e5482d8c01f2d5a7f24239ac9db3b12f9e47267c4e3f088c6ffe41d5545ef  ARC-Easy/ARC-Easy-Train.jsonl
    f4364b808a68df6bf500ce1070fb0105d40cacd2391c210deb00ff83ba75d1f4  ARC-Easy/ARC-Easy-Dev.jsonl
    ce32a0774b4beb1977d2c6b16dda5dd2b24fdc9c7f506882c452678676bd09be  ARC-Easy/ARC-Easy-Test.jsonl
    e02837c53ee86f6d73c259f91c77725c5062ef4531130b7f473a9d9b01118a77  ARC-Challenge/ARC-Challenge-Train.jsonl
    55224364abd2477f66a9a57c5cbef109fb71d83019aa5e37aec0e7ab757746ca  ARC-Challenge/ARC-Challenge-Dev.jsonl
    9fa8ffb3e3a1f88cb302d53dd95aae81e39209ad9bcf974376b319d8fd35717c  ARC-Challenge/ARC-Challenge-Test.jsonl
        """,
        ),
        archive=File(
            "arc/ARC-V1-Feb2018.zip",
            "https://ai2-public-datasets.s3.amazonaws.com/arc/ARC-V1-Feb2018.zip",  # 681 MB
            "6d2d5ab50b2ceec6ba5f79c921be77cf2de712ea25a2b3f4fff3acc101cecfa0",
        ),
    ),
    DataSet(
        "prosqa",
        "MIT",
        "https://github.com/facebookresearch/coconut",
        _files(
            "prosqa",
            f"{_GITHUB}/facebookresearch/coconut/main/",
            """
    99e40ce7e9107fd02e35bcd78a7a4479bd57f415bab0a6efd37cc11a72e594f6  data/prosqa_train.json
    c74e0de24f1e90ec48b1a993e6458a7be4caeef3928f5104e3c2e45d689a5249  data/prosqa_valid.json
    82ddc0afe6ee30eb31bb16fa208e293e55278a20fa987098d48519cae7e12680  data/prosqa_test.json
    cf9b17822d1fcd4ff32ccbe14183386fb3adf6f2ff92dc184130823f7fc28173  LICENSE
        """,
        ),
    ),
    DataSet(
        "tinyshakespeare",
        "MIT; the text is in the public domain",
        "https://github.com/karpathy/char-rnn",
        (
            File(
                "text/tinyshakespeare.txt",
                f"{_SHAKESPEARE}data/tinyshakespeare/input.txt",
                "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            ),
        ),
    ),
)


def download(data_set: DataSet, out: Path, mirror: str | None = None) -> int:
    """Bring the files of `data_set` into the folder `out`; returns how many were not there before.

    Raises DataError for a file that cannot be had or has another sha256, before or after the download; a
    file that is there under one of the names is never overwritten.
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
        archive.unlink()
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
            download_http(url, part)
            part.seek(0)
            found = hashlib.file_digest(part, "sha256").hexdigest()
            if found == file.sha256:
                return
            part.truncate(0)
            if not resumed:  # else its beginning may have been of another version
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
    parser.add_argument("--list", action="store_true", help="say what there is and download nothing")
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
