"""The tokens of a data folder's shards, by random access.

A member is compared with its checksum when a process first reads it, and again after its shard was written
to. Whether it was is looked at after every read, before the tokens are used.
"""

import zlib
from threading import Lock
from typing import NamedTuple

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.shards.format import DOCUMENT_DTYPE, INDEX_DTYPE
from data_pipeline.shards.manifest import Manifest, Shard, read_index
from data_pipeline.shards.shard_files import DamagedError, Gatherer, OpenShard, ShardFiles, Version

ATTEMPTS = 3  # at a shard that is being written to


class Spans(NamedTuple):
    """Runs of tokens, none across two members, and where each goes in an output. All (n,) int64."""

    offset: np.ndarray  # in the flat output
    length: np.ndarray
    member: np.ndarray
    begin: np.ndarray  # in the member's shard


class Reads(NamedTuple):
    """Spans as they are read, one after another."""

    members: np.ndarray  # (n,) int64
    # (n, 4) int64: number of the shard, first byte in it, bytes, bytes of the output up to the next span
    bytes: np.ndarray

    def part(self, first: int, stop: int) -> "Reads":
        return Reads(self.members[first:stop], self.bytes[first:stop])


class TokenStream:
    """The documents of one source and split, end to end, with random access by token.

    `document_starts` (documents + 1,) int64: the first token of each document, then the number of tokens.
    `prompt_ends` (documents,) int64: the first token of each document that is to be predicted.
    `has_prompts`: whether any document has a masked prompt. `labelled`: whether there are labels to read.
    `shard_documents` (shards + 1,) int64: the first document of each shard, then the number of documents.
    `dtype`: what a token is stored as. `no_label`: the stored label of a token without one.
    """

    def __init__(self, manifest: Manifest, source: str, split: str, files: ShardFiles | None = None) -> None:
        """`files`: where the shards are; default: in the manifest's folder.

        Raises DataError for an index that does not describe its shard.
        """
        self._files = files or ShardFiles(manifest.path)
        self.dtype = np.dtype(manifest.dtype)
        self.labelled = manifest.sources[source].labelled
        self.shards = manifest.sources[source].splits[split].shards
        indices = [self._index(manifest, shard) for shard in self.shards]
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
        in_shard = (self._members["offset"].astype(np.int64) + header) // self.dtype.itemsize
        self._shifts = in_shard - self._member_starts[:-1]
        self.no_label = int(np.iinfo(self.dtype).max)
        self._vocab_size = manifest.vocab_size
        self._verified = np.zeros(len(self._members), dtype=bool)
        self._versions: dict[int, Version] = {}  # of the shards with verified members
        self._gatherer, self._lock = Gatherer(), Lock()

    def _index(self, manifest: Manifest, shard: Shard) -> tuple[np.ndarray, np.ndarray]:
        """`read_index`, compared with what the manifest says of the shard: no read leaves a member."""
        members, documents = read_index(manifest.path, shard)
        good = (members.dtype, documents.dtype) == (INDEX_DTYPE, DOCUMENT_DTYPE)
        if good and (members.shape, documents.shape) == ((shard.members,), (shard.documents,)):
            counts, lengths = members["documents"].astype(np.int64), documents["length"].astype(np.int64)
            ends, starts = np.cumsum(counts), np.concatenate([[0], np.cumsum(lengths)])
            if counts.sum() == len(lengths) and lengths.sum() == shard.tokens:
                tokens = starts[ends] - starts[ends - counts]
                stored = self.dtype.itemsize * (1 + self.labelled) * tokens
                offsets, sizes = members["offset"].astype(np.int64), members["size"].astype(np.int64)
                inside = (offsets >= 0) & (offsets <= shard.bytes - sizes)
                fits = inside & (offsets % 4 == 0) & (sizes == 4 * (1 + 2 * counts) + stored)
                if fits.all() and (documents["prompt"] <= documents["length"]).all():
                    return members, documents
        path = self._files.folder / shard.index_file
        raise DataError(f"{path} does not describe the documents of {shard.file}: {self._files.fix}")

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int32. Raises DamagedError if a member they lie in fails its checksum."""
        assert 0 <= start <= stop <= self.tokens, (start, stop, self.tokens)
        spans = self.spans(np.array([0]), np.array([start]), np.array([stop]))
        return self.copy(self.reads(spans, stop - start)).astype(np.int32)

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
        if len(parts) == 1:
            return spans
        order = np.argsort(spans.offset, kind="stable")
        return Spans(*(column[order] for column in spans))

    def reads(self, spans: Spans, size: int, labels: bool = False) -> Reads:
        """How to read the tokens, or labels, of `spans`, the first at 0, into an output of `size` tokens."""
        assert self.labelled or not labels
        begin = spans.begin
        if labels:  # they follow the member's tokens
            begin = begin + self._member_starts[spans.member + 1] - self._member_starts[spans.member]
        gaps = np.append(spans.offset[1:], size) - spans.offset - spans.length
        columns = np.stack([begin, spans.length, gaps], axis=1) * self.dtype.itemsize
        return Reads(spans.member, np.column_stack([self._shard_of[spans.member], columns]))

    def copy(self, reads: Reads) -> np.ndarray:
        """What is stored, as (n,) of `dtype`; 0 where no span lies.

        Raises DamagedError if a member that it lies in fails its checksum or cannot be read.
        """
        parts = reads.bytes.tolist()
        numbers = {part[0] for part in parts}
        if len(numbers) > self._files.limit:
            half = len(parts) // 2
            return np.concatenate([self.copy(reads.part(0, half)), self.copy(reads.part(half, len(parts)))])
        for _ in range(ATTEMPTS):
            files = self._opened(numbers)
            self._verify(reads.members, files)
            stored = self._gather(parts, files)
            changed = [file for file in files.values() if file.changed()]
            if not changed:
                return stored.view(self.dtype)
        raise DamagedError(f"{changed[0].path} is being written to: let nothing write there during a run")

    def _gather(self, parts: list[list[int]], files: dict[int, OpenShard]) -> np.ndarray:
        views: list[memoryview | bytes] = []
        size = 0
        for number, first, length, gap in parts:
            views.append(files[number].view[first : first + length])
            if gap:
                views.append(bytes(gap))
            size += length + gap
        with self._lock:
            stored = self._gatherer.gather(views, size)
        if stored is None:  # each part by itself, because its error names the file
            read = [files[number].read(first, length) + bytes(gap) for number, first, length, gap in parts]
            stored = np.frombuffer(b"".join(read), dtype=np.uint8)
        return stored

    def _opened(self, numbers: set[int]) -> dict[int, OpenShard]:
        """The shards of these numbers; what was verified of one that was written to since is forgotten."""
        files = {number: self._files.open(self.shards[number]) for number in numbers}
        for number, file in files.items():
            if self._versions.get(number) != file.seen:
                self._verified[np.searchsorted(self._shard_of, number) :][: self.shards[number].members] = (
                    False
                )
                self._versions[number] = file.seen
        return files

    def _verify(self, members: np.ndarray, files: dict[int, OpenShard]) -> None:
        unverified = members[~self._verified[members]]
        if not len(unverified):
            return
        for member in np.unique(unverified).tolist():
            entry, number = self._members[member], int(self._shard_of[member])
            payload = files[number].read(int(entry["offset"]), int(entry["size"]))
            place = member - int(np.searchsorted(self._shard_of, number))
            if zlib.crc32(payload) != entry["crc32"]:
                raise files[number].damaged(place, "its checksum differs")
            stored = np.frombuffer(payload, self.dtype, offset=4 * (1 + 2 * int(entry["documents"])))
            unknown = stored >= self._vocab_size
            if self.labelled:
                unknown[len(stored) // 2 :] &= stored[len(stored) // 2 :] != self.no_label
            if unknown.any():
                raise files[number].damaged(
                    place, f"it holds token {stored[unknown][0]} of {self._vocab_size}"
                )
            self._verified[member] = True
