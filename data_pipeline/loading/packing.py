"""Documents into rows of one length, with their boundaries.

A packing is planned over blocks of consecutive documents, which share no row: all documents are one block,
or, where the order of the rows is shuffled shard block by shard block, each block of shards is one.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np

from common.nearest import nearest
from data_pipeline.errors import DataError
from data_pipeline.shards.format import IGNORE_INDEX
from data_pipeline.shards.token_stream import Reads, TokenStream
from data_pipeline.tokenization.tokenizer import PAD_ID


class Layout(NamedTuple):
    """The p pieces of documents that make up n rows, by row and column. All (p,) int64."""

    row: np.ndarray  # 0..n-1
    column: np.ndarray
    start: np.ndarray  # the first token, in the stream
    length: np.ndarray
    document: np.ndarray


class PackingPlan(NamedTuple):
    """Everything needed to read n rows, worked out at once."""

    lengths: np.ndarray  # (n,) int32, tokens before the padding
    cu_seqlens: np.ndarray  # (n, S) int32
    reads: Reads  # to offsets row * (T + 1) + column: the target at a row's edge lies one token past it
    label_reads: Reads | None  # to the same offsets; of a labelled source
    first_reads: np.ndarray  # (n + 1,)
    ignored: np.ndarray  # (i,) ascending row * T + column without target, padding excluded
    first_ignored: np.ndarray  # (n + 1,)


class Rows:
    """b rows of T tokens, to be filled in."""

    def __init__(self, count: int, sequence_length: int, cu_size: int) -> None:
        self.tokens = np.empty((count, sequence_length), dtype=np.int32)
        self.targets = np.empty((count, sequence_length), dtype=np.int32)
        self.cu_seqlens = np.empty((count, cu_size), dtype=np.int32)
        self.lengths = np.empty(count, dtype=np.int32)

    def clear(self, row: int) -> None:
        """Make the row padding only: one segment, nothing to predict."""
        self.tokens[row], self.targets[row], self.lengths[row] = PAD_ID, IGNORE_INDEX, 0
        self.cu_seqlens[row] = self.targets.shape[1]
        self.cu_seqlens[row, 0] = 0


class Packing(ABC):
    """The documents of one source as rows of T tokens, which are numbered one block after another."""

    block_rows: np.ndarray  # (blocks,) rows of each block
    rows: int
    max_segments: int  # of any row, padding at its end counted as one
    dropped_tokens: int  # in no row
    padded_tokens: int  # positions of an epoch that hold no token
    longest_document: int  # tokens

    def __init__(self, stream: TokenStream, sequence_length: int, blocks: np.ndarray | None = None) -> None:
        """`blocks`: (blocks + 1,) the first document of each, then the number of documents; None: one."""
        self._stream, self._T = stream, sequence_length
        self._documents = stream.document_starts
        self.longest_document = int(np.diff(self._documents).max(initial=0))
        self._pack(np.array([0, len(self._documents) - 1]) if blocks is None else blocks)

    @abstractmethod
    def _pack(self, blocks: np.ndarray) -> None:
        """Sets what is declared above."""

    @abstractmethod
    def layout(self, rows: np.ndarray) -> Layout:
        """The pieces of `rows` (n,)."""

    def plan(self, rows: np.ndarray, cu_size: int) -> PackingPlan:
        """How to read `rows` (n,); cu_size above max_segments. Reads no shard.

        A document's last token has no target, nor has one before a token of a masked prompt; in a labelled
        source the labels decide. cu_seqlens are the starts of the segments, 0 first, padded with T.
        """
        n, T, stream = len(rows), self._T, self._stream
        row, column, start, length, document = self.layout(rows)
        stop = column + length
        final = np.append(np.flatnonzero(row[1:] != row[:-1]), len(row) - 1)  # each row's last piece
        counts = np.diff(final, prepend=-1)
        lengths = stop[final]
        cu = np.full((n, cu_size), T, dtype=np.int32)
        cu[row, np.arange(len(row)) - (final + 1 - counts)[row]] = column
        cu[np.arange(n), counts] = lengths  # the padding, or T again
        # Pieces that also follow each other in the stream are read at once.
        new = np.flatnonzero((row[1:] != row[:-1]) | (start[1:] != start[:-1] + length[:-1])) + 1
        first, last = np.insert(new, 0, 0), np.append(new, len(row)) - 1
        ends = (start + length)[last]
        if not stream.labelled:
            ends += (stop[last] == T) & (ends < stream.tokens)
        spans = stream.spans(row[first] * (T + 1) + column[first], start[first], ends)
        ignored = np.zeros(0, dtype=np.int64)
        if not stream.labelled:
            ignored = (row * T + stop - 1)[start + length == self._documents[document + 1]]
            if stream.has_prompts:
                masked = np.clip(stream.prompt_ends[document] - 1 - start, 0, length)
                ignored = np.union1d(ignored, ragged(row * T + column, masked)[1])
        return PackingPlan(
            lengths.astype(np.int32),
            cu,
            stream.reads(spans, n * (T + 1)),
            stream.reads(spans, n * (T + 1), labels=True) if stream.labelled else None,
            np.searchsorted(spans.offset, np.arange(n + 1) * (T + 1)),
            ignored,
            np.searchsorted(ignored, np.arange(n + 1) * T),
        )

    def read(self, plan: PackingPlan, first: int, stop: int, out: Rows, out_rows: np.ndarray) -> None:
        """Fill rows `out_rows` (stop - first,), ascending, of `out` with the rows first..stop-1 of `plan`.

        A target is the label at its position in a labelled source, else the next token. Padding is a
        segment of its own without targets. Raises DamagedError if a member that the rows touch is damaged;
        what was filled in by then is undefined.
        """
        T, stream = self._T, self._stream
        here = plan.first_reads[first], plan.first_reads[stop]
        into = out_rows if len(out_rows) < len(out.lengths) else slice(None)  # faster for all of them
        stored = stream.copy(plan.reads.part(*here)).reshape(-1, T + 1)
        out.tokens[into] = stored[:, :-1]
        if plan.label_reads is None:
            out.targets[into] = stored[:, 1:]
        else:
            labels = stream.copy(plan.label_reads.part(*here)).reshape(-1, T + 1)[:, :-1]
            out.targets[into] = np.where(labels == stream.no_label, IGNORE_INDEX, labels.astype(np.int32))
        for out_row, length in zip(out_rows.tolist(), plan.lengths[first:stop].tolist(), strict=True):
            if length < T:
                out.tokens[out_row, length:] = PAD_ID
                out.targets[out_row, length:] = IGNORE_INDEX
        ignored = plan.ignored[plan.first_ignored[first] : plan.first_ignored[stop]]
        if len(ignored):
            row, column = np.divmod(ignored, T)
            out.targets[out_rows[row - first], column] = IGNORE_INDEX
        out.cu_seqlens[into] = plan.cu_seqlens[first:stop]
        out.lengths[into] = plan.lengths[first:stop]


class ConcatPacking(Packing):
    """Row r is T tokens of the stream of documents, r rows from its block's start; a block's last incomplete
    row is dropped and counted.

    A row edge may cut a document: the token before the edge still has its target, the token after it does not
    see what came before. Where labels depend on the whole document, let T be a multiple of its length.
    """

    def _pack(self, blocks: np.ndarray) -> None:
        T = self._T
        self._block_starts = self._documents[blocks]
        self.block_rows = np.diff(self._block_starts) // T
        self._first_rows = np.cumsum(self.block_rows) - self.block_rows
        self.rows = int(self.block_rows.sum())
        self.dropped_tokens = self._stream.tokens - self.rows * T
        self.padded_tokens = 0
        # A row begins a segment at its first token and one more at every document start inside it.
        block_of = np.repeat(np.arange(len(self.block_rows)), np.diff(blocks))
        row, column = np.divmod(self._documents[:-1] - self._block_starts[block_of], T)
        inside = (column > 0) & (row < self.block_rows[block_of])
        starts = np.bincount((self._first_rows[block_of] + row)[inside], minlength=1)
        self.max_segments = 1 + int(starts.max())

    def layout(self, rows: np.ndarray) -> Layout:
        """The pieces of `rows` (n,)."""
        block = np.searchsorted(self._first_rows, rows, side="right") - 1
        begin = self._block_starts[block] + (rows - self._first_rows[block]) * self._T
        first = np.searchsorted(self._documents, begin, side="right") - 1
        last = np.searchsorted(self._documents, begin + self._T, side="left")
        row, document = ragged(first, last - first)
        begin = begin[row]
        start = np.maximum(self._documents[document], begin)
        stop = np.minimum(self._documents[document + 1], begin + self._T)
        return Layout(row, start - begin, start, stop - start, document)


class BestFitPacking(Packing):
    """Documents of at most T tokens whole, longer ones in pieces of T and a rest; nothing is dropped.

    Each block is packed by best-fit decreasing: the pieces from the longest to the shortest, each into the
    row with the least space that still holds it ("Fewer Truncations Improve Language Modeling", arXiv
    2404.10830). A row ends with padding where no piece fits. A piece of T tokens takes its last target from
    the next piece, as at a row edge of ConcatPacking. The plan depends only on the documents' lengths and T
    and takes 24 bytes per piece.
    """

    def _pack(self, blocks: np.ndarray) -> None:
        T = self._T
        lengths = np.diff(self._documents)
        pieces = -(-lengths // T)
        document, part = ragged(np.zeros(len(lengths), dtype=np.int64), pieces)
        size = np.minimum(lengths[document] - part * T, T)
        edges = np.concatenate([[0], np.cumsum(pieces)])[blocks].tolist()
        row = np.empty(len(size), dtype=np.int64)
        block_rows: list[int] = []
        self.rows = 0
        for begin, end in zip(edges, edges[1:], strict=False):
            planned, count = best_fit(size[begin:end], T)
            row[begin:end] = self.rows + planned
            block_rows.append(count)
            self.rows += count
        self.block_rows = np.array(block_rows)
        order = np.argsort(row, kind="stable")  # within a row as in the stream
        self._start = (self._documents[document] + part * T)[order]
        self._length = size[order].astype(np.int64)
        self._document = document[order]
        counts = np.bincount(row, minlength=self.rows)
        self._first_pieces = np.concatenate([[0], np.cumsum(counts)])
        padding = T - np.bincount(row, weights=size, minlength=self.rows).astype(np.int64)
        self.dropped_tokens = 0
        self.padded_tokens = int(padding.sum())
        self.max_segments = int((counts + (padding > 0)).max(initial=1))

    def layout(self, rows: np.ndarray) -> Layout:
        """The pieces of `rows` (n,)."""
        first = self._first_pieces[rows]
        row, piece = ragged(first, self._first_pieces[rows + 1] - first)
        length = self._length[piece]
        before = np.cumsum(length) - length
        column = before - before[np.searchsorted(row, row)]
        return Layout(row, column, self._start[piece], length, self._document[piece])


PACKINGS: dict[str, type[Packing]] = {"concat": ConcatPacking, "best_fit": BestFitPacking}


def packing_of(name: str) -> type[Packing]:
    """The class of that name. Raises DataError, with the nearest name, for an unknown one."""
    if name not in PACKINGS:
        raise DataError(f"unknown data.packing {name!r}; {nearest(name, list(PACKINGS))}")
    return PACKINGS[name]


def ragged(first: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ranges first[i] .. first[i] + count[i] - 1 one after another, as (i, value), both int64."""
    number = np.repeat(np.arange(len(count)), count)
    shift = first - (np.cumsum(count) - count)
    return number, np.arange(len(number)) + shift[number]


def best_fit(lengths: np.ndarray, sequence_length: int) -> tuple[np.ndarray, int]:
    """Best-fit decreasing of `lengths` (n,), all in 1..T: the row of each (n,) int64, and the rows taken.

    Equal lengths and rows of equal space go together, so that the work is a sort and then one step for each
    pair of a length and a space that meet, not one for each piece.
    """
    order = np.argsort(-lengths, kind="stable")
    values, counts = np.unique(lengths, return_counts=True)
    rows = np.empty(len(lengths), dtype=np.int64)
    spaces: dict[int, list[np.ndarray]] = {}  # rows by their space, in chunks
    present = 0  # bit s: there are rows of space s
    taken = done = 0

    def put(chunk: np.ndarray, space: int) -> None:
        nonlocal present
        if len(chunk) and space:
            spaces.setdefault(space, []).append(chunk)
            present |= 1 << space

    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            fitting = present >> length
            if fitting:
                space = length + (fitting & -fitting).bit_length() - 1
                chunk = spaces[space].pop()
                if not spaces[space]:
                    present ^= 1 << space
            else:
                space = sequence_length
                chunk = np.arange(taken, taken + -(-count // (space // length)))
                taken += len(chunk)
            # A row that took a piece is the best fit for the next of this length while it has space.
            each = min(space // length, count)
            used = min(len(chunk), count // each)
            rows[order[done : done + used * each]] = np.repeat(chunk[:used], each)
            put(chunk[:used], space - each * length)
            put(chunk[used:], space)
            done += used * each
            count -= used * each
    return rows, taken
