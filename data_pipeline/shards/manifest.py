"""The manifest of a data folder: what the folder holds, and the checks of its files against it."""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.files import write_file
from data_pipeline.errors import DataError
from data_pipeline.shards.format import EXTENSION, FORMAT

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
SPLITS = ("train", "validation")
REBUILD = "build it again with data_pipeline/build.py"


@dataclass(frozen=True)
class Shard:
    file: str  # NAME.tar; its index is NAME.idx
    bytes: int
    sha256: str
    index_bytes: int
    index_sha256: str
    members: int
    documents: int
    tokens: int

    @property
    def stem(self) -> str:
        return self.file.removesuffix(".tar")

    @property
    def index_file(self) -> str:
        return f"{self.stem}.idx"


@dataclass(frozen=True)
class Split:
    documents: int
    tokens: int
    text_bytes: int  # UTF-8
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Source:
    weight: float
    splits: dict[str, Split]
    labelled: bool = False  # every document has labels, which replace the next token as the target


@dataclass(frozen=True)
class Manifest:
    path: Path  # the data folder
    sha256: str  # of manifest.json
    build_hash: str  # of recipe and input files
    recipe: dict[str, Any]
    tokenizer_bytes: int
    tokenizer_sha256: str
    vocab_size: int
    dtype: str  # of the tokens, "<u2" or "<u4"
    sources: dict[str, Source]

    @property
    def tokenizer_path(self) -> Path:
        return self.path / TOKENIZER

    def shards(self) -> Iterator[Shard]:
        for source in self.sources.values():
            for split in source.splits.values():
                yield from split.shards


def write_manifest(manifest: Manifest) -> None:
    """Write `manifest.json`; call it last: a folder with a manifest counts as complete."""
    fields = asdict(manifest)
    del fields["path"], fields["sha256"]
    text = json.dumps({"format": FORMAT, **fields}, indent=1, ensure_ascii=False)
    write_file(manifest.path / MANIFEST, text.encode() + b"\n")


def open_manifest(path: str | Path) -> Manifest:
    """Read and check the manifest of a data folder.

    Raises DataError that names the culprit: folder or manifest missing or unreadable; a shard missing, of
    another size or not the shard of its name; an index or tokenizer whose sha256 is not the manifest's.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"data folder {folder} does not exist: fix the path or {REBUILD}")
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{folder} has no {MANIFEST}, so its build never finished: {REBUILD}")
    manifest = parse_manifest(folder, (folder / MANIFEST).read_bytes())
    check_size(manifest.tokenizer_path, manifest.tokenizer_bytes)
    check_sha256(manifest.tokenizer_path, manifest.tokenizer_sha256)
    for shard in manifest.shards():
        check_size(folder / shard.file, shard.bytes)
        check_size(folder / shard.index_file, shard.index_bytes)
        check_sha256(folder / shard.index_file, shard.index_sha256)
        _check_identity(folder, shard)
    return manifest


def check_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise DataError(f"{path} is missing: {REBUILD}")
    if path.stat().st_size != size:
        raise DataError(f"{path} has {path.stat().st_size} bytes, the manifest says {size}: {REBUILD}")


def check_sha256(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise DataError(f"{path} has sha256 {found[:16]}..., the manifest says {sha256[:16]}...: {REBUILD}")


def _check_identity(folder: Path, shard: Shard) -> None:
    """A shard's members carry its name, which distinguishes shards of equal size without reading them."""
    offset = int(read_index(folder, shard)[0]["offset"][0])
    with (folder / shard.file).open("rb") as file:
        file.seek(offset - tarfile.BLOCKSIZE)
        name = file.read(100).split(b"\0")[0]
    if name != f"{shard.stem}-{0:06d}.{EXTENSION}".encode():
        raise DataError(f"{folder / shard.file} is another file: its first member is {name!r}: {REBUILD}")


def read_index(folder: Path, shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    """(members of INDEX_DTYPE, documents of DOCUMENT_DTYPE) of a shard whose index passed its checks."""
    with (folder / shard.index_file).open("rb") as file:
        return np.load(file, allow_pickle=False), np.load(file, allow_pickle=False)


def parse_manifest(folder: Path, data: bytes) -> Manifest:
    """The manifest in these bytes; looks at no file in `folder`. Raises DataError."""
    try:
        fields = json.loads(data)
        version = fields.pop("format")
        if version != FORMAT:
            raise DataError(f"{folder / MANIFEST} has format {version}, this code reads {FORMAT}: {REBUILD}")
        sources = {
            name: Source(
                source["weight"],
                {
                    split: Split(**{**value, "shards": tuple(Shard(**shard) for shard in value["shards"])})
                    for split, value in source["splits"].items()
                },
                source["labelled"],
            )
            for name, source in fields.pop("sources").items()
        }
        manifest = Manifest(path=folder, sha256=hashlib.sha256(data).hexdigest(), sources=sources, **fields)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / MANIFEST} is not a manifest ({error}): {REBUILD}") from error
    for shard in manifest.shards():
        if shard.file != f"{Path(shard.stem).name}.tar":  # nothing outside the folder is ever opened
            raise DataError(f"{folder / MANIFEST} names a shard outside its folder: {shard.file!r}")
    return manifest
