"""Documents into rows of one length, with their boundaries."""

import numpy as np

from data_pipeline.shards import IGNORE_INDEX, TokenStream


class ConcatPacking:
    """Row r is tokens [r*T, (r+1)*T) of the stream of documents; the last incomplete row is dropped and
    counted.

    A row edge may cut a document: the token before the edge still has its target, the token after it does not
    see what came before. Where labels depend on the whole document, let T be a multiple of its length.
    """

    name = "concat"

    def __init__(self, stream: TokenStream, sequence_length: int) -> None:
        self._stream = stream
        self._T = sequence_length
        self.rows, self.dropped_tokens = divmod(stream.tokens, sequence_length)
        starts = stream.document_starts[:-1]
        inside = starts[(starts % sequence_length != 0) & (starts < self.rows * sequence_length)]
        # A row begins a segment at its first token and one more at every document start inside it.
        self.max_segments = 1 + int(np.bincount(inside // sequence_length, minlength=1).max())

    def row(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens (T,) int32, targets (T,) int32, starts (n,) int32) of row `row`.

        In a labelled source a target is the label at its place. Else it is the next token of the same
        document, IGNORE_INDEX at a document's last token and where the next token belongs to a masked prompt.
        `starts` are the row-relative starts of the n <= max_segments segments, 0 first.
        """
        assert 0 <= row < self.rows, (row, self.rows)
        start, stop = row * self._T, (row + 1) * self._T
        first, last = np.searchsorted(self._stream.document_starts, [start + 1, stop + 1])
        ends = self._stream.document_starts[first:last] - start  # where the next document starts
        starts = np.concatenate([[0], ends[ends < self._T]]).astype(np.int32)
        if self._stream.labelled:
            return self._stream.read(start, stop), self._stream.read_labels(start, stop), starts
        # One token past the row, since the target at the edge lies there.
        tokens = self._stream.read(start, min(stop + 1, self._stream.tokens))
        targets = np.full(self._T, IGNORE_INDEX, dtype=np.int32)
        targets[: len(tokens) - 1] = tokens[1:]
        targets[ends - 1] = IGNORE_INDEX
        # The documents of the row, the one that reaches into it included.
        for document in range(first - 1, min(last, len(self._stream.prompt_ends))):
            begin = self._stream.document_starts[document] - start
            end = self._stream.prompt_ends[document] - 1 - start
            targets[max(begin, 0) : max(end, 0)] = IGNORE_INDEX
        return tokens[: self._T], targets, starts


def cu_seqlens(starts: np.ndarray, sequence_length: int, size: int) -> np.ndarray:
    """`starts` padded with `sequence_length` to (size,) int32: segment i is [cu[i], cu[i+1])."""
    assert len(starts) < size, (len(starts), size)
    padded = np.full(size, sequence_length, dtype=np.int32)
    padded[: len(starts)] = starts
    return padded
