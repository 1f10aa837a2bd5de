"""(seed, step) -> the batch of this rank. No state: any step of any layout is one call away.

There are no worker processes: sending a batch from one to the trainer costs more than making it, so the
trainer calls `Loader.batch` in one thread, one step ahead.
"""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.nearest import nearest
from common.schema import as_type
from data_pipeline.errors import DataError
from data_pipeline.loading.packing import Packing, PackingPlan, Rows, packing_of
from data_pipeline.loading.sample_order import MAX_SAMPLES, Order, Stage, stage_starts
from data_pipeline.loading.streaming import ShardCache, open_data
from data_pipeline.shards.manifest import SPLITS, Manifest, Shard
from data_pipeline.shards.shard_files import DamagedError
from data_pipeline.shards.token_stream import TokenStream

PLANNED_ROWS = 512  # rows of this rank planned at once: planning one row costs nearly as much


@dataclass(frozen=True)
class _Plans:
    """Which rows of which sources make up some steps of this rank, and how to read them."""

    first: int  # the first step
    sources: np.ndarray  # (steps, b) source numbers
    epochs: np.ndarray  # (steps, b)
    rows: np.ndarray  # (steps, b)
    # (steps + 1,) rows of the source before each step; the plan of all its rows
    by_source: dict[int, tuple[np.ndarray, PackingPlan]]


@dataclass(frozen=True)
class Batch:
    """b rows of T tokens. S - 1 is the largest number of segments in any row of the data set."""

    tokens: np.ndarray  # (b, T) int32, PAD_ID behind the last document of a row
    # (b, T) int32, -100 where there is nothing to predict: the next token, or the label in a labelled source
    targets: np.ndarray
    cu_seqlens: np.ndarray  # (b, S) int32, starts of the segments of each row, padded with T
    lengths: np.ndarray  # (b,) int32, tokens before the padding, which is the last segment of its row
    sample_ids: list[tuple[str, int]]  # (source, row) of each row
    epochs: list[int]  # of each row's source

    def documents(self, rows: slice) -> tuple[np.ndarray, int]:
        """The segments of some rows, one row after the other, without empty ones.

        Returns:
            (n + 1,) int32, where each begins in the tokens of these rows, and their number; and the tokens of
            the longest.
        """
        starts, T = self.cu_seqlens[rows], self.tokens.shape[1]
        first = np.arange(len(starts), dtype=np.int32)[:, None] * T
        boundaries = np.unique(np.append(starts + first, len(starts) * T)).astype(np.int32)
        return boundaries, int(np.diff(boundaries).max())


class Loader:
    """Batches of a built data folder: the global batch of a step depends only on (manifest, seed, step) and
    the settings below.

    `rows`, `dropped_tokens`, `padded_tokens`: per source, rows in an epoch, tokens in no row, and
    positions of an epoch without a token; sources that no stage draws from are absent. `labelled`: the
    sources that have labels. `longest_document`: its tokens, by source. `damaged`: (source, row) left out,
    with the reason.
    """

    def __init__(
        self,
        path: str | Path,
        sequence_length: int,
        global_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        split: str = "train",
        *,
        packing: str = "concat",
        stages: Sequence[Stage] = (),
        shuffle_shards: int = 0,
        max_damaged_rows: int = 0,
        cache: str | Path | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        """
        Args:
            path: folder or URL, see streaming.open_data, also for `cache` and `cache_bytes`.
            packing: concat | best_fit, see packing.py.
            stages: see sample_order.stage_starts; none: the recipe's weights for the whole run.
            shuffle_shards: 0: an epoch is a permutation of all rows; K: of the blocks of K shards, and of the
                rows of each block, so that few shards are in use at a time.
            max_damaged_rows: distinct rows that this process may leave out because a member they touch is
                damaged. A left-out row is padding without targets, so that no other row moves. One more
                damaged row is a DataError.

        Raises DataError for an argument of another type, a folder that fails `open_manifest`, a global batch
        that does not divide among the ranks or does not fit into memory, a source that does not fill one row
        and a cache too small for its blocks.
        """
        _check_types(locals())
        _check(sequence_length, global_batch_size, rank, world_size, split)
        _check_options(shuffle_shards, max_damaged_rows, cache_bytes)
        manifest, self._files = open_data(path, cache, cache_bytes)
        self.manifest = manifest
        self.tokenizer_path = manifest.tokenizer_path
        self.vocab_size = manifest.vocab_size
        self.sequence_length = sequence_length
        self.global_batch_size = global_batch_size
        self.max_damaged_rows = max_damaged_rows
        self.damaged: dict[tuple[str, int], str] = {}
        self._shuffle_shards = shuffle_shards
        self._rank_batch = global_batch_size // world_size
        self._rank = rank
        weights = {name: source.weight for name, source in manifest.sources.items()}
        batch_tokens = global_batch_size * sequence_length
        starts = stage_starts(stages, list(weights), batch_tokens, global_batch_size) or [(0, weights)]
        self._shards: dict[str, tuple[Shard, ...]] = {}
        self._packings: dict[str, Packing] = {}
        for name in weights:
            if any(stage.get(name, 0) for _, stage in starts):
                self._add_source(manifest, name, split, packing)
        self.rows = {name: packing.rows for name, packing in self._packings.items()}
        self.labelled = {name for name in self._packings if manifest.sources[name].labelled}
        self.dropped_tokens = {name: packing.dropped_tokens for name, packing in self._packings.items()}
        self.longest_document = {name: p.longest_document for name, p in self._packings.items()}
        self.padded_tokens = {name: packing.padded_tokens for name, packing in self._packings.items()}
        self._cu_size = 1 + max(packing.max_segments for packing in self._packings.values())
        self._check_cache()
        blocks = {name: packing.block_rows for name, packing in self._packings.items()}
        self._order = Order(starts, blocks, seed)
        self._plans: _Plans | None = None
        identity: list[object] = [manifest.sha256, sequence_length, seed, packing, split]
        if stages or shuffle_shards:  # without them unchanged, so that older checkpoints still match
            identity += [[asdict(stage) for stage in stages], stages and global_batch_size, shuffle_shards]
        self.fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def _add_source(self, manifest: Manifest, name: str, split: str, kind: str) -> None:
        stream = TokenStream(manifest, name, split, self._files)
        blocks = None
        if self._shuffle_shards:
            documents = len(stream.document_starts) - 1
            blocks = np.append(stream.shard_documents[:-1][:: self._shuffle_shards], documents)
        packing = packing_of(kind)(stream, self.sequence_length, blocks)
        if packing.rows == 0:
            raise DataError(
                f"source {name!r} has {stream.tokens} {split} tokens, less than one row of sequence_length "
                f"{self.sequence_length}: lower it or build with more {split} documents"
            )
        self._shards[name], self._packings[name] = stream.shards, packing

    def _block_shards(self, name: str, block: int) -> tuple[Shard, ...]:
        size = self._shuffle_shards or len(self._shards[name])
        return self._shards[name][block * size : (block + 1) * size]

    def _check_cache(self) -> None:
        """Each source has one block in use and the next one being fetched; without blocks, all its shards."""
        limit = self._files.cache_bytes if isinstance(self._files, ShardCache) else None
        if limit is None:
            return
        needed = 0
        for name, packing in self._packings.items():
            blocks = range(len(packing.block_rows))
            sizes = sorted(sum(shard.bytes for shard in self._block_shards(name, b)) for b in blocks)
            needed += sum(sizes[-2:])
        if needed > limit:
            raise DataError(
                f"data.cache_bytes={limit} is less than the {needed} bytes of shards that are in use at once "
                f"with data.shuffle_shards={self._shuffle_shards}: raise it, or choose fewer shards (0: all)"
            )

    def batch(self, step: int) -> Batch:
        """This rank's contiguous share, global_batch_size / world_size rows, of global batch `step`
        (0-based).

        Raises DataError, naming shard and member, where the data is damaged.
        """
        if step < 0:
            raise DataError(f"step {step} is negative: steps count from 0")
        if (step + 1 + PLANNED_ROWS) * self.global_batch_size > MAX_SAMPLES:
            raise DataError(
                f"step {step} is beyond the last sample that can be counted, {MAX_SAMPLES}: lower it"
            )
        plans = self._plan(step)
        number = step - plans.first
        sources, rows = plans.sources[number], plans.rows[number]
        out = Rows(len(rows), self.sequence_length, self._cu_size)
        for source in set(sources.tolist()):
            self._read(step, source, out)
        names = [self._order.names[source] for source in sources.tolist()]
        ids = list(zip(names, rows.tolist(), strict=True))
        self._prefetch(step)
        epochs = plans.epochs[number].tolist()
        return Batch(out.tokens, out.targets, out.cu_seqlens, out.lengths, ids, epochs)

    def _read(self, step: int, source: int, out: Rows) -> None:
        """Reads the rows of one source; leaves damaged ones out, up to max_damaged_rows."""
        plans, packing = self._plan(step), self._packings[self._order.names[source]]
        before, plan = plans.by_source[source]
        first, stop = before[step - plans.first :][:2].tolist()
        out_rows = np.flatnonzero(plans.sources[step - plans.first] == source)
        try:
            packing.read(plan, first, stop, out, out_rows)
            return
        except DamagedError:
            if self.max_damaged_rows == 0:
                raise
        for number, out_row in enumerate(out_rows.tolist(), start=first):
            try:
                packing.read(plan, number, number + 1, out, np.array([out_row]))
            except DamagedError as error:
                row = int(plans.rows[step - plans.first, out_row])
                self._leave_out(step, self._order.names[source], row, error)
                out.clear(out_row)

    def _leave_out(self, step: int, name: str, row: int, error: DamagedError) -> None:
        if (name, row) in self.damaged:
            return
        if len(self.damaged) == self.max_damaged_rows:
            raise DataError(
                f"step {step}: row {row} of source {name!r} is one more than the data.max_damaged_rows="
                f"{self.max_damaged_rows} allowed: {error}"
            ) from error
        self.damaged[name, row] = str(error)
        print(
            f"warning: step {step}: row {row} of source {name!r} is left out, number {len(self.damaged)} of "
            f"data.max_damaged_rows={self.max_damaged_rows}: {error}",
            file=sys.stderr,
        )

    def _prefetch(self, step: int) -> None:
        if not self._shuffle_shards or not isinstance(self._files, ShardCache):
            return
        following = self._order.following_blocks(step * self.global_batch_size)
        self._files.prefetch(
            shard for name, block in following.items() for shard in self._block_shards(name, block)
        )

    def _plan(self, step: int) -> _Plans:
        """The plans of several steps including `step`; kept, because the next step is usually among them."""
        steps = max(1, PLANNED_ROWS // self._rank_batch)
        plans = self._plans
        if plans is None or plans.first != step - step % steps:
            first = step - step % steps
            batches = np.arange(first, first + steps)[:, None] * self.global_batch_size
            counters = batches + np.arange(self._rank_batch) + self._rank * self._rank_batch
            located = self._order.locate(counters.reshape(-1))
            sources, epochs, rows = (part.reshape(counters.shape) for part in located)
            by_source = {}
            for source in np.unique(sources).tolist():
                here = sources == source
                before = np.append(0, np.cumsum(here.sum(axis=1)))
                packing = self._packings[self._order.names[source]]
                by_source[source] = (before, packing.plan(rows[here], self._cu_size))
            plans = self._plans = _Plans(first, sources, epochs, rows, by_source)
        return plans

    def sample_ids(self, step: int) -> list[tuple[str, int]]:
        """(source, row) of each row of the global batch of a step, over all ranks."""
        first = step * self.global_batch_size
        sources, _, rows = self._order.locate(np.arange(first, first + self.global_batch_size))
        return [(self._order.names[s], r) for s, r in zip(sources.tolist(), rows.tolist(), strict=True)]

    def epoch(self, step: int) -> dict[str, float]:
        """Passes over each source before step `step`, e.g. 1.25 after one and a quarter."""
        drawn = self._order.drawn(step * self.global_batch_size)
        return {name: count / self.rows[name] for name, count in drawn.items()}


# ---- what is refused before any file is opened

_TYPES: dict[str, Any] = {
    "sequence_length": int,
    "global_batch_size": int,
    "seed": int,
    "rank": int,
    "world_size": int,
    "split": str,
    "packing": str,
    "stages": list[Stage],
    "shuffle_shards": int,
    "max_damaged_rows": int,
    "cache_bytes": int | None,
}


def _check_types(arguments: dict[str, Any]) -> None:
    try:
        for name, hint in _TYPES.items():
            as_type(hint, arguments[name], name)
    except ValueError as error:
        raise DataError(str(error)) from error
    for name, given in (("data.path", arguments["path"]), ("data.cache", arguments["cache"] or "")):
        if not isinstance(given, str | Path) or "\0" in str(given):
            raise DataError(f"{name}={given!r} is not a path: fix it")


def _check(sequence_length: int, global_batch_size: int, rank: int, world_size: int, split: str) -> None:
    if sequence_length < 1 or global_batch_size < 1:
        raise DataError(
            f"sequence_length {sequence_length} and global_batch_size {global_batch_size} must be above 0"
        )
    if not 0 <= rank < world_size:
        raise DataError(f"rank {rank} is not in 0..{world_size - 1}: fix rank or world_size")
    if global_batch_size % world_size:
        raise DataError(
            f"global_batch_size {global_batch_size} does not divide among {world_size} ranks: "
            f"make it a multiple of {world_size}"
        )
    needed = 12 * sequence_length * global_batch_size // world_size  # stored, tokens, targets
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise DataError(
            f"sequence_length {sequence_length} and global_batch_size {global_batch_size} make batches of "
            f"{needed} bytes on each of {world_size} ranks, more than the {memory} of this machine: lower one"
        )
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}; {nearest(split, SPLITS)}")


def _check_options(shuffle_shards: int, max_damaged_rows: int, cache_bytes: int | None) -> None:
    if shuffle_shards < 0 or max_damaged_rows < 0:
        raise DataError(
            f"data.shuffle_shards={shuffle_shards} and data.max_damaged_rows={max_damaged_rows} must be "
            "0 or above"
        )
    if cache_bytes is not None and cache_bytes < 0:
        raise DataError(f"data.cache_bytes={cache_bytes} must be 0 or above")
