"""What tasks with labels share: samples whose characters are tokens, drawn in blocks.

A sample is a text of one token per character with a label, the one character to predict there, at every
position where the task defines one. The label is not the next character: the text does not contain answers.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.sources.documents import LabelledDocument
from data_pipeline.tasks.splits import check_request, hashed_split

BLOCK = 1024  # samples drawn from one random stream
MAX_ROUNDS = 1000  # of BLOCK draws for a block


class Sample(NamedTuple):
    id: str
    text: str
    labels: tuple[tuple[int, str], ...]  # (index of a character in text, the character to predict there)
    answer: str  # the label of the last character


class Draws(NamedTuple):
    """n samples of L characters as ASCII codes, uint8."""

    texts: np.ndarray  # (n, L)
    labels: np.ndarray  # (n, L), 0: no label
    canonical: np.ndarray  # (n, K), equal for samples that must fall into the same split


Draw = Callable[[np.random.Generator, int], Draws]  # (random numbers, n) -> n samples


def labelled_document(sample: Sample) -> LabelledDocument:
    return LabelledDocument(sample.text, sample.labels)


def draw(name: str, task: Draw, num_samples: int, seed: int, split: str) -> Iterator[Sample]:
    """Yield `num_samples` samples of `task` whose last character has a label and that belong to `split`.

    Sample i depends on (name, seed, split, i) only; `name` holds the task and its sizes. Raises DataError for
    an unknown split, a negative count and sizes at which next to no draw has a label at its last character or
    belongs to the split.
    """
    check_request(num_samples, split)
    for first in range(0, num_samples, BLOCK):
        rows = _block(f"{name}/{seed}/{split}/{first // BLOCK}", name, task, split)
        for i, (text, label) in enumerate(rows[: num_samples - first], start=first):
            labels = tuple((k, character) for k, character in enumerate(label) if character != "\0")
            yield Sample(f"{name}-{split}-{seed}-{i}", text, labels, label[-1])


def _block(key: str, name: str, task: Draw, split: str) -> list[tuple[str, str]]:
    """BLOCK pairs of a text and its labels, as long as the text, NUL where there is none."""
    random = np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest(), "big"))
    rows: list[tuple[str, str]] = []
    for _ in range(MAX_ROUNDS):
        texts, labels, canonical = task(random, BLOCK)
        for i in np.flatnonzero(labels[:, -1]).tolist():
            if hashed_split(canonical[i].tobytes()) == split:
                rows.append((texts[i].tobytes().decode("ascii"), labels[i].tobytes().decode("ascii")))
        if len(rows) >= BLOCK:
            return rows[:BLOCK]
    raise DataError(
        f"{name}: only {len(rows)} of {MAX_ROUNDS * BLOCK} draws have a label at the end and are in split "
        f"{split}, {BLOCK} are needed: choose larger sizes or fewer hops"
    )
