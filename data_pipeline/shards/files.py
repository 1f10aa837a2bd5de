"""Shards: plain tars of tokenised documents, readable by stock webdataset, with an index for random access.

A data folder holds `manifest.json`, `tokenizer.model` and, for every source and split,
`SOURCE-SPLIT-NNNNN.tar` with its `.idx`. A tar member (`SOURCE-SPLIT-NNNNN-MMMMMM.tokens`) holds up to 256
documents: their number, their lengths and the lengths of their masked prompts (0: none) as little-endian
uint32, then their tokens as little-endian uint16 (uint32 above 65,536 pieces). A member of a labelled source
goes on with one label a token in the same type: the id to predict at that token, or the type's largest value
for none (the build takes the wider type where that value is a piece). The `.idx` is two numpy arrays in a
row: INDEX_DTYPE for the members, DOCUMENT_DTYPE for all documents.

Sizes, indices and the tokenizer are checked by `open_manifest`, a member's checksum when it is first read,
the sha256 of everything by `verify.py`.
"""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.files import write_file
from data_pipeline.errors import DataError

FORMAT = 2
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
SPLITS = ("train", "validation")
MEMBER_DOCUMENTS = 256
SHARD_BYTES = 64 * 2**20
EXTENSION = "tokens"
# offset and size of the payload in the tar, in bytes
INDEX_DTYPE = np.dtype([("offset", "<u8"), ("size", "<u8"), ("documents", "<u4"), ("crc32", "<u4")])
DOCUMENT_DTYPE = np.dtype([("length", "<u4"), ("prompt", "<u4")])  # in tokens; prompt: the masked part
REBUILD = "build it again with data_pipeline/build.py"
IGNORE_INDEX = -100  # a label or target that is none


class EncodedDocument(NamedTuple):
    tokens: Sequence[int]
    prompt_length: int = 0  # leading tokens that are not to be predicted
    labels: Sequence[int] | None = None  # what to predict at each token, IGNORE_INDEX: nothing


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


# ---- writing


def token_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 65_536 else "<u4"


def write_shards(
    folder: Path,
    prefix: str,
    documents: Iterable[EncodedDocument],
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
) -> tuple[Shard, ...]:
    """Write documents as `folder/PREFIX-NNNNN.tar` + `.idx`, a new shard past `shard_bytes` of tokens and
    labels. Either all documents have labels or none.
    """
    shards: list[Shard] = []
    pending: list[_Stored] = []
    size = 0
    for document in documents:
        stored = _stored(document, dtype)
        assert not pending or (stored.labels is None) == (pending[0].labels is None)
        pending.append(stored)
        size += stored.tokens.nbytes * (1 if stored.labels is None else 2)
        if size >= shard_bytes:
            shards.append(_write_shard(folder, f"{prefix}-{len(shards):05d}", pending))
            pending, size = [], 0
    if pending:
        shards.append(_write_shard(folder, f"{prefix}-{len(shards):05d}", pending))
    return tuple(shards)


def write_shard(folder: Path, stem: str, documents: Iterable[EncodedDocument], dtype: str) -> Shard:
    """Write documents as `folder/STEM.tar` + `.idx`. Either all documents have labels or none."""
    return _write_shard(folder, stem, [_stored(document, dtype) for document in documents])


class _Stored(NamedTuple):
    """An EncodedDocument as it lies in a member."""

    tokens: np.ndarray
    prompt_length: int
    labels: np.ndarray | None


def _stored(document: EncodedDocument, dtype: str) -> _Stored:
    assert document.prompt_length <= len(document.tokens)
    tokens = np.asarray(document.tokens, dtype=dtype)
    if document.labels is None:
        return _Stored(tokens, document.prompt_length, None)
    labels = np.array(document.labels, dtype=np.int64)
    none = np.iinfo(dtype).max
    assert labels.shape == tokens.shape, (labels.shape, tokens.shape)
    assert ((labels == IGNORE_INDEX) | ((labels >= 0) & (labels < none))).all(), labels
    labels[labels == IGNORE_INDEX] = none
    return _Stored(tokens, document.prompt_length, labels.astype(dtype))


def _write_shard(folder: Path, stem: str, documents: list[_Stored]) -> Shard:
    import webdataset  # here, because it imports torch: seconds that readers need not spend

    lengths = np.array([(len(d.tokens), d.prompt_length) for d in documents], dtype=DOCUMENT_DTYPE)
    checksums = []
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, encoder=False, mtime=0) as writer:
        for number, start in enumerate(range(0, len(documents), MEMBER_DOCUMENTS)):
            stop = start + MEMBER_DOCUMENTS
            part, sizes = documents[start:stop], lengths[start:stop]
            header = np.concatenate([[len(part)], sizes["length"], sizes["prompt"]]).astype("<u4")
            labels = [d.labels for d in part if d.labels is not None]
            payload = b"".join(array.tobytes() for array in [header, *(d.tokens for d in part), *labels])
            checksums.append((len(part), zlib.crc32(payload)))
            writer.write({"__key__": f"{stem}-{number:06d}", EXTENSION: payload})
    data = buffer.getvalue()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:  # where tarfile itself finds the payloads
        places = [(member.offset_data, member.size) for member in archive]
    members = np.array(
        [(*place, *check) for place, check in zip(places, checksums, strict=True)], dtype=INDEX_DTYPE
    )
    index = io.BytesIO()
    np.save(index, members)
    np.save(index, lengths)
    shard = Shard(
        file=f"{stem}.tar",
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        index_bytes=len(index.getvalue()),
        index_sha256=hashlib.sha256(index.getvalue()).hexdigest(),
        members=len(members),
        documents=len(documents),
        tokens=int(lengths["length"].sum(dtype=np.int64)),
    )
    write_file(folder / shard.file, data)
    write_file(folder / shard.index_file, index.getvalue())
    return shard


def write_manifest(manifest: Manifest) -> None:
    """Write `manifest.json`; to be called last, since a folder with a manifest counts as complete."""
    fields = asdict(manifest)
    del fields["path"], fields["sha256"]
    text = json.dumps({"format": FORMAT, **fields}, indent=1, ensure_ascii=False)
    write_file(manifest.path / MANIFEST, text.encode() + b"\n")


# ---- opening


def open_manifest(path: str | Path) -> Manifest:
    """Read and check the manifest of a data folder.

    Raises DataError that names the culprit: folder or manifest missing or unreadable; a shard missing, of
    another size or not the shard of its name; an index or tokenizer whose sha256 is not the manifest's.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"data folder {folder} does not exist: mend the path or {REBUILD}")
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
    """A shard's members carry its name, which tells two shards of one size apart without reading them."""
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
    """The manifest that these bytes are; of the files in `folder` none is looked at. Raises DataError."""
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
