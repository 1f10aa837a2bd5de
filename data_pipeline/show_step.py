"""What a step of a run saw, as text: `python data_pipeline/show_step.py --run runs/NAME --step N`.

Steps are counted as in metrics.jsonl: the first one is 1. Text in ⟦ ⟧ is never predicted (a masked prompt);
of a labelled source the labels are listed instead.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import yaml

from common.errors import user_errors
from common.schema import from_plain
from data_pipeline.errors import DataError
from data_pipeline.loading.loader import Batch, Loader
from data_pipeline.loading.sample_order import Stage
from data_pipeline.shards.format import IGNORE_INDEX
from data_pipeline.tokenization.tokenizer import Tokenizer


@dataclass
class _Data:
    path: str
    sequence_length: int
    packing: str = "concat"
    stages: list[Stage] = field(default_factory=list)
    shuffle_shards: int = 0
    max_damaged_rows: int = 0
    cache: str | None = None
    cache_bytes: int | None = None
    tokenizer: str | None = None


@dataclass
class _Run:
    """The part of a run's config.yaml that decides its batches."""

    seed: int
    global_batch_size: int
    data: _Data


def run_loader(run: Path, rank: int = 0, world_size: int = 1) -> Loader:
    """The training loader of a run folder, as its config.yaml describes it.

    Raises DataError for a folder without a config.yaml that names data, and for data that was tokenised again
    since.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise DataError(f"{run} has no config.yaml, so no run started there: fix --run")
    try:
        config = yaml.safe_load(path.read_text())
        if not isinstance(config, dict):
            raise ValueError("it is not a mapping of keys to values")
        known = {field.name for field in fields(_Run)}
        settings = from_plain(_Run, {key: config[key] for key in known if key in config}, "config")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not the config of a run ({reason}): fix --run") from error
    data = vars(settings.data)
    del data["tokenizer"]  # only compared with the one of the data
    loader = Loader(
        **data,
        global_batch_size=settings.global_batch_size,
        seed=settings.seed,
        rank=rank,
        world_size=world_size,
    )
    saved = run / "tokenizer.model"
    if saved.is_file() and saved.read_bytes() != loader.tokenizer_path.read_bytes():
        raise DataError(
            f"{settings.data.path} was built again after {run} with another tokenizer: build it as it was"
        )
    return loader


def describe(loader: Loader, tokenizer: Tokenizer, batch: Batch) -> Iterator[str]:
    """The lines that show a batch: one per row, then one per segment of it."""
    labelled = loader.labelled
    for row, ((source, number), epoch) in enumerate(zip(batch.sample_ids, batch.epochs, strict=True)):
        tokens, targets, length = batch.tokens[row], batch.targets[row], int(batch.lengths[row])
        starts = batch.cu_seqlens[row]
        edges = [*starts[starts < length].tolist(), length] if length else []
        reason = loader.damaged.get((source, number))
        yield (
            f"row {row}: source {source}, row {number}, epoch {epoch}, {max(len(edges) - 1, 0)} segments, "
            f"{int((targets != IGNORE_INDEX).sum())} targets, {len(tokens) - length} positions of padding"
            + (f", left out: {reason}" if reason else "")
        )
        for start, stop in zip(edges, edges[1:], strict=False):
            part = tokens[start:stop], targets[start:stop]
            text = _labelled(tokenizer, *part) if source in labelled else _marked(tokenizer, *part)
            yield f"  [{start}, {stop}) {text}"


def _marked(tokenizer: Tokenizer, tokens: np.ndarray, targets: np.ndarray) -> str:
    """The text as a quoted string, what is not predicted in ⟦ ⟧; `<s>` and `</s>` where the document starts
    and ends.
    """
    masked = np.append(False, targets[:-1] == IGNORE_INDEX)  # the first token is predicted in no case
    masked[0] = len(masked) > 1 and masked[1]
    edges = np.flatnonzero(np.diff(masked.astype(np.int8), prepend=2, append=2)).tolist()
    parts = []
    for start, stop in zip(edges, edges[1:], strict=False):
        text = repr(tokenizer.decode(tokens[start:stop].tolist()))[1:-1]
        parts.append(f"⟦{text}⟧" if masked[start] else text)
    begin = "<s>" if tokens[0] == tokenizer.bos_id else "..."
    return begin + "".join(parts) + ("</s>" if tokens[-1] == tokenizer.eos_id else "...")


def _labelled(tokenizer: Tokenizer, tokens: np.ndarray, labels: np.ndarray) -> str:
    positions = np.flatnonzero(labels != IGNORE_INDEX).tolist()
    shown = ", ".join(f"{position} {tokenizer.decode([int(labels[position])])!r}" for position in positions)
    return f"{tokenizer.decode(tokens.tolist())!r} labels: {shown}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Show what a training step saw, as text.")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="the run's folder")
    parser.add_argument("--step", type=int, required=True, help="as in metrics.jsonl, from 1 on")
    parser.add_argument("--rank", type=int, default=0, help="whose share of the batch")
    parser.add_argument("--world_size", type=int, default=1, help="ranks that share it; 1: the whole batch")
    arguments = parser.parse_args(argv)
    with user_errors(DataError, OSError):
        rank, world_size, step = arguments.rank, arguments.world_size, arguments.step
        if step < 1:
            raise DataError(f"--step {step} is below 1: the first step is 1, as in metrics.jsonl")
        if not 0 <= rank < world_size:
            raise DataError(f"--rank {rank} is not in 0..{world_size - 1}: change it or --world_size")
        loader = run_loader(arguments.run, rank, world_size)
        batch = loader.batch(step - 1)
        print(
            f"step {step}, rank {rank} of {world_size}: {len(batch.tokens)} rows of {loader.sequence_length} "
            f"tokens, {int((batch.targets != IGNORE_INDEX).sum())} targets"
        )
        for line in describe(loader, Tokenizer(loader.tokenizer_path), batch):
            print(line)


if __name__ == "__main__":
    main()
