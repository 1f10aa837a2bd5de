"""The tokens of a data folder's shards, by random access; every member is checked when it is first read."""

import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.shards.format import DOCUMENT_DTYPE, IGNORE_INDEX, INDEX_DTYPE
from data_pipeline.shards.manifest import REBUILD, Manifest, Shard, check_size, read_index


class DamagedError(DataError):
    """Part of a shard is not what was written."""


class ShardFiles:
    """The shards of a data folder, each mapped at first use."""

    fix = REBUILD

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


class Spans(NamedTuple):
    """Runs of tokens, none across two members, and where each goes in an output. All (n,) int64."""

    offset: np.ndarray  # in the flat output
    length: np.ndarray
    member: np.ndarray
    begin: np.ndarray  # in the array of the member's shard

    def part(self, rows: np.ndarray | slice) -> "Spans":
        return Spans(self.offset[rows], self.length[rows], self.member[rows], self.begin[rows])


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
        # The position of a member's first token in its shard, less the tokens before it in the stream.
        header = 4 * (1 + 2 * self._members["documents"].astype(np.int64))
        in_shard = (self._members["offset"].astype(np.int64) + header) // self._dtype.itemsize
        self._shifts = in_shard - self._member_starts[:-1]
        self._no_label = np.iinfo(self._dtype).max
        self._verified = np.zeros(len(self._members), dtype=bool)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int32. Raises DamagedError if a member they lie in fails its checksum."""
        assert 0 <= start <= stop <= self.tokens, (start, stop, self.tokens)
        out = np.empty(stop - start, dtype=np.int32)
        spans = self.spans(np.array([0]), np.array([start]), np.array([stop]))
        self.copy(spans, out, spans.offset)
        return out

    def spans(self, offsets: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> Spans:
        """Where the tokens [starts[i], stops[i]) lie that go to offsets[i], ascending, of an output."""
        parts = []
        while len(starts):
            member = np.searchsorted(self._member_starts, starts, side="right") - 1
            ends = np.minimum(stops, self._member_starts[member + 1])
            parts.append(Spans(offsets, ends - starts, member, starts + self._shifts[member]))
            over = ends < stops  # the rest lies in the next member
            offsets, starts, stops = (offsets + ends - starts)[over], ends[over], stops[over]
        spans = Spans(*map(np.concatenate, zip(*parts, strict=True)))
        return spans if len(parts) == 1 else spans.part(np.argsort(spans.offset, kind="stable"))

    def copy(self, spans: Spans, out: np.ndarray, offsets: np.ndarray, labels: bool = False) -> None:
        """Copy the spans' tokens, or labels, to `offsets` of the flat int32 `out`.

        A token without a label has IGNORE_INDEX. Raises DamagedError if a member that they lie in fails its
        checksum; what was copied by then is undefined.
        """
        assert self.labelled or not labels
        self._verify(spans.member)
        begin = spans.begin
        if labels:  # they follow the member's tokens
            begin = begin + self._member_starts[spans.member + 1] - self._member_starts[spans.member]
        columns = (offsets, begin, begin + spans.length, self._shard_of[spans.member])
        array, shards = self._files.array, self.shards
        for offset, first, stop, shard in zip(*(column.tolist() for column in columns), strict=True):
            stored = array(shards[shard])[first:stop]
            out[offset : offset + stop - first] = stored
            if labels:
                out[offset : offset + stop - first][stored == self._no_label] = IGNORE_INDEX

    def _verify(self, members: np.ndarray) -> None:
        """Compares each checksum once per process: afterwards the page cache is trusted."""
        for member in np.unique(members[~self._verified[members]]).tolist():
            entry, number = self._members[member], int(self._shard_of[member])
            begin, end = (
                int(n) // self._dtype.itemsize for n in (entry["offset"], entry["offset"] + entry["size"])
            )
            if zlib.crc32(self._files.array(self.shards[number])[begin:end].data) != entry["crc32"]:
                name = member - int(np.searchsorted(self._shard_of, number))
                path = self._files.folder / self.shards[number].file
                raise DamagedError(
                    f"{path} member {name:06d}: its checksum differs, it is damaged: {self._files.fix}"
                )
            self._verified[member] = True
