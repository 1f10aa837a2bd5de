"""The manifest of a data folder: what the folder holds, and the checks of its files against it."""

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from common.files import write_file
from common.schema import from_plain
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
        _check_index(folder, shard)
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


def _check_index(folder: Path, shard: Shard) -> None:
    """The index has as many members, documents and tokens as the manifest says, and the shard's members carry
    its name, which distinguishes shards of equal size without reading them.
    """
    members, documents = read_index(folder, shard)
    found = (len(members), len(documents), int(documents["length"].sum(dtype=np.int64)))
    told = (shard.members, shard.documents, shard.tokens)
    if found != told:
        raise DataError(
            f"{folder / shard.index_file} has {found} members, documents, tokens, the manifest says {told}: "
            f"{REBUILD}"
        )
    with (folder / shard.file).open("rb") as file:
        file.seek(int(members["offset"][0]) - tarfile.BLOCKSIZE)
        name = file.read(100).split(b"\0")[0]
    if name != f"{shard.stem}-{0:06d}.{EXTENSION}".encode():
        raise DataError(f"{folder / shard.file} is another file: its first member is {name!r}: {REBUILD}")


def read_index(folder: Path, shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    """(members of INDEX_DTYPE, documents of DOCUMENT_DTYPE) of a shard whose index passed its checks."""
    with (folder / shard.index_file).open("rb") as file:
        return np.load(file, allow_pickle=False), np.load(file, allow_pickle=False)


# What is in the file: a manifest without what is known of the file itself.
_STORED = make_dataclass(
    "_STORED",
    [
        (field.name, get_type_hints(Manifest)[field.name])
        for field in fields(Manifest)
        if field.name not in ("path", "sha256")
    ],
)


def parse_manifest(folder: Path, data: bytes) -> Manifest:
    """The manifest in these bytes; looks at no file in `folder`. Raises DataError."""
    path = folder / MANIFEST
    try:
        values = json.loads(data)
        version = values.pop("format")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is not a manifest ({error!r}): {REBUILD}") from error
    if version != FORMAT:
        raise DataError(f"{path} has format {version}, this code reads {FORMAT}: {REBUILD}")
    try:
        stored: Any = from_plain(_STORED, values, "manifest")
        _check_values(stored)
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): {REBUILD}") from error
    return Manifest(path=folder, sha256=hashlib.sha256(data).hexdigest(), **vars(stored))


def _check_values(stored: Any) -> None:
    """Raises ValueError for values that no build writes, and for sums that are not those of their parts."""
    if stored.dtype not in ("<u2", "<u4"):
        raise ValueError(f"dtype {stored.dtype!r} is neither <u2 nor <u4")
    if not 0 < stored.vocab_size <= np.iinfo(stored.dtype).max + 1:
        raise ValueError(f"vocab_size {stored.vocab_size} is not one of {stored.dtype} tokens")
    if not stored.sources:
        raise ValueError("it has no sources")
    for name, source in stored.sources.items():
        if source.weight <= 0 or not {"train"} <= source.splits.keys() <= set(SPLITS):
            raise ValueError(f"source {name!r} has weight {source.weight} and splits {list(source.splits)}")
        for split, value in source.splits.items():
            for number, shard in enumerate(value.shards):
                # Nothing outside the folder is ever opened.
                if shard.file != f"{name}-{split}-{number:05d}.tar" or not re.fullmatch("[a-z0-9_]+", name):
                    raise ValueError(f"{name}, {split}: shard {number} is called {shard.file!r}")
                if min(shard.members, shard.documents) < 1 or shard.tokens < 0:
                    raise ValueError(f"{shard.file} has no members or documents")
            sums = tuple(sum(getattr(s, what) for s in value.shards) for what in ("documents", "tokens"))
            if (value.documents, value.tokens) != sums or value.text_bytes < 0:
                raise ValueError(f"{name}, {split}: documents and tokens are not the sums of its shards")
