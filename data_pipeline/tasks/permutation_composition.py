"""In-context permutation composition: the word problem of S5 with its generators written in the text.

The word problem of S5 is the standard test of state tracking (Liu et al., arXiv 2210.10749; Merrill et al.,
arXiv 2404.08819): given a word of group elements, say at each position what they compose to so far. Here the
elements are not tokens whose meaning the weights may hold: each text defines its own permutations and follows
one point through a word of them.

    text       = definition {definition} ":" point word    a25134b31254:3abba
    definition = letter images      a25134: a sends 1 to 2, 2 to 5, 3 to 1, 4 to 3, 5 to 4
    word       = letter {letter}    applied from left to right

The label at each letter of the word is where the point is after it; definitions have no labels. A point
suffices: its image under a word of S5 is as hard as the whole product (both NC1-complete, Barrington 1989),
and it is one character. The permutations of a text generate all of S5 or A5, neither of which is solvable, so
no constant depth computes the labels of long words unless TC0 = NC1; for 3 and 4 points the groups are
solvable, which makes them easier controls.

**Guessing.** The start is uniform, so all labels are. The sign of the product, a sum modulo 2, is the part of
S5 that a shallow network computes; A5, the even permutations, is not: it has no smaller quotient. The sign
says next to nothing about a single point, as even and odd permutations alike move it anywhere. `--audit`
measures this and three other shortcuts, of which `any order` gains most, on short words.

Texts that are equal up to the names of letters and points fall into the same split.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, permutations
from math import factorial
from typing import NamedTuple

import numpy as np

from data_pipeline.tasks.labelled import Draws, Sample, draw, labelled_document
from data_pipeline.tasks.task import Evaluation, SyntheticTask, require, size

MAX_LENGTH = 4096  # letters of a word
MAX_GENERATORS = 8


@dataclass(frozen=True)
class Options:
    points: int = size(5, "n of S_n, 3 to 5")
    generators: int = size(2, "permutations that a text defines")
    length: int = size(12, "letters of the word")


class Group(NamedTuple):
    """S_n: N = n! permutations, numbered; points are 0..n-1."""

    images: np.ndarray  # (N, n) uint8: images[g, x] is where g sends x
    conjugates: np.ndarray  # (N, N): conjugates[s, g] is the number of s g s^-1
    pairs: np.ndarray  # (P, 2): the pairs that generate A_n or S_n


@lru_cache
def symmetric_group(points: int) -> Group:
    """S_n of n = `points`, its numbers in the order of itertools.permutations: number 0 is the identity."""
    images = np.array(list(permutations(range(points))), np.uint8)
    digit_weights = points ** np.arange(points)
    numbers = np.zeros(points**points, np.int64)
    numbers[images @ digit_weights] = np.arange(len(images))
    products = numbers[images[:, images] @ digit_weights]  # (N, N): products[a, b] is the number of a after b
    inverses = numbers[np.argsort(images, axis=1) @ digit_weights]  # (N,)
    conjugates = products[products, inverses[:, None]]
    # What each pair generates, for all pairs at once: from the identity, number 0, one more factor at a time.
    pairs = np.indices(products.shape).reshape(2, -1).T  # (N * N, 2)
    reached = np.zeros((len(pairs), len(images)), bool)
    reached[:, 0] = True
    before = 0
    while (now := int(reached.sum())) > before:
        before = now
        for factor in pairs.T:
            reached |= np.take_along_axis(reached, products[inverses[factor]], axis=1)
    return Group(images, conjugates, pairs[reached.sum(axis=1) >= factorial(points) // 2])


def generate(
    num_samples: int, points: int, generators: int, length: int, seed: int, split: str = "train"
) -> Iterator[Sample]:
    """Yield samples of generators * (points + 1) + 2 + length characters; sample i depends on the other
    arguments and i only.

    Raises DataError for `points` outside 3..5, `generators` outside 2..MAX_GENERATORS, `length` outside
    1..MAX_LENGTH, an unknown split, a negative count and sizes that leave next to no sample in the split.
    """
    require("points", points, 3, 5)
    require("generators", generators, 2, MAX_GENERATORS)
    require("length", length, 1, MAX_LENGTH)

    def task(random: np.random.Generator, count: int) -> Draws:
        group = symmetric_group(points)
        rows = np.arange(count)
        elements = random.integers(len(group.images), size=(count, generators))
        elements[:, :2] = group.pairs[random.integers(len(group.pairs), size=count)]
        start = random.integers(points, size=count, dtype=np.uint8)
        word = random.integers(generators, size=(count, length), dtype=np.uint8)
        letters = np.tile(np.arange(generators, dtype=np.uint8) + ord("a"), (count, 1))
        names = random.permuted(letters, axis=1)  # of the definitions in their order

        definitions = np.concatenate([names[:, :, None], group.images[elements] + ord("1")], axis=2)
        texts = np.concatenate(
            [
                definitions.reshape(count, -1),
                np.full((count, 1), ord(":"), np.uint8),
                start[:, None] + np.uint8(ord("1")),
                np.take_along_axis(names, word, axis=1),
            ],
            axis=1,
        )
        labels = np.zeros_like(texts)
        point = start
        for k in range(length):
            point = group.images[elements[rows, word[:, k]], point]
            labels[:, k - length] = point + ord("1")
        return Draws(texts, labels, _canonical(group, elements, start, word))

    return draw(f"permutation_composition-{points}-{generators}-{length}", task, num_samples, seed, split)


def _canonical(group: Group, elements: np.ndarray, start: np.ndarray, word: np.ndarray) -> np.ndarray:
    """Bytes (n, K), equal for texts that are equal up to the names of points: the least of all namings.

    elements (n, generators), start (n,), word (n, length) with letters numbered in the order of definitions.
    """
    keys = group.images[:, start].T.astype(np.int64)  # (n, N): by the renaming s of points, s start
    for element in elements.T:  # and s g s^-1; at most 5 * 120^8, so that int64 holds it
        keys = keys * len(group.images) + group.conjugates[:, element].T
    least = keys.min(axis=1).astype("<i8")
    return np.concatenate([least[:, None].view(np.uint8), word], axis=1)


class Question(NamedTuple):
    """A text of this task, parsed."""

    permutations: dict[str, str]  # letter -> images of points 1, 2, ...
    start: str
    word: str


def parse(text: str) -> Question:
    definitions, _, rest = text.partition(":")
    letters = [character for character in definitions if character.isalpha()]
    width = len(definitions) // len(letters)
    parts = [definitions[i : i + width] for i in range(0, len(definitions), width)]
    return Question({part[0]: part[1:] for part in parts}, rest[0], rest[1:])


def follow(question: Question, word: str) -> str:
    """Where the start point of `question` is after `word`."""
    point = question.start
    for letter in word:
        point = question.permutations[letter][int(point) - 1]
    return point


def is_odd(question: Question) -> bool:
    """Whether the word composes to an odd permutation: a sum modulo 2 over its letters."""
    odd = {
        letter: sum(a > b for a, b in combinations(images, 2)) % 2
        for letter, images in question.permutations.items()
    }
    return sum(odd[letter] for letter in question.word) % 2 == 1


def shortcuts(samples: Sequence[Sample], options: Options) -> dict[str, Sequence[str]]:
    """Solvers that leave something out.

    start        no step at all
    last letter  the last step alone
    any order    all steps, but sorted by letter, as if they commuted
    parity       the sign of the product, with the best answer for each sign relative to the start (fitted on
                 these samples, so a little too good)
    """
    questions = [parse(sample.text) for sample in samples]
    signs = [(is_odd(q), q.start) for q in questions]
    counts: dict[tuple[bool, str], Counter[str]] = {sign: Counter() for sign in signs}
    for sign, sample in zip(signs, samples, strict=True):
        counts[sign][sample.answer] += 1
    return {
        "start": [q.start for q in questions],
        "last letter": [follow(q, q.word[-1]) for q in questions],
        "any order": [follow(q, "".join(sorted(q.word))) for q in questions],
        "parity": [counts[sign].most_common(1)[0][0] for sign in signs],
    }


TASK = SyntheticTask(
    name="permutation_composition",
    about="in-context word problem of S5: where a point is after each permutation of a word",
    options=Options,
    generate=generate,
    shortcuts=shortcuts,
    labelled=labelled_document,
    evaluation=Evaluation(chance=lambda options: 1 / options.points),
    experiment={
        "examples": 120000,
        "vocab_size": 268,  # 4 control pieces + 256 bytes + 5 points, 2 letters and :
        "sequence_length": 28,
        "training": ["model.embedding_mixing=4"],
        "layers": 1,
        "steps": 4,
        "evaluation": {"num_samples": 2000, "steps": [1, 2, 4, 8, 12, 16, 24]},
        "gaps": {"half as long again": "length=18", "twice as long": "length=24"},
    },
)
