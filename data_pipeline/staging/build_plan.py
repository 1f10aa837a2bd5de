"""The plan of a build: which documents of which units stay, in which split, order and shard.

One process makes it once every unit is read; from then on any process of any machine can write shards.
"""

import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.files import write_file
from data_pipeline.cleaning.cleaner import choose
from data_pipeline.cleaning.report import CleaningReport
from data_pipeline.errors import DataError
from data_pipeline.loading.sample_order import key_of, permute
from data_pipeline.recipe import Recipe, source_options
from data_pipeline.shards.manifest import SPLITS
from data_pipeline.sources.documents import LabelledDocument
from data_pipeline.sources.registry import within_limits
from data_pipeline.staging.sealed import damaged, read_sealed, write_sealed
from data_pipeline.staging.units import Units
from data_pipeline.tokenization.tokenizer import train_tokenizer

PLAN = "plan.json"
SHARD_TEXT_BYTES = 128 * 2**20  # UTF-8; tokens of two bytes, three characters each, make shards of 85 MB
ORDER_DTYPE = np.dtype("<i8")
LABELLED_FACTOR = 4  # a character of a labelled text becomes a token and a label, of two bytes each


@dataclass(frozen=True)
class PlannedShard:
    """Positions first..last-1 of the shuffled documents of a split."""

    source: str
    split: str
    number: int
    first: int
    last: int
    crc32: int  # of these positions' part of the order

    @property
    def stem(self) -> str:
        return f"{self.source}-{self.split}-{self.number:05d}"


@dataclass(frozen=True)
class BuildPlan:
    build_hash: str  # of everything the bytes depend on
    labelled: dict[str, bool]  # by source
    shards: tuple[PlannedShard, ...]
    files: dict[str, str] = field(default_factory=dict)  # tokenizer and reports: name -> sha256

    @staticmethod
    def load(work: Path) -> "BuildPlan":
        """Raises DataError for a damaged file."""
        fields = read_sealed(work / PLAN)
        return BuildPlan(**{**fields, "shards": tuple(PlannedShard(**shard) for shard in fields["shards"])})

    def save(self, work: Path) -> None:
        write_sealed(work / PLAN, asdict(self))


def make_plan(
    recipe: Recipe, units: dict[str, Units], build_hash: str, work: Path
) -> tuple[BuildPlan, CleaningReport]:
    """Chooses, splits and shuffles the documents of every source; the orders go to `work`.

    Raises:
        DataError: a source is left without training documents, or mixes kinds of documents.
    """
    shards: list[PlannedShard] = []
    labelled = {name: source.is_labelled(name) for name, source in units.items()}
    sizes = {name: source.column("bytes") for name, source in units.items()}
    admitted = {
        source["name"]: within_limits(source["kind"], source_options(source), sizes[source["name"]].tolist())
        for source in recipe.sources
    }
    kept, report = choose(units, admitted, recipe.cleaning)
    for name, source in units.items():
        held_out = source.column("held_out")[: admitted[name]]
        for split in SPLITS:
            documents = np.flatnonzero(kept[name] & (held_out == (split == "validation")))
            if split == "train" and not len(documents):
                raise DataError(f"source {name!r} has no training documents: check its options and cleaning")
            key = key_of(recipe.seed, name, split)
            order = documents[permute(np.arange(len(documents)), max(1, len(documents)), key)]
            write_file(order_file(work, name, split), order.astype(ORDER_DTYPE).tobytes())
            limit = SHARD_TEXT_BYTES // (LABELLED_FACTOR if labelled[name] else 1)
            bounds = cut(sizes[name][order], limit)
            for number, (first, last) in enumerate(bounds):
                checksum = zlib.crc32(order[first:last].astype(ORDER_DTYPE).tobytes())
                shards.append(PlannedShard(name, split, number, first, last, checksum))
    return BuildPlan(build_hash, labelled, tuple(shards)), report


def order_file(work: Path, source: str, split: str) -> Path:
    """Numbers of the documents of a split, in the order of its shards, as ORDER_DTYPE."""
    return work / f"{source}-{split}.order"


def read_order(work: Path, shard: PlannedShard) -> np.ndarray:
    """(documents,) int64: the numbers of the shard's documents. Raises DataError for a damaged file."""
    path = order_file(work, shard.source, shard.split)
    try:
        with path.open("rb") as file:
            file.seek(shard.first * ORDER_DTYPE.itemsize)
            data = file.read((shard.last - shard.first) * ORDER_DTYPE.itemsize)
    except FileNotFoundError as error:
        raise damaged(path, "it is missing") from error
    if zlib.crc32(data) != shard.crc32:
        raise damaged(path, f"the checksum of shard {shard.number} differs")
    return np.frombuffer(data, ORDER_DTYPE)


def cut(sizes: np.ndarray, limit: int) -> list[tuple[int, int]]:
    """Bounds (first, last + 1) of runs that each end with the document that reaches `limit` bytes."""
    ends = np.cumsum(sizes, dtype=np.int64)
    bounds, first = [], 0
    while first < len(sizes):
        before = int(ends[first - 1]) if first else 0
        last = min(int(np.searchsorted(ends, before + limit)) + 1, len(sizes))
        bounds.append((first, last))
        first = last
    return bounds


def tokenizer_model(recipe: Recipe, units: dict[str, Units], plan: BuildPlan, work: Path) -> bytes:
    """The recipe's tokenizer, or one trained on training documents, with each source's share of the bytes set
    by its weight.
    """
    wanted = recipe.tokenizer
    if wanted.file is not None:
        return Path(wanted.file).read_bytes()
    assert wanted.vocab_size is not None
    total = sum(float(source["weight"]) for source in recipe.sources)

    def selection() -> Iterator[str]:
        for source in recipe.sources:
            name = source["name"]
            left = recipe.tokenizer.train_bytes * float(source["weight"]) / total
            # Shuffled, because files are often sorted by topic.
            own = (shard for shard in plan.shards if (shard.source, shard.split) == (name, "train"))
            for number in chain.from_iterable(read_order(work, shard) for shard in own):
                if left <= 0:
                    break
                document = units[name][int(number)]
                text = document.text
                if isinstance(document, LabelledDocument):
                    text += "".join(character for _, character in document.labels)
                left -= len(text.encode())
                yield text

    bar = tqdm(selection(), desc="train tokenizer", unit=" documents", disable=None)
    return train_tokenizer(bar, wanted.vocab_size, wanted.model_type, thought_pieces=wanted.thought_pieces)
