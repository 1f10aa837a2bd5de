"""What a build will hold: which documents of which units stay, in which split, order and shard.

Made by one process once every unit is read; from then on shards can be written by any process of any machine.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_pipeline.encode import AnyDocument
from data_pipeline.errors import DataError
from data_pipeline.kinds import within_limits
from data_pipeline.order import key_of, permute
from data_pipeline.recipe import Recipe, source_options
from data_pipeline.shards import SPLITS, write_file
from data_pipeline.sources import LabelledDocument
from data_pipeline.tokenizer import train_tokenizer
from data_pipeline.units import Unit

PLAN = "plan.json"
SHARD_TEXT_BYTES = 128 * 2**20  # UTF-8; tokens of two bytes, three characters each, make shards of 85 MB
LABELLED_FACTOR = 4  # a character of a labelled text becomes a token and a label, of two bytes each


@dataclass(frozen=True)
class PlannedShard:
    """Places first..last of the shuffled documents of a split."""

    source: str
    split: str
    number: int
    first: int
    last: int

    @property
    def stem(self) -> str:
        return f"{self.source}-{self.split}-{self.number:05d}"


@dataclass(frozen=True)
class Plan:
    build_hash: str  # of recipe and input files
    labelled: dict[str, bool]  # by source
    shards: tuple[PlannedShard, ...]

    @staticmethod
    def load(work: Path) -> "Plan":
        fields = json.loads((work / PLAN).read_text())
        return Plan(**{**fields, "shards": tuple(PlannedShard(**shard) for shard in fields["shards"])})

    def save(self, work: Path) -> None:
        write_file(work / PLAN, json.dumps(asdict(self)).encode())


class Units:
    """The documents of a source, its units end to end."""

    def __init__(self, folders: list[Path]) -> None:
        self.units = [Unit(folder) for folder in folders]
        self.starts = np.concatenate([[0], np.cumsum([len(unit) for unit in self.units])]).astype(np.int64)

    def __getitem__(self, number: int) -> AnyDocument:
        unit = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.units[unit][number - int(self.starts[unit])]

    def column(self, name: str) -> np.ndarray:
        """(documents,) of units.DOCUMENT_DTYPE."""
        return np.concatenate([unit.documents[name] for unit in self.units])

    def is_labelled(self, source: str) -> bool:
        kinds = {unit.labelled for unit in self.units if len(unit)}
        if len(kinds) > 1:
            raise DataError(f"source {source!r} mixes documents with and without labels: make it two sources")
        return kinds == {True}


def make_plan(recipe: Recipe, units: dict[str, Units], build_hash: str, work: Path) -> Plan:
    """Chooses, splits and shuffles the documents of every source; the orders go to `work`.

    Raises:
        DataError: a source is left without training documents, or mixes kinds of documents.
    """
    shards: list[PlannedShard] = []
    labelled = {name: source.is_labelled(name) for name, source in units.items()}
    for source in recipe.sources:
        name = source["name"]
        sizes, held_out = units[name].column("bytes"), units[name].column("held_out")
        admitted = within_limits(source["kind"], source_options(source), sizes.tolist())
        for split in SPLITS:
            documents = np.flatnonzero(held_out[:admitted] == (split == "validation"))
            if split == "train" and not len(documents):
                raise DataError(f"source {name!r} has no training documents: check its options")
            key = key_of(recipe.seed, name, split)
            order = documents[permute(np.arange(len(documents)), max(1, len(documents)), key)]
            np.save(order_file(work, name, split), order)
            limit = SHARD_TEXT_BYTES // (LABELLED_FACTOR if labelled[name] else 1)
            bounds = cut(sizes[order], limit)
            shards += [PlannedShard(name, split, n, *bound) for n, bound in enumerate(bounds)]
    return Plan(build_hash, labelled, tuple(shards))


def order_file(work: Path, source: str, split: str) -> Path:
    """Numbers of the documents of a split, in the order of its shards; int64."""
    return work / f"{source}-{split}.npy"


def cut(sizes: np.ndarray, limit: int) -> list[tuple[int, int]]:
    """Bounds of runs that each end with the document that fills `limit` bytes."""
    ends = np.cumsum(sizes, dtype=np.int64)
    bounds, first = [], 0
    while first < len(sizes):
        before = int(ends[first - 1]) if first else 0
        last = min(int(np.searchsorted(ends, before + limit)) + 1, len(sizes))
        bounds.append((first, last))
        first = last
    return bounds


def tokenizer_model(recipe: Recipe, units: dict[str, Units], work: Path) -> bytes:
    """Trains the tokenizer on training documents, each source's share of the bytes by its weight."""
    total = sum(float(source["weight"]) for source in recipe.sources)

    def selection() -> Iterator[str]:
        for source in recipe.sources:
            name = source["name"]
            left = recipe.tokenizer.train_bytes * float(source["weight"]) / total
            # Shuffled, because files are often sorted by topic.
            for number in np.load(order_file(work, name, "train"), mmap_mode="r"):
                if left <= 0:
                    break
                document = units[name][int(number)]
                text = document.text
                if isinstance(document, LabelledDocument):
                    text += "".join(character for _, character in document.labels)
                left -= len(text.encode())
                yield text

    bar = tqdm(selection(), desc="train tokenizer", unit=" documents", disable=None)
    return train_tokenizer(bar, recipe.tokenizer.vocab_size, recipe.tokenizer.model_type)
