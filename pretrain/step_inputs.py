"""What a step computes on, made in the reader's thread: micro-batches in pinned host memory, and counts."""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from data_pipeline.loading.loader import Batch, Loader
from model import ModelConfig
from model.backends.flash import Documents
from model.latent_cot.targets import loss_counts
from pretrain.depths import StepDepths
from pretrain.process_group import device, rank
from pretrain.transfer import pinned, to_device

T = TypeVar("T")


@dataclass(frozen=True)
class MicroBatch:
    """b rows of T tokens in pinned host memory; see loader.Batch."""

    tokens: Tensor  # (b, T) int32
    targets: Tensor  # (b, T) int32
    cu_seqlens: Tensor  # (b, S) int32
    documents: Documents  # the same boundaries, as flash kernels read them
    lengths: Tensor | None  # (b,) int32; None: no row has padding
    num_steps: int | None  # loop steps that every rank takes for some row; None: the config's
    depths: Tensor | None  # (b,) int64 loop steps of each row; None: all the same

    def on_device(self) -> dict[str, Any]:
        """The arguments of the model."""
        inputs: dict[str, Any] = {
            "tokens": to_device(self.tokens).long(),
            "targets": to_device(self.targets).long(),
            "cu_seqlens": to_device(self.cu_seqlens),
            "documents": Documents(to_device(self.documents.boundaries), self.documents.longest),
        }
        if self.lengths is not None:  # padding enters no statistic of experts or loop
            columns = torch.arange(self.tokens.shape[1], device=device())
            inputs["attention_mask"] = columns < to_device(self.lengths)[:, None]
        if self.num_steps is not None:
            inputs["num_steps"] = self.num_steps
        if self.depths is not None:
            inputs["depths"] = to_device(self.depths)
        return inputs


@dataclass(frozen=True)
class StepInputs:
    """This rank's part of a global batch."""

    micro_batches: list[MicroBatch]
    counts: dict[str, int]  # see read_step
    pinned_counts: Tensor  # the same numbers, (counts,) int64
    depths: StepDepths | None  # of the rows of all ranks; None: the config's


def read_step(
    loader: Loader,
    step: int,
    model_config: ModelConfig,
    micro_batch_size: int,
    depths: StepDepths | None = None,
    training_step: int | None = None,
) -> StepInputs:
    """Reads this rank's rows of a step, in whatever thread calls it.

    The counts are the host's own arithmetic on the loader's numbers: every loss term's counted_in,
    `real_tokens`, which excludes padding, `looped_tokens`, the same times their row's loop steps, and
    `damaged_rows`, skipped so far.

    Args:
        depths: of the step's rows; None: the config's, for validation, whose looped tokens are not counted.
        training_step: the optimizer step that a curriculum is in, if it is not `step`.

    Raises:
        DataError: see Loader.batch.
        ValueError: see latent_cot.targets.loss_counts.
    """
    batch = loader.batch(step)
    rows = [torch.from_numpy(part) for part in (batch.tokens, batch.targets, batch.cu_seqlens)]
    counts = loss_counts(model_config, step if training_step is None else training_step, *rows)
    counts["real_tokens"] = int(batch.lengths.sum())
    if depths is not None:
        counts["looped_tokens"] = int((torch.from_numpy(batch.lengths) * depths.rows[rank()]).sum())
    counts["damaged_rows"] = len(loader.damaged)
    micro_batches = list(_micro_batches(batch, micro_batch_size, depths))
    return StepInputs(micro_batches, counts, pinned(torch.tensor([*counts.values()])), depths)


def _micro_batches(batch: Batch, size: int, depths: StepDepths | None) -> Iterator[MicroBatch]:
    for start in range(0, len(batch.tokens), size):
        rows = slice(start, start + size)
        padded = bool((batch.lengths[rows] < batch.tokens.shape[1]).any())
        boundaries, longest = batch.documents(rows)
        yield MicroBatch(
            tokens=pinned(torch.from_numpy(batch.tokens[rows])),
            targets=pinned(torch.from_numpy(batch.targets[rows])),
            cu_seqlens=pinned(torch.from_numpy(batch.cu_seqlens[rows])),
            documents=Documents(pinned(torch.from_numpy(boundaries)), longest),
            lengths=pinned(torch.from_numpy(batch.lengths[rows])) if padded else None,
            num_steps=None if depths is None else depths.passes(rows),
            depths=pinned(depths.rows[rank(), rows]) if depths is not None and depths.per_row else None,
        )


def one_ahead(reader: Executor, read: Callable[[int], T], steps: int) -> Iterator[T]:
    """read(0), read(1), ... read(steps - 1), each read while the one before it is in use."""
    pending = reader.submit(read, 0)
    for step in range(1, steps + 1):
        current = pending.result()
        if step < steps:
            pending = reader.submit(read, step)
        yield current
