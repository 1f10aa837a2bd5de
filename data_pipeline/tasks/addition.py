"""Addition of many one-digit operands, `3+7+1=`, with the running sums as labels (arXiv 2502.17416).

The label at an operand is the sum of the operands so far modulo `modulus`, the label at `=` is the total; `+`
has none. Operands are uniform over 0..modulus-1, so every running sum is uniform, and without one operand
nothing is known about the total. Texts with the same operands in any order fall into the same split: no total
of the test split was trained on in another order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.tasks.labelled import Draws, Sample, draw, labelled_document
from data_pipeline.tasks.task import Evaluation, SyntheticTask, require, size

MAX_OPERANDS = 2048


@dataclass(frozen=True)
class Options:
    operands: int = size(8, "one-digit numbers of a text")
    modulus: int = size(10, "operands are below it, and sums are taken modulo it")


def generate(
    num_samples: int, operands: int, modulus: int, seed: int, split: str = "train"
) -> Iterator[Sample]:
    """Yield samples of 2 * `operands` characters; sample i depends on the other arguments and i only.

    Raises DataError for `operands` outside 2..MAX_OPERANDS, `modulus` outside 2..10, an unknown split, a
    negative count and sizes that leave next to no sample in the split.
    """
    require("operands", operands, 2, MAX_OPERANDS)
    require("modulus", modulus, 2, 10)

    def task(random: np.random.Generator, count: int) -> Draws:
        digits = random.integers(modulus, size=(count, operands), dtype=np.uint8)
        sums = np.cumsum(digits, axis=1, dtype=np.int64) % modulus
        texts = np.full((count, 2 * operands), ord("+"), dtype=np.uint8)
        texts[:, ::2] = digits + ord("0")
        texts[:, -1] = ord("=")
        labels = np.zeros_like(texts)
        labels[:, ::2] = sums + ord("0")
        labels[:, -1] = labels[:, -2]
        return Draws(texts, labels, np.sort(digits, axis=1))

    return draw(f"addition-{operands}-{modulus}", task, num_samples, seed, split)


def shortcuts(samples: Sequence[Sample], options: Options) -> dict[str, Sequence[str]]:
    """What a reader of the last operand alone answers."""
    return {"last operand": [sample.text[-2] for sample in samples]}


TASK = SyntheticTask(
    name="addition",
    about="addition of one-digit operands, with their running sums as labels",
    options=Options,
    generate=generate,
    shortcuts=shortcuts,
    labelled=labelled_document,
    evaluation=Evaluation(chance=lambda options: 1 / options.modulus),
    experiment={
        "examples": 120000,
        "vocab_size": 272,  # 4 control pieces + 256 bytes + 10 digits, + and =
        "sequence_length": 18,
        "layers": 1,
        "steps": 4,
        "evaluation": {"num_samples": 2000, "steps": [1, 2, 4, 8, 12, 16, 24]},
        "gaps": {"12 operands": "operands=12", "16 operands": "operands=16"},
    },
)
