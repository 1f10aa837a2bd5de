"""Which row of which source stands at which place of the global sample sequence: O(1), without state.

Sample `counter` takes its source from a periodic mixture table, its epoch and place from how many samples of
that source came before, and its row from a permutation keyed by (seed, source, epoch).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import DataError

MIXTURE_PERIOD = 4096
FEISTEL_ROUNDS = 6


def permute(index: int | np.ndarray, size: int, key: int) -> np.ndarray:
    """Places of `index` (any shape, in 0..size-1) in the permutation of range(size) that `key` (64 bits)
    names.

    A Feistel network over the smallest power of 4 that holds `size`; results past the end are sent through
    again until they fall inside (cycle walking), which keeps the map one-to-one. Returns int64 of the shape
    of `index`.
    """
    index = np.asarray(index, dtype=np.int64)
    assert size > 0, size
    assert np.all((index >= 0) & (index < size)), "permute: index outside range(size)"
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    value = index.astype(np.uint64).reshape(-1)
    pending = np.arange(value.size)
    while pending.size:
        walking = value[pending]
        left, right = walking >> shift, walking & mask
        for number in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (_mix(right, key, number) & mask)
        value[pending] = walking = (left << shift) | right
        pending = pending[walking >= np.uint64(size)]
    return value.astype(np.int64).reshape(index.shape)


def _mix(value: np.ndarray, key: int, number: int) -> np.ndarray:
    """The finaliser of splitmix64 over value + a key of the round: well mixed bits, wrapping at 2**64."""
    round_key = (key + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    value = value * np.uint64(0xD1342543DE82EF95) + np.uint64(round_key)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def key_of(*parts: object) -> int:
    """A 64-bit key from the text of `parts`."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def mixture_table(weights: Mapping[str, float], period: int = MIXTURE_PERIOD) -> np.ndarray:
    """Source numbers (period,) int64: at every prefix each source's count stays below its share + 1.

    The weights are quantised to n / period by largest remainder; each place goes to the source with the
    largest deficit. Raises DataError for a weight that is too small to get a place.
    """
    total = sum(weights.values())
    shares = np.array([weight / total * period for weight in weights.values()])
    counts = np.floor(shares).astype(np.int64)
    remainder_order = np.argsort(-(shares - counts), kind="stable")
    counts[remainder_order[: period - counts.sum()]] += 1
    for name, count in zip(weights, counts, strict=True):
        if count == 0:
            raise DataError(f"source {name!r} has weight {weights[name]}, under 1/{period} of all: raise it")
    deficit = np.zeros(len(counts), dtype=np.int64)  # in units of 1 / period samples
    table = np.empty(period, dtype=np.int64)
    for place in range(period):
        deficit += counts
        table[place] = source = int(np.argmax(deficit))
        deficit[source] -= period
    return table


@dataclass(frozen=True)
class Order:
    """The infinite sequence of samples of a mixture: `locate` gives any part of it."""

    names: tuple[str, ...]
    rows: np.ndarray  # (sources,) rows in each source, all above 0
    table: np.ndarray  # (period,) source numbers
    earlier: np.ndarray  # (period,) places of the same source before this one in the table
    per_period: np.ndarray  # (sources,) places of each source in the table
    seed: int

    @classmethod
    def of(cls, weights: Mapping[str, float], rows: Mapping[str, int], seed: int) -> "Order":
        table = mixture_table(weights)
        one_hot = table[:, None] == np.arange(len(weights))
        earlier = (np.cumsum(one_hot, axis=0) - one_hot)[np.arange(len(table)), table]
        return cls(
            tuple(weights), np.array([rows[n] for n in weights]), table, earlier, one_hot.sum(axis=0), seed
        )

    def locate(self, counters: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source number, epoch, row), int64 of the shape (n,) of `counters`, for global sample counters >=
        0.
        """
        period, place = np.divmod(np.asarray(counters, dtype=np.int64), len(self.table))
        sources = self.table[place]
        drawn = period * self.per_period[sources] + self.earlier[place]
        epochs, rows = np.divmod(drawn, self.rows[sources])
        for source, epoch in sorted(set(zip(sources.tolist(), epochs.tolist(), strict=True))):
            here = (sources == source) & (epochs == epoch)
            key = key_of(self.seed, self.names[source], epoch)
            rows[here] = permute(rows[here], int(self.rows[source]), key)
        return sources, epochs, rows

    def drawn(self, counter: int) -> dict[str, int]:
        """How many samples of each source come before global sample `counter`."""
        period, place = divmod(counter, len(self.table))
        rest = np.bincount(self.table[:place], minlength=len(self.names))
        return dict(zip(self.names, (period * self.per_period + rest).tolist(), strict=True))
