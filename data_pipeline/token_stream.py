"""The tokens of a data folder's shards, by random access; every member is checked when it is first read."""

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.shards import (
    DOCUMENT_DTYPE,
    IGNORE_INDEX,
    INDEX_DTYPE,
    REBUILD,
    Manifest,
    Shard,
    check_size,
    read_index,
)


class DamagedError(DataError):
    """Part of a shard is not what was written."""


class ShardFiles:
    """The shards of a data folder, each mapped when it is first asked for."""

    mend = REBUILD

    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder, self._dtype = folder, np.dtype(dtype)
        self._arrays: dict[str, np.ndarray] = {}

    def array(self, shard: Shard) -> np.ndarray:
        """The whole tar as (n,) tokens: a payload's offset is a multiple of a token's bytes. Raises
        DamagedError for a file that is gone or of another size.
        """
        array = self._arrays.get(shard.file)
        if array is None:
            array = self._arrays[shard.file] = self._map(self.folder / shard.file, shard)
        return array

    def _map(self, path: Path, shard: Shard) -> np.ndarray:
        try:
            check_size(path, shard.bytes)
        except DataError as error:
            raise DamagedError(str(error)) from error
        return np.asarray(np.memmap(path, self._dtype, mode="r"))


class TokenStream:
    """The documents of one source and split, end to end, with random access by token.

    `document_starts` (documents + 1,) int64: the first token of each document, then the number of tokens.
    `prompt_ends` (documents,) int64: the first token of each document that is to be predicted.
    `has_prompts`: whether any document has a masked prompt. `labelled`: whether there are labels to read.
    `shard_documents` (shards + 1,) int64: the first document of each shard, then the number of documents.
    """

    def __init__(self, manifest: Manifest, source: str, split: str, files: ShardFiles | None = None) -> None:
        """`files`: where the shards are; default: in the manifest's folder."""
        self._files = files or ShardFiles(manifest.path, manifest.dtype)
        self._dtype = np.dtype(manifest.dtype)
        self.labelled = manifest.sources[source].labelled
        self.shards = manifest.sources[source].splits[split].shards
        indices = [read_index(manifest.path, shard) for shard in self.shards]
        documents = np.concatenate([np.zeros(0, DOCUMENT_DTYPE), *(documents for _, documents in indices)])
        self.document_starts = np.concatenate([[0], np.cumsum(documents["length"], dtype=np.int64)])
        self.prompt_ends = self.document_starts[:-1] + documents["prompt"]
        self.has_prompts = bool(documents["prompt"].any())
        self.tokens = int(self.document_starts[-1])
        counts = [len(documents) for _, documents in indices]
        self.shard_documents = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._members = np.concatenate([np.zeros(0, INDEX_DTYPE), *(members for members, _ in indices)])
        self._shard_of = np.repeat(np.arange(len(indices)), [len(members) for members, _ in indices])
        first_document = np.concatenate([[0], np.cumsum(self._members["documents"], dtype=np.int64)])
        self._member_starts = self.document_starts[first_document]  # (members + 1,) in tokens
        # Where a member's first token stands in its shard, less the tokens before it in the stream.
        header = 4 * (1 + 2 * self._members["documents"].astype(np.int64))
        offset = (self._members["offset"].astype(np.int64) + header) // self._dtype.itemsize
        self._shifts = offset - self._member_starts[:-1]
        self._verified = np.zeros(len(self._members), dtype=bool)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int32. Raises DamagedError if a member they lie in fails its checksum."""
        assert 0 <= start <= stop <= self.tokens, (start, stop, self.tokens)
        out = np.empty(stop - start, dtype=np.int32)
        self.gather(out, np.array([0]), np.array([start]), np.array([stop - start]))
        return out

    def read_labels(self, start: int, stop: int) -> np.ndarray:
        """Labels of the tokens [start, stop) as int32, IGNORE_INDEX where there is none; of a labelled source
        only. Raises DamagedError as `read` does.
        """
        assert 0 <= start <= stop <= self.tokens, (start, stop, self.tokens)
        out = np.empty(stop - start, dtype=np.int32)
        self.gather(out, np.array([0]), np.array([start]), np.array([stop - start]), labels=True)
        return out

    def gather(
        self,
        out: np.ndarray,
        places: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
        labels: bool = False,
    ) -> None:
        """Copy the tokens, or labels, [starts[i], starts[i] + lengths[i]) to flat place places[i] of `out`,
        int32 and contiguous. Raises DamagedError if a member they lie in fails its checksum; what was written
        by then is undefined.
        """
        assert self.labelled or not labels
        flat, shards, array = out.reshape(-1), self.shards, self._files.array
        for place, begin, end, shard in self._spans(places, starts, lengths, labels):
            stored = array(shards[shard])[begin:end]
            target = flat[place : place + end - begin]
            target[:] = stored
            if labels:
                target[stored == np.iinfo(self._dtype).max] = IGNORE_INDEX

    def _spans(
        self, places: np.ndarray, starts: np.ndarray, lengths: np.ndarray, labels: bool
    ) -> Iterator[tuple[int, int, int, int]]:
        """(place in the output, begin and end in the shard's array, shard number), none across two members,
        all of which are verified.
        """
        while len(starts):
            members = np.searchsorted(self._member_starts, starts, side="right") - 1
            here = np.minimum(lengths, self._member_starts[members + 1] - starts)
            self._verify(members[here > 0])
            begin = starts + self._shifts[members]
            if labels:  # they stand behind the member's tokens
                begin += self._member_starts[members + 1] - self._member_starts[members]
            columns = (places, begin, begin + here, self._shard_of[members])
            yield from zip(*(column.tolist() for column in columns), strict=True)
            rest = lengths > here
            places, starts, lengths = (places + here)[rest], (starts + here)[rest], (lengths - here)[rest]

    def _verify(self, members: np.ndarray) -> None:
        """Compares checksums, each once a process: afterwards the page cache is trusted."""
        for member in np.unique(members[~self._verified[members]]).tolist():
            entry, number = self._members[member], int(self._shard_of[member])
            begin, end = (
                int(n) // self._dtype.itemsize for n in (entry["offset"], entry["offset"] + entry["size"])
            )
            if zlib.crc32(self._files.array(self.shards[number])[begin:end].data) != entry["crc32"]:
                name = member - int(np.searchsorted(self._shard_of, number))
                path = self._files.folder / self.shards[number].file
                raise DamagedError(
                    f"{path} member {name:06d}: its checksum differs, it is damaged: {self._files.mend}"
                )
            self._verified[member] = True
