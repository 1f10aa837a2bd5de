"""p-hop induction (Sanford et al., arXiv 2402.09268; looped models on it: arXiv 2502.17416).

A text x is L letters, uniform over the first `alphabet` ones. With positions from 0,

    find_1(i) = max {j : 1 <= j <= i, x[j-1] = x[i]}     the position after the previous x[i]
    find_p(i) = find_1(find_{p-1}(i))
    label(i)  = x[find_p(i)]                             none where a find_1 on the way has no such j

so the label at the last position continues the text as an induction head would, p times over. p hops need a
depth that grows with log p, and a loop supplies it. Texts that are equal up to the names of the letters fall
into the same split, and only texts with a label at the last position are used.

Where x[i-1] = x[i] every hop stays at i, so any number of hops gives x[i]. Elsewhere a hop never ends on the
letter it began with, so one hop and three often agree: with 4 letters 1 hop answers 64 % of p = 3, and 2
hops 26 %. Measure against `--audit`, not against 1 / alphabet.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.tasks.labelled import Draws, Sample, draw, labelled_document
from data_pipeline.tasks.task import Evaluation, SyntheticTask, require, size

MAX_LENGTH = 4096  # characters


@dataclass(frozen=True)
class Options:
    hops: int = size(3, "p")
    length: int = size(24, "characters of a text")
    alphabet: int = size(4, "number of letters")


def generate(
    num_samples: int, hops: int, length: int, alphabet: int, seed: int, split: str = "train"
) -> Iterator[Sample]:
    """Yield samples of `length` characters; sample i depends on the other arguments and i only.

    Raises DataError for `alphabet` outside 2..26, `length` outside 2..MAX_LENGTH, `hops` outside 1..length,
    for an unknown split, a negative count and sizes that leave next to no sample in the split.
    """
    require("alphabet", alphabet, 2, 26)
    require("length", length, 2, MAX_LENGTH)
    require("hops", hops, 1, length)

    def task(random: np.random.Generator, count: int) -> Draws:
        letters = random.integers(alphabet, size=(count, length), dtype=np.uint8)
        return Draws(letters + ord("a"), hop_labels(letters + ord("a"), hops), _renamed(letters))

    return draw(f"p_hop-{hops}-{length}-{alphabet}", task, num_samples, seed, split)


def hop_labels(texts: np.ndarray, hops: int) -> np.ndarray:
    """Labels of `texts` (n, L) uint8 for `hops` >= 0 hops: (n, L) uint8, 0 where there is none."""
    count, length = texts.shape
    rows = np.arange(count)
    after = np.zeros((count, 256), dtype=np.int64)  # the position after each character's latest occurrence
    once = np.empty((count, length), dtype=np.int64)  # find_1; 0 for none, which maps to 0 again
    for i in range(length):
        once[:, i] = after[rows, texts[:, i]]
        after[rows, texts[:, i]] = i + 1
    if hops == 0:
        return texts
    found = once
    for _ in range(hops - 1):
        found = np.take_along_axis(once, found, axis=1)
    return np.where(found > 0, np.take_along_axis(texts, found, axis=1), 0).astype(np.uint8)


def _renamed(letters: np.ndarray) -> np.ndarray:
    """`letters` (n, L) numbered in order of first appearance."""
    count, length = letters.shape
    rows = np.arange(count)
    names = np.full((count, 26), 255, dtype=np.uint8)
    used = np.zeros(count, dtype=np.uint8)
    result = np.empty_like(letters)
    for i in range(length):
        new = names[rows, letters[:, i]] == 255
        names[rows[new], letters[new, i]] = used[new]
        used += new
        result[:, i] = names[rows, letters[:, i]]
    return result


def shortcuts(samples: Sequence[Sample], hops: int) -> dict[str, Sequence[str]]:
    """What too few hops answer: one fewer, and just one."""
    texts = np.array([list(sample.text.encode()) for sample in samples], dtype=np.uint8)
    return {f"{few}-hop": list(map(chr, hop_labels(texts, few)[:, -1])) for few in {hops - 1, 1} - {hops}}


TASK = SyntheticTask(
    name="p_hop",
    about="p-hop induction: the letter that p hops backwards end on",
    options=Options,
    generate=generate,
    shortcuts=lambda samples, options: shortcuts(samples, options.hops),
    labelled=labelled_document,
    evaluation=Evaluation(chance=lambda options: 1 / options.alphabet),
    experiment={
        "examples": 120000,
        "vocab_size": 264,  # 4 control pieces + 256 bytes + 4 letters
        "sequence_length": 26,
        "layers": 1,
        "steps": 4,
        "evaluation": {"num_samples": 2000, "steps": [1, 2, 4, 8, 12, 16, 24]},
        "gaps": {"half as long again": "length=36", "twice as long": "length=48"},
    },
)
