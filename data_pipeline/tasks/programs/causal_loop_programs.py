"""Random causal-loop programs, thousands at once; `causal_loop_batch.py` runs them.

A batch holds one program per column. A program is a fixed list of slots, each with one statement
`target = left operator right` or empty (its target is NOTHING); the layout says which slots are in a loop:
`(0, 1, (2, 3))` is the text `0;1;loop{2;3}`. Operands are symbols: 0..9 are the digits themselves and
VARIABLE + k is the k-th variable, so that one look-up in the state gives the value of either.
"""

import hashlib
from dataclasses import dataclass
from itertools import permutations
from typing import Any, TypeAlias, Union

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Block: TypeAlias = tuple[Union[int, "Block"], ...]

VARIABLE = 10  # symbol of the first variable
NOTHING = 18  # target of an empty slot: the symbol after eight variables
SYMBOLS = 19
PLUS, MINUS, TIMES, CONSTANT = range(4)  # a CONSTANT statement has its digit in `left`
LAYOUTS: dict[int, Block] = {
    1: (0, 1, 2, 3, 4, 5),
    2: (0, 1, 2, 3, (4, 5, 6, 7)),
    3: (0, 1, 2, 3, 4, 5, 6, 7),
    4: (0, 1, 2, 3, (4, 5, (6, 7), 8, 9)),
}
# There are few short programs: longer ones are drawn more often, or the short ones would repeat.
CHAIN_LENGTHS = np.array([3, 4, 4, 5, 5, 5, 6, 6, 6], np.uint8)
CYCLE_LENGTHS = np.array([2, 2, 3, 3, 3, 4, 4, 4], np.uint8)
NEST_LENGTHS = np.array([3, 4, 4], np.uint8)
LOOP_VARIABLES = 4  # at most, and as many slots before a loop for their initial values


class Draws:
    """Even draws for a whole batch. Only raw bits are used: numpy keeps those the same across versions."""

    def __init__(self, key: str) -> None:
        entropy = int.from_bytes(hashlib.sha256(key.encode()).digest(), "big")
        self._bits = np.random.SFC64(np.random.SeedSequence(entropy))

    def below(self, limit: int | Array, count: int) -> Array:
        """`count` numbers from 0..limit-1 as uint8; limit is at most 255, one for all or one for each."""
        raw = self._bits.random_raw(-(-count // 4)).astype("<u8").view("<u2")[:count]
        return ((raw.astype(np.uint32) * limit) >> 16).astype(np.uint8)


@dataclass
class Programs:
    """N programs of one level: the statements of each slot as symbols, uint8 arrays of shape (slots, N)."""

    level: int
    target: Array
    left: Array
    operator: Array
    right: Array

    @classmethod
    def empty(cls, level: int, count: int) -> "Programs":
        slots = {1: 6, 2: 8, 3: 8, 4: 10}[level]
        target, left, operator, right = np.zeros((4, slots, count), np.uint8)
        target[:] = NOTHING
        return cls(level, target, left, operator, right)

    @property
    def count(self) -> int:
        return int(self.target.shape[1])

    def take(self, columns: Array) -> "Programs":
        """The programs of these columns, in their order."""
        return Programs(self.level, *(part.take(columns, axis=1) for part in self.parts()))

    def parts(self) -> tuple[Array, Array, Array, Array]:
        return self.target, self.left, self.operator, self.right

    def constant(self, slot: int, target: int | Array, digit: Array) -> None:
        self.target[slot], self.left[slot], self.operator[slot] = target, digit, CONSTANT

    def update(self, slot: int, target: int | Array, left: int | Array, rule: tuple[Array, Array]) -> None:
        self.target[slot], self.left[slot] = target, left
        self.operator[slot], self.right[slot] = rule


def _by_digit(draws: Draws, count: int) -> tuple[Array, Array]:
    """Operators, each with a digit that neither leaves its operand unchanged nor erases it."""
    operator = draws.below(3, count)
    times = (operator == TIMES).astype(np.uint8)
    return operator, draws.below(9 - times, count) + 1 + times


def _by_any(draws: Draws, left: Array, variables: Array) -> tuple[Array, Array]:
    """Operators with a useful digit or, half of the time, one of the `variables` first other than `left`."""
    operator, digit = _by_digit(draws, left.size)
    other = draws.below(variables - 1, left.size) + np.uint8(VARIABLE)
    other += other >= left
    return operator, np.where(draws.below(2, left.size) == 1, other, digit)


def draw_chains(draws: Draws, count: int) -> tuple[Programs, Array]:
    """Level 1: 3 to 6 statements in a row. Returns them and the queried symbols, two operations deep."""
    programs = Programs.empty(1, count)
    length = CHAIN_LENGTHS[draws.below(CHAIN_LENGTHS.size, count)]
    programs.constant(0, VARIABLE, draws.below(10, count))
    for slot in range(1, 6):
        target = np.where(slot < length, VARIABLE + slot, NOTHING)
        programs.update(slot, target, VARIABLE + slot - 1, _by_digit(draws, count))
    return programs, draws.below(length - 2, count) + np.uint8(VARIABLE + 2)


def draw_joins(draws: Draws, count: int) -> tuple[Programs, Array]:
    """Level 3: two chains of 2 or 3 statements, their join, and perhaps one statement more.

    Returns them and the queried symbols: the join or the statement after it.
    """
    programs = Programs.empty(3, count)
    first, second, more = (draws.below(2, count) for _ in range(3))  # 1: the optional statement is there
    ends = []
    start: int | Array = np.full(count, VARIABLE, np.uint8)
    for slot, longer in ((0, first), (3, second)):
        programs.constant(slot, start, draws.below(10, count))
        programs.update(slot + 1, start + 1, start, _by_digit(draws, count))
        target = np.where(longer == 1, start + 2, NOTHING)
        programs.update(slot + 2, target, start + 1, _by_digit(draws, count))
        ends.append(start + 1 + longer)
        start = start + 2 + longer
    programs.update(6, start, ends[0], (draws.below(3, count), ends[1]))
    programs.update(7, np.where(more == 1, start + 1, NOTHING), start, _by_digit(draws, count))
    return programs, start + draws.below(more + 1, count)


def _cycle_rules(draws: Draws, variables: Array) -> list[tuple[Array, tuple[Array, Array]]]:
    """For each variable of a cycle: the variable before it and the rest of the rule that updates it."""
    rules = []
    for k in range(LOOP_VARIABLES):
        position = np.full(variables.size, k, np.uint8) if k else variables
        left = position + np.uint8(VARIABLE - 1)
        rules.append((left, _by_any(draws, left, variables)))
    return rules


_ORDERS = {n: [[*p, *range(n, LOOP_VARIABLES)] for p in permutations(range(n))] for n in (2, 3, 4)}
_ORDER_TABLE = np.array(_ORDERS[2] + _ORDERS[3] + _ORDERS[4], np.uint8)
_ORDER_START = np.array([0, 0, 0, 2, 8], np.uint8)  # row of the first order of n variables
_ORDER_COUNT = np.array([0, 0, 2, 6, 24], np.uint8)


def draw_loops(draws: Draws, count: int) -> Programs:
    """Level 2: a cycle of 2 to 4 updates in any order, each reading the variable before it in the cycle.

    The slots of the initial values are still empty.
    """
    programs = Programs.empty(2, count)
    variables = CYCLE_LENGTHS[draws.below(CYCLE_LENGTHS.size, count)]
    order = _ORDER_TABLE[_ORDER_START[variables] + draws.below(_ORDER_COUNT[variables], count)]
    rules = _cycle_rules(draws, variables)
    lefts = np.array([left for left, _ in rules])
    operators = np.array([operator for _, (operator, _) in rules])
    rights = np.array([right for _, (_, right) in rules])
    columns = np.arange(count)
    for k in range(LOOP_VARIABLES):
        which = order[:, k]
        target = np.where(k < variables, which + np.uint8(VARIABLE), NOTHING)
        rule = (operators[which, columns], rights[which, columns])
        programs.update(4 + k, target, lefts[which, columns], rule)
    return programs


def draw_nested(draws: Draws, count: int) -> Programs:
    """Level 4: a cycle through 3 or 4 variables of which the first two are updated by an inner loop.

    The other updates come before or after the inner loop. The slots of the initial values are still empty.
    """
    programs = Programs.empty(4, count)
    variables = NEST_LENGTHS[draws.below(NEST_LENGTHS.size, count)]
    rules = _cycle_rules(draws, variables)
    # The inner loop's two variables must feed each other, or it would be a loop in name only.
    second = np.full(count, VARIABLE + 1, np.uint8)
    rules[0] = (rules[0][0], (rules[0][1][0], second))
    swapped = draws.below(2, count) == 1
    for slot, first in ((6, ~swapped), (7, swapped)):
        target = np.where(first, VARIABLE, second)
        (left_0, rule_0), (left_1, rule_1) = rules[:2]
        rule = (np.where(first, rule_0[0], rule_1[0]), np.where(first, rule_0[1], rule_1[1]))
        programs.update(slot, target, np.where(first, left_0, left_1), rule)
    before = draws.below(variables - 1, count)  # of the outer loop's own updates; the rest come after
    for k in (0, 1):
        target = np.where(k < variables - 2, VARIABLE + 2 + k, NOTHING)
        left, rule = rules[2 + k]
        programs.update(4 + k, np.where(k < before, target, NOTHING), left, rule)
        programs.update(8 + k, np.where(k < before, NOTHING, target), left, rule)
    return programs


_BITS = np.array([0] * VARIABLE + [1 << k for k in range(NOTHING - VARIABLE)] + [0], np.uint8)


def put_initial_values(programs: Programs, values: Array) -> None:
    """Give looped programs the `values` (variables, N) of what they read before they assign it."""
    assigned = np.zeros(programs.count, np.uint8)
    needed = np.zeros(programs.count, np.uint8)
    for slot in range(LOOP_VARIABLES, len(programs.target)):  # the slots of a layout are numbered as they run
        reads = _BITS[programs.left[slot]] | _BITS[programs.right[slot]]
        reads[programs.target[slot] == NOTHING] = 0
        needed |= reads & ~assigned
        assigned |= _BITS[programs.target[slot]]
    for k in range(LOOP_VARIABLES):
        target = np.where(needed >> k & 1, VARIABLE + k, NOTHING)
        programs.constant(k, target, values[k])


def canonical(programs: Programs) -> Programs:
    """The programs with their variables named in order of appearance: equal ones differed only in names.

    A variable first appears where it is assigned.
    """
    columns = np.arange(programs.count)
    names = np.zeros((SYMBOLS, programs.count), np.uint8)
    names[:VARIABLE] = np.arange(VARIABLE)[:, None]
    names[NOTHING] = NOTHING
    new = np.full(programs.count, VARIABLE, np.uint8)
    for target in programs.target:
        fresh = names[target, columns] == 0
        names[target[fresh], columns[fresh]] = new[fresh]
        new += fresh
    target, left, right = (names[part, columns] for part in (programs.target, programs.left, programs.right))
    return Programs(programs.level, target, left, programs.operator, right)
