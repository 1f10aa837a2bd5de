"""Addition of many one-digit operands, `3+7+1=`, with the running sums as labels (arXiv 2502.17416).

The label at an operand is the sum of the operands so far modulo `modulus`, the label at `=` is the total;
`+` has none. Operands are uniform over 0..modulus-1, so every running sum is uniform, and no operand but all
of them together say anything about the total. Texts with the same operands in any order fall into the same
split: no total of the test split was trained on in another order.
"""

import argparse
from collections.abc import Iterator, Sequence

import numpy as np

from data_pipeline.tasks.generator import parser, run
from data_pipeline.tasks.labelled import Draws, Sample, audit, draw, require

MAX_OPERANDS = 2048


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


def shortcuts(samples: Sequence[Sample]) -> dict[str, Sequence[str]]:
    """The answer of who reads the last operand alone."""
    return {"last operand": [sample.text[-2] for sample in samples]}


def main(argv: Sequence[str] | None = None) -> None:
    options = parser("Write addition samples, one JSON object a line.")
    options.add_argument("--operands", type=int, default=8)
    options.add_argument("--modulus", type=int, default=10)
    given: argparse.Namespace = options.parse_args(argv)
    run(
        given,
        lambda: generate(given.num_samples, given.operands, given.modulus, given.seed, given.split),
        lambda samples: audit(samples, shortcuts),
    )
