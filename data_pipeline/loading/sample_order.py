"""Which row of which source comes at which position of the global sample sequence: O(1), without state.

Sample `counter` takes its source from the periodic mixture table of its stage, its epoch and its position
in the epoch from how many samples of that source came before (a sum of whole stages and whole periods), and
its row from a permutation keyed by (seed, source, epoch); of blocks and of the rows in each, where there are
blocks.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from common.nearest import nearest
from common.schema import from_plain
from data_pipeline.errors import DataError

MIXTURE_PERIOD = 4096
MAX_SAMPLES = 2**62  # that can be counted in 64 bits
FEISTEL_ROUNDS = 6


@dataclass
class Stage:
    """The weights of the sources once the run has seen `tokens` tokens; a source without one is left out."""

    tokens: int
    weights: dict[str, float] = field(default_factory=dict)


def permute(index: int | np.ndarray, size: int | np.ndarray, key: int | np.ndarray) -> np.ndarray:
    """Positions of `index` (any shape, in 0..size-1) in the permutation of range(size) that `key` (64 bits)
    names. `size` and `key` are numbers or arrays of the shape of `index`: then each index has its own.

    A Feistel network over the smallest power of 4 that holds `size`; results past the end are sent through
    again until they fall inside (cycle walking), which keeps the map one-to-one. Returns int64 of the shape
    of `index`.
    """
    index = np.asarray(index, dtype=np.int64)
    flat = index.reshape(-1)
    sizes = np.broadcast_to(np.asarray(size, dtype=np.int64), index.shape).reshape(-1)
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), index.shape).reshape(-1)
    assert np.all((flat >= 0) & (flat < sizes)), "permute: index outside range(size)"
    distinct, which = np.unique(sizes, return_inverse=True)
    halves = [max(1, ((n - 1).bit_length() + 1) // 2) for n in distinct.tolist()]
    shifts = np.array(halves, dtype=np.uint64)[which]
    masks = np.array([(1 << half) - 1 for half in halves], dtype=np.uint64)[which]
    limits = sizes.astype(np.uint64)
    value = flat.astype(np.uint64)
    pending = np.arange(value.size)
    while pending.size:
        walking, shift, mask, round_keys = value[pending], shifts[pending], masks[pending], keys[pending]
        left, right = walking >> shift, walking & mask
        for number in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (_mix(right, round_keys, number) & mask)
        value[pending] = walking = (left << shift) | right
        pending = pending[walking >= limits[pending]]
    return value.astype(np.int64).reshape(index.shape)


def _mix(value: np.ndarray, key: np.ndarray, number: int) -> np.ndarray:
    """The finaliser of splitmix64 over value + a key of the round: well-mixed bits, wrapping at 2**64."""
    round_key = key + np.uint64((number + 1) * 0x9E3779B97F4A7C15 % 2**64)
    value = value * np.uint64(0xD1342543DE82EF95) + round_key
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def key_of(*parts: object) -> int:
    """A 64-bit key from the text of `parts`."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def mixture_table(weights: Mapping[str, float], period: int = MIXTURE_PERIOD) -> np.ndarray:
    """Source numbers (period,) int64: in every prefix each source's count stays below its share + 1.

    The weights are quantised to n / period by largest remainder; each slot goes to the source with the
    largest deficit. Raises DataError for a weight that is too small to get a slot or not finite.
    """
    total = sum(weights.values())
    if not 0 < total < math.inf:
        raise DataError(
            f"the weights {dict(weights)} add up to {total}, not a finite number above 0: fix them"
        )
    shares = np.array([weight / total * period for weight in weights.values()])
    counts = np.floor(shares).astype(np.int64)
    remainder_order = np.argsort(-(shares - counts), kind="stable")
    counts[remainder_order[: period - counts.sum()]] += 1
    for name, count in zip(weights, counts, strict=True):
        if count == 0:
            raise DataError(f"source {name!r} has weight {weights[name]}, under 1/{period} of all: raise it")
    deficit = np.zeros(len(counts), dtype=np.int64)  # in units of 1 / period samples
    table = np.empty(period, dtype=np.int64)
    for slot in range(period):
        deficit += counts
        table[slot] = source = int(np.argmax(deficit))
        deficit[source] -= period
    return table


class _Mixture:
    """One stage: a periodic table of source numbers, and what is drawn before each of its slots."""

    def __init__(self, names: Sequence[str], weights: Mapping[str, float], start: int) -> None:
        drawn = {name: weights[name] for name in names if weights.get(name, 0)}
        numbers = np.array([names.index(name) for name in drawn])
        self.start = start  # the first global sample
        self.table = numbers[mixture_table(drawn)]  # (period,)
        one_hot = self.table[:, None] == np.arange(len(names))
        # (period,) slots of the same source before this one
        self.earlier = (np.cumsum(one_hot, axis=0) - one_hot)[np.arange(len(self.table)), self.table]
        self.per_period = one_hot.sum(axis=0)  # (sources,)

    def drawn(self, count: int) -> np.ndarray:
        """(sources,) samples of each source among the first `count` of the stage."""
        period, slot = divmod(count, len(self.table))
        return period * self.per_period + np.bincount(self.table[:slot], minlength=len(self.per_period))


class _Blocks:
    """The blocks of one source in the order of one epoch."""

    def __init__(self, rows: np.ndarray, key: int) -> None:
        self.order = permute(np.arange(len(rows)), len(rows), key)  # (blocks,) block numbers
        self.ends = np.cumsum(rows[self.order])  # (blocks,) rows up to the end of each


class Order:
    """The infinite sequence of samples of a mixture: `locate` gives any part of it.

    Each epoch of a source is a permutation of its rows. A source with several blocks permutes the blocks
    and the rows within each; a single block is a permutation of all rows.
    """

    def __init__(
        self, stages: Sequence[tuple[int, Mapping[str, float]]], blocks: Mapping[str, np.ndarray], seed: int
    ) -> None:
        """`stages`: (first global sample, weights by source) of each, the first at 0. `blocks`: the rows in
        each block of every source, at least one above 0; their order numbers the sources.
        """
        assert stages[0][0] == 0, stages
        self.names = tuple(blocks)
        self.rows = np.array([int(sizes.sum()) for sizes in blocks.values()])  # (sources,)
        self._blocks = list(blocks.values())
        self._first_rows = [np.cumsum(sizes) - sizes for sizes in self._blocks]
        self._epochs: dict[int, tuple[int, _Blocks]] = {}
        self._mixtures = [_Mixture(self.names, weights, start) for start, weights in stages]
        self._starts = np.array([mixture.start for mixture in self._mixtures])
        # (stages, sources) drawn before each stage
        lengths = np.diff(self._starts).tolist()
        before = [np.zeros(len(self.names), dtype=np.int64)]
        for mixture, length in zip(self._mixtures, lengths, strict=False):
            before.append(before[-1] + mixture.drawn(length))
        self._before = before
        self._seed = seed

    def locate(self, counters: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source number, epoch, row), int64 of the shape (n,) of `counters`, for global sample counters >=
        0.
        """
        sources, drawn = self._draw(np.asarray(counters, dtype=np.int64))
        epochs, positions = np.divmod(drawn, self.rows[sources])
        sizes, firsts = self.rows[sources], np.zeros(len(sources), dtype=np.int64)
        keys = np.empty(len(sources), dtype=np.uint64)
        for source, epoch in sorted(set(zip(sources.tolist(), epochs.tolist(), strict=True))):
            here = np.flatnonzero((sources == source) & (epochs == epoch))
            if len(self._blocks[source]) == 1:
                keys[here] = key_of(self._seed, self.names[source], epoch)
                continue
            order = self._blocks_of(source, epoch)
            number = np.searchsorted(order.ends, positions[here], side="right")
            block = order.order[number]
            sizes[here], firsts[here] = self._blocks[source][block], self._first_rows[source][block]
            positions[here] -= order.ends[number] - sizes[here]
            distinct, which = np.unique(block, return_inverse=True)
            names = [key_of(self._seed, self.names[source], epoch, b) for b in distinct.tolist()]
            keys[here] = np.array(names, dtype=np.uint64)[which]
        return sources, epochs, firsts + permute(positions, sizes, keys)

    def _draw(self, counters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source number, samples of it before) of each counter, (n,) int64."""
        stages = np.searchsorted(self._starts, counters, side="right") - 1
        sources, drawn = np.empty_like(counters), np.empty_like(counters)
        for stage in np.unique(stages).tolist():
            here, mixture = stages == stage, self._mixtures[stage]
            period, slot = np.divmod(counters[here] - mixture.start, len(mixture.table))
            found = mixture.table[slot]
            sources[here] = found
            drawn[here] = (
                self._before[stage][found] + period * mixture.per_period[found] + mixture.earlier[slot]
            )
        return sources, drawn

    def _blocks_of(self, source: int, epoch: int) -> _Blocks:
        """The block order of an epoch; the newest one is kept, because making it takes time per block."""
        kept = self._epochs.get(source)
        if kept is None or kept[0] != epoch:
            kept = self._epochs[source] = (epoch, self._order_blocks(source, epoch))
        return kept[1]

    def _order_blocks(self, source: int, epoch: int) -> _Blocks:
        return _Blocks(self._blocks[source], key_of(self._seed, self.names[source], epoch, "blocks"))

    def drawn(self, counter: int) -> dict[str, int]:
        """How many samples of each source come before global sample `counter`."""
        stage = int(np.searchsorted(self._starts, counter, side="right")) - 1
        mixture = self._mixtures[stage]
        counts = self._before[stage] + mixture.drawn(counter - mixture.start)
        return dict(zip(self.names, counts.tolist(), strict=True))

    def following_blocks(self, counter: int) -> dict[str, int]:
        """The block of each source that follows its current one at global sample `counter`."""
        following = {}
        for source, drawn in enumerate(self.drawn(counter).values()):
            epoch, position = divmod(drawn, int(self.rows[source]))
            order = self._blocks_of(source, epoch)
            end = int(order.ends[np.searchsorted(order.ends, position, side="right")])
            if end == self.rows[source]:  # the last of the epoch
                order, end = self._order_blocks(source, epoch + 1), 0
            following[self.names[source]] = int(order.order[np.searchsorted(order.ends, end, side="right")])
        return following


def stage_starts(
    stages: Sequence[Stage], sources: Sequence[str], batch_tokens: int, batch_rows: int
) -> list[tuple[int, dict[str, float]]]:
    """(first global sample, weights) of each stage, for `Order`. A stage starts with the first whole global
    batch (`batch_tokens` tokens, `batch_rows` rows) at or after its token.

    Raises DataError, which names the stage, for a value of another type, a first stage not at 0, stages less
    than a global batch apart or too far away, an unknown source, a weight below 0 and weights that are all 0.
    """
    starts: list[tuple[int, dict[str, float]]] = []
    for number, given in enumerate(stages):
        where = f"data.stages[{number}]"
        try:
            stage = from_plain(Stage, vars(given), where)
        except ValueError as error:
            raise DataError(str(error)) from error
        first = -(-stage.tokens // batch_tokens) * batch_rows
        if number == 0 and stage.tokens != 0:
            raise DataError(f"{where} starts at tokens={stage.tokens}: the first stage starts at 0")
        if first > MAX_SAMPLES:
            raise DataError(
                f"{where} with tokens={stage.tokens} starts beyond {MAX_SAMPLES} samples: lower it"
            )
        if number and first <= starts[-1][0]:
            raise DataError(
                f"{where} with tokens={stage.tokens} does not start a global batch of {batch_tokens} tokens "
                f"or more after stage {number - 1}: raise tokens"
            )
        for name, weight in stage.weights.items():
            if name not in sources:
                raise DataError(f"{where}.weights: unknown source {name!r}; {nearest(name, sources)}")
            if weight < 0:
                raise DataError(f"{where}.weights: {name}={weight} must be 0 or above")
        if not any(stage.weights.values()):
            raise DataError(f"{where}.weights: no source has a weight above 0: raise one")
        starts.append((first, stage.weights))
    return starts
