"""(seed, step) -> the batch of this rank. No state: any step of any layout is one call away."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.order import Order
from data_pipeline.packing import ConcatPacking, cu_seqlens
from data_pipeline.recipe import nearest
from data_pipeline.shards import SPLITS, TokenStream, open_manifest


@dataclass(frozen=True)
class Batch:
    """b rows of T tokens. S - 1 is the largest number of segments in any row of the data set."""

    tokens: np.ndarray  # (b, T) int32
    # (b, T) int32, -100 where there is nothing to predict: the next token, or the label in a labelled source
    targets: np.ndarray
    cu_seqlens: np.ndarray  # (b, S) int32, starts of the segments of each row, padded with T
    sample_ids: list[tuple[str, int]]  # (source, row) of each row


class Loader:
    """Batches of a built data folder: the global batch of a step depends on (manifest, seed, step) alone.

    `rows`, `dropped_tokens`: per source, rows in an epoch and tokens of the incomplete last row. Raises
    DataError for a folder that fails `open_manifest`, a global batch that does not divide among the ranks and
    a source that does not fill one row.
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
    ) -> None:
        if sequence_length < 1 or global_batch_size < 1:
            raise DataError(
                f"sequence_length {sequence_length} and global_batch_size {global_batch_size} must be above 0"
            )
        if global_batch_size % world_size:
            raise DataError(
                f"global_batch_size {global_batch_size} does not divide among {world_size} ranks: "
                f"make it a multiple of {world_size}"
            )
        if split not in SPLITS:
            raise DataError(f"unknown split {split!r}; {nearest(split, SPLITS)}")
        assert 0 <= rank < world_size, (rank, world_size)
        manifest = open_manifest(path)
        self.tokenizer_path = manifest.tokenizer_path
        self.vocab_size = manifest.vocab_size
        self.sequence_length = sequence_length
        self.global_batch_size = global_batch_size
        self._rank_batch = global_batch_size // world_size
        self._rank = rank
        self._packings: dict[str, ConcatPacking] = {}
        for name in manifest.sources:
            packing = ConcatPacking(TokenStream(manifest, name, split), sequence_length)
            if packing.rows == 0:
                raise DataError(
                    f"source {name!r} has {packing.dropped_tokens} {split} tokens, less than one row of "
                    f"sequence_length {sequence_length}: lower it or build with more {split} documents"
                )
            self._packings[name] = packing
        self.rows = {name: packing.rows for name, packing in self._packings.items()}
        self.dropped_tokens = {name: packing.dropped_tokens for name, packing in self._packings.items()}
        self._cu_size = 1 + max(packing.max_segments for packing in self._packings.values())
        weights = {name: source.weight for name, source in manifest.sources.items()}
        self._order = Order.of(weights, self.rows, seed)
        identity = [manifest.sha256, sequence_length, seed, ConcatPacking.name, split]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def batch(self, step: int) -> Batch:
        """This rank's contiguous share, global_batch_size / world_size rows, of global batch `step`
        (0-based).

        Raises DataError, naming shard and member, where the data is damaged.
        """
        if step < 0:
            raise DataError(f"step {step} is negative: steps count from 0")
        ids = self._ids(step * self.global_batch_size + self._rank * self._rank_batch, self._rank_batch)
        parts = [self._packings[name].row(row) for name, row in ids]
        return Batch(
            tokens=np.stack([tokens for tokens, _, _ in parts]),
            targets=np.stack([targets for _, targets, _ in parts]),
            cu_seqlens=np.stack(
                [cu_seqlens(starts, self.sequence_length, self._cu_size) for _, _, starts in parts]
            ),
            sample_ids=ids,
        )

    def sample_ids(self, step: int) -> list[tuple[str, int]]:
        """(source, row) of each row of the global batch of a step, over all ranks."""
        return self._ids(step * self.global_batch_size, self.global_batch_size)

    def _ids(self, first: int, count: int) -> list[tuple[str, int]]:
        sources, _, rows = self._order.locate(np.arange(first, first + count))
        return [(self._order.names[s], r) for s, r in zip(sources.tolist(), rows.tolist(), strict=True)]

    def epoch(self, step: int) -> dict[str, float]:
        """Passes over each source before step `step`, e.g. 1.25 after one and a quarter."""
        drawn = self._order.drawn(step * self.global_batch_size)
        return {name: count / self.rows[name] for name, count in drawn.items()}
