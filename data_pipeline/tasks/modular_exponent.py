"""Modular exponentiation programs: chains of `a = a^b mod p` and `a = b^a mod p`, labelled with every result.

A program gives each of its variables a value, then runs a fixed number of statements, each of which replaces
one variable by a power modulo the prime p; the question is the final value of one variable. The text:

    program   = initial {initial} {statement} query    a5b2c9 b^3 6^a b^7 ... ?b   (without the spaces)
    initial   = variable value                         a5: a starts at 5
    statement = variable "^" number | number "^" variable    b^3: b = b^3;  6^a: a = 6^a
    query     = "?" variable

Values are 1..p-1 in base 36 (10 is A), so that every character is one token and all programs of one size are
equally long. The label at the last character of a statement is its result, the label at the end the answer.

**Depth.** Powers of powers collapse: (a^b)^c = a^(bc mod p-1) takes one step. What keeps the chain serial is
that the value also moves into the exponent. Bases are primitive roots and exponents are coprime to p - 1, so
that each statement permutes 1..p-1. For the p allowed here they generate all of its permutations or all even
ones (for p = 5 and 7 only the solvable S4), so that no constant depth solves their word problem unless
TC0 = NC1 (Barrington 1989; Merrill et al., arXiv 2404.08819). The depth of a sample is the number of
statements that update the queried variable; it is uniform over `min_depth`..`max_depth`. The other statements
are dead code, and no variable is updated more than `max_depth` times, so that no label is deeper than that.

**Guessing.** Start values are uniform, so every later value is too, and without one statement of the chain
nothing is known about the answer. Two shortcuts remain: at depth 1 one step is the whole chain, and in short
chains statements often commute. `--audit` shows both by depth.

Programs that are equal up to the names of their variables fall into the same split.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.tasks.labelled import Draws, Sample, draw, labelled_document
from data_pipeline.tasks.task import Evaluation, SyntheticTask, require, size

MODULI = (11, 13, 17, 19, 23, 29, 31)
DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_STATEMENTS = 1024
_CODES = np.frombuffer(DIGITS.encode(), np.uint8)


@dataclass(frozen=True)
class Options:
    modulus: int = size(11, f"the prime p, of {', '.join(map(str, MODULI))}")
    variables: int = size(3, "variables of a program")
    statements: int = size(8, "statements of a program, dead code included")
    min_depth: int = size(1, "fewest statements that update the queried variable")
    max_depth: int = size(4, "most statements that update any variable")


class Operations(NamedTuple):
    """The K statements of a modulus: `x^number`, or `number^x` where `exponential`."""

    number: np.ndarray  # (K,) uint8
    exponential: np.ndarray  # (K,) bool
    results: np.ndarray  # (K, p) uint8, by operation and x; 0 for x = 0, which does not arise


@lru_cache
def operations(modulus: int) -> Operations:
    """All that permute 1..p-1, except x^1."""
    values = range(1, modulus)
    powers = [k for k in range(2, modulus - 1) if gcd(k, modulus - 1) == 1]
    bases = [b for b in range(2, modulus) if len({pow(b, x, modulus) for x in values}) == modulus - 1]
    rows = [[pow(x, k, modulus) for x in values] for k in powers]
    rows += [[pow(b, x, modulus) for x in values] for b in bases]
    return Operations(
        np.array(powers + bases, np.uint8),
        np.array([False] * len(powers) + [True] * len(bases)),
        np.pad(np.array(rows, np.uint8), ((0, 0), (1, 0))),
    )


def generate(
    num_samples: int,
    modulus: int,
    variables: int,
    statements: int,
    min_depth: int,
    max_depth: int,
    seed: int,
    split: str = "train",
) -> Iterator[Sample]:
    """Yield samples of 2 * variables + 3 * statements + 2 characters; sample i depends on the other arguments
    and i only.

    Raises DataError for a modulus not in MODULI, `variables` outside 1..26, `statements` outside
    1..MAX_STATEMENTS, depths outside 1 <= min_depth <= max_depth <= statements, variables too few to take all
    statements within `max_depth`, an unknown split and a negative count.
    """
    if modulus not in MODULI:
        raise DataError(f"modulus {modulus} is not one of {', '.join(map(str, MODULI))}: choose one of them")
    require("variables", variables, 1, 26)
    require("statements", statements, 1, MAX_STATEMENTS)
    require("max_depth", max_depth, 1, statements)
    require("min_depth", min_depth, 1, max_depth)
    if min_depth + (variables - 1) * max_depth < statements:
        raise DataError(
            f"statements {statements} are more than {min_depth} + {variables - 1} * {max_depth}, min_depth "
            "of the queried variable and max_depth of each other: raise variables or max_depth"
        )

    def task(random: np.random.Generator, count: int) -> Draws:
        rows = np.arange(count)
        asked = random.integers(variables, size=count)
        depth = random.integers(min_depth, max_depth + 1, size=count)
        targets = _targets(random, asked, depth, variables, statements, max_depth)  # (count, statements)
        initial = random.integers(1, modulus, size=(count, variables), dtype=np.uint8)
        known = operations(modulus)
        chosen = random.integers(len(known.number), size=(count, statements), dtype=np.uint8)
        letters = np.tile(np.arange(variables, dtype=np.uint8) + ord("a"), (count, 1))
        names = random.permuted(letters, axis=1)  # of the variables in the order of their initial values

        start = 2 * variables  # of the statements in the text
        texts = np.full((count, start + 3 * statements + 2), ord("^"), np.uint8)
        labels = np.zeros_like(texts)
        texts[:, 0:start:2], texts[:, 1:start:2] = names, _CODES[initial]
        state = initial.copy()
        for k in range(statements):
            at = start + 3 * k
            operation, target = chosen[:, k], targets[:, k]
            number, name = _CODES[known.number[operation]], names[rows, target]
            exponential = known.exponential[operation]
            texts[:, at] = np.where(exponential, number, name)
            texts[:, at + 2] = np.where(exponential, name, number)
            state[rows, target] = known.results[operation, state[rows, target]]
            labels[:, at + 2] = _CODES[state[rows, target]]
        texts[:, -2], texts[:, -1] = ord("?"), names[rows, asked]
        labels[:, -1] = _CODES[state[rows, asked]]
        canonical = np.concatenate([initial, targets, chosen, asked[:, None]], axis=1).astype(np.uint8)
        return Draws(texts, labels, canonical)

    sizes = f"{modulus}-{variables}-{statements}-{min_depth}-{max_depth}"
    return draw(f"modular_exponent-{sizes}", task, num_samples, seed, split)


def _targets(
    random: np.random.Generator,
    asked: np.ndarray,
    depth: np.ndarray,
    variables: int,
    statements: int,
    max_depth: int,
) -> np.ndarray:
    """The variables (n, statements) that statements update: `asked` (n,) `depth` (n,) times, others at random
    but at most `max_depth` times.
    """
    pool = np.repeat(np.arange(variables), max_depth)  # every variable as often as it may be updated
    turn = np.tile(np.arange(max_depth), variables)
    keys = random.random((len(asked), len(pool)))
    keys = np.where(pool == asked[:, None], np.where(turn < depth[:, None], -1.0, 2.0), keys)
    return random.permuted(pool[np.argsort(keys, axis=1, kind="stable")[:, :statements]], axis=1)


class Chain(NamedTuple):
    """What the answer of a sample depends on, read from its text."""

    start: int
    statements: list[tuple[bool, int]]  # (exponential, number)


def chain_of(text: str) -> Chain:
    """Reads the chain of the queried variable from a text of this task."""
    body, _, asked = text.partition("?")
    first = body.index("^") - 1  # where the first statement begins
    statements = [body[i : i + 3] for i in range(first, len(body), 3)]
    start = DIGITS.index(body[body.index(asked) + 1])
    return Chain(
        start,
        [(s[2] == asked, DIGITS.index(s[0] if s[2] == asked else s[2])) for s in statements if asked in s],
    )


def run(start: int, statements: Sequence[tuple[bool, int]], modulus: int) -> int:
    value = start
    for exponential, number in statements:
        value = pow(number, value, modulus) if exponential else pow(value, number, modulus)
    return value


def shortcuts(samples: Sequence[Sample], options: Options) -> dict[str, Sequence[str]]:
    """Solvers that leave something out.

    one step      the last statement of the chain alone, applied to the start value
    last number   the number in that statement
    reversed      the chain in the reverse order
    """
    chains = [chain_of(sample.text) for sample in samples]
    p = options.modulus
    return {
        "one step": [DIGITS[run(c.start, c.statements[-1:], p)] for c in chains],
        "last number": [DIGITS[c.statements[-1][1]] for c in chains],
        "reversed": [DIGITS[run(c.start, c.statements[::-1], p)] for c in chains],
    }


TASK = SyntheticTask(
    name="modular_exponent",
    about="programs of modular exponentiation chains, with every result as a label",
    options=Options,
    generate=generate,
    shortcuts=shortcuts,
    labelled=labelled_document,
    evaluation=Evaluation(
        chance=lambda options: 1 / (options.modulus - 1),
        depth=lambda sample: len(chain_of(sample.text).statements),
    ),
    experiment={  # trained on depth 1-4, tested to 8
        "examples": 120000,
        "vocab_size": 275,  # 4 control pieces + 256 bytes + 10 values, 3 letters, ^ and ?
        "sequence_length": 34,
        "training": ["model.embedding_mixing=4"],
        "layers": 1,
        "steps": 4,
        "trained_depth": 4,
        "evaluation": {
            "num_samples": 4000,
            "task_options": "max_depth=8",
            "steps": [1, 2, 4, 8, 12, 16],
        },
        "gaps": {
            "2 variables": "variables=2,statements=5",
            "12 statements": "statements=12,min_depth=4",
        },
    },
)
