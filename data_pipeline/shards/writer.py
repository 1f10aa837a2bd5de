"""Writes encoded documents as shards, in the format of format.py."""

import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.files import write_file
from data_pipeline.shards.format import DOCUMENT_DTYPE, EXTENSION, IGNORE_INDEX, INDEX_DTYPE, EncodedDocument
from data_pipeline.shards.manifest import Shard

MEMBER_DOCUMENTS = 256
SHARD_BYTES = 64 * 2**20


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
    """An EncodedDocument as a member stores it."""

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
    import webdataset  # here, because it imports torch, which takes readers seconds

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
        payloads = [(member.offset_data, member.size) for member in archive]
    members = np.array(
        [(*payload, *check) for payload, check in zip(payloads, checksums, strict=True)], dtype=INDEX_DTYPE
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
