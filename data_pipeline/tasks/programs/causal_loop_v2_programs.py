"""Straight-line programs of an exact serial depth: how they are drawn, and what their text depends on.

`causal_loop_v2.py` explains the language and makes samples of these programs. A *vector* here is the tuple of
the values that one result takes while one initial constant, the origin, runs through several values and all
other constants stay as they are. Vectors are compared instead of single values: what looks the same for
every origin is the same to a solver.
"""

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from data_pipeline.errors import DataError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FAMILIES = ("chain", "loop", "convergence", "nested")
MIN_DEPTH = {"chain": 1, "loop": 4, "convergence": 2, "nested": 6}
UNARY = "en"  # read their right operand only
MIN_IMAGE = 3  # different values of every chain value over the origins: fewer would be easy to guess
MAX_ORIGINS = 16  # a larger modulus takes this many of its values as origins, drawn at random
TRIES = 12  # statements drawn for one position of the chain before the program is given up

Vector = tuple[int, ...]

OPERATORS: dict[str, Callable[[int, int, int], int]] = {
    "d": lambda x, y, p: abs(x - y),
    "m": lambda x, y, p: x if x > y else y,
    "r": lambda x, y, p: x - y if y <= x else y,
    "n": lambda x, y, p: p - 1 - y,
    "e": lambda x, y, p: y if y % 2 else (y + 1) % p,
}
_OPERATOR_LETTERS = "".join(OPERATORS)


class Statement(NamedTuple):
    """`target = operator(left, right)`; an operand is a variable or a number in decimal digits."""

    target: str
    operator: str
    left: str
    right: str

    @property
    def reads(self) -> tuple[str, ...]:
        """The operands whose values the result depends on."""
        return (self.right,) if self.operator in UNARY else (self.left, self.right)


def parse(program: str) -> tuple[dict[str, int], list[Statement]]:
    """Initial constants and statements of program text without a query. Raises DataError for other text."""
    match = re.fullmatch(r"((?:[A-Z][0-9]+)+)((?:[A-Z][a-z](?:[A-Z]|[0-9]+){2})*)", program)
    if not match:
        raise DataError(f"not a causal-loop program of version 2: {program!r}: see the module's grammar")
    initial = {name: int(number) for name, number in re.findall(r"([A-Z])([0-9]+)", match[1])}
    parts = re.findall(r"([A-Z])([a-z])([A-Z]|[0-9]+)([A-Z]|[0-9]+)", match[2])
    return initial, [Statement(*part) for part in parts]


def depths_of(body: Sequence[Statement]) -> list[int]:
    """For every statement the longest chain of operations its result depends on; constants have depth 0."""
    current: dict[str, int] = {}
    depths = []
    for s in body:
        depths.append(1 + max(current.get(operand, 0) for operand in s.reads))
        current[s.target] = depths[-1]
    return depths


def live_statements(body: Sequence[Statement], question: str) -> list[int]:
    """Indices, in order, of the statements that the final value of `question` is computed from."""
    wanted = {question}
    live = []
    for index in reversed(range(len(body))):
        if body[index].target in wanted:
            live.append(index)
            wanted.discard(body[index].target)
            wanted.update(body[index].reads)
    return live[::-1]


def effective_depth(
    initial: Mapping[str, int], body: Sequence[Statement], question: str, modulus: int
) -> int:
    """The depth of the final value of `question` that is left when every shortcut below is taken for free.

    For one origin at a time: a result that is the same for all values of the origin counts as a constant
    (`max(x, x)` of p - 1, `|x - x|`, anything that erases its operand), and a result whose vector equals that
    of an earlier result counts as that result (`|x - 0|`, `max(x, x)`, p-1-(p-1-y), a loop that returns to an
    earlier state). Returns the depth for the best origin, which never exceeds the one of `depths_of`.
    """
    return max(_depth_from(origin, initial, body, question, modulus) for origin in initial)


def _depth_from(
    origin: str, initial: Mapping[str, int], body: Sequence[Statement], question: str, modulus: int
) -> int:
    vectors: dict[str, Vector] = {name: (value,) * modulus for name, value in initial.items()}
    vectors[origin] = tuple(range(modulus))
    known = {vectors[origin]: 0}
    for s in body:
        vector = apply_statement(s, vectors, modulus)
        depth = 0
        if len(set(vector)) > 1:
            depth = 1 + max(known.get(vectors.get(operand, ()), 0) for operand in s.reads)
            known[vector] = min(depth, known.get(vector, depth))
        vectors[s.target] = vector
    return known.get(vectors[question], 0)


def apply_statement(s: Statement, vectors: Mapping[str, Vector], modulus: int) -> Vector:
    """The vector of the result, given the vectors of all variables."""
    function = OPERATORS[s.operator]
    right = vectors.get(s.right)
    left = right if s.operator in UNARY else vectors.get(s.left)
    if right is None:
        assert left is not None  # at most one operand is a number
        y = int(s.right)
        return tuple([function(x, y, modulus) for x in left])
    if left is None:
        x = int(s.left)
        return tuple([function(x, y, modulus) for y in right])
    return tuple([function(x, y, modulus) for x, y in zip(left, right, strict=True)])


@lru_cache
def _inputs(modulus: int) -> Vector:
    """Values on which two functions are compared: all, or about `MAX_ORIGINS` spread over them."""
    return tuple(range(0, modulus, -(-modulus // MAX_ORIGINS)))


@lru_cache
def _single_operations(modulus: int) -> frozenset[Vector]:
    """The results, on `_inputs`, of every operation on one variable and one number."""
    inputs = _inputs(modulus)
    found = set()
    for function in OPERATORS.values():
        for number in range(modulus):
            found.add(tuple([function(x, number, modulus) for x in inputs]))
            found.add(tuple([function(number, y, modulus) for y in inputs]))
    return frozenset(found)


# ---- drawing


class Size(NamedTuple):
    """What all programs of one set share."""

    modulus: int
    variables: int
    statements: int
    names: int  # variables are named by the first so many letters
    constants: int  # initial constants are below it


class Draft:
    """A program being drawn from left to right around one chain of live results.

    The carrier is the variable that holds the newest result of the chain (at first the origin, an initial
    constant). Only chain statements may overwrite it, so the chain stays live whatever comes between. All
    other statements are free: they read and write anything else and are live or dead by chance.
    """

    def __init__(self, rng: random.Random, family: str, size: Size) -> None:
        self.rng, self.modulus = rng, size.modulus
        self.single = family == "chain"  # no live statement may read two computed results
        self.names = rng.sample(LETTERS[: size.names], size.variables)
        self.origin = self.carrier = rng.choice(self.names)
        modulus = size.modulus
        values = range(modulus) if modulus <= MAX_ORIGINS else rng.sample(range(modulus), MAX_ORIGINS)
        self.origin_values = tuple(values)
        self.initial = {name: int(rng.random() * size.constants) for name in self.names}
        self.vectors: dict[str, Vector] = {n: (v,) * len(values) for n, v in self.initial.items()}
        self.vectors[self.origin] = self.origin_values
        self.depths = dict.fromkeys(self.names, 0)
        self.known = {self.origin_values: 0}  # the least depth of each vector, as in _depth_from
        self.body: list[Statement] = []
        self.on_chain: list[bool] = []
        self.results: list[Vector] = []
        self.unread: dict[str, None] = {}  # variables with a free result not read yet, oldest first
        self.depth = 0  # of the carrier
        self.last_step: Vector | None = None  # the newest chain result for each of `_inputs` as the carrier
        self.final_depth = 0
        self.answer: int | None = None  # the vector of this depth must hold it
        self.join_at = 0  # the depth at which the chain must read a second computed result; 0: nowhere

    def segment(self, length: int, steps: int, last_target: str | None = None) -> bool:
        """Add `length` statements, `steps` of them on the chain; False if no good statement was found.

        The last of these steps writes to `last_target` if one is given.
        """
        positions = set(self.rng.sample(range(length), steps))
        last = max(positions, default=-1)
        for position in range(length):
            if position not in positions:
                self._free()
            elif not self._extend(
                last_target if position == last and last_target else self._pick(self.names)
            ):
                return False
        return True

    def repeat(self, start: int, times: int) -> bool:
        """Add the statements from index `start` on `times` more; False if the chain gains nothing by one."""
        end = len(self.body)
        for _ in range(times):
            for index in range(start, end):
                s = self.body[index]
                vector = apply_statement(s, self.vectors, self.modulus)
                if self.on_chain[index] and not self._lengthens(s, vector):
                    return False
                self._add(s, vector, self.on_chain[index])
        return True

    def _extend(self, target: str) -> bool:
        join = self.depth + 1 == self.join_at
        for _ in range(TRIES):
            s = self._statement(target, self.carrier, join)
            if s is None:
                return False
            vector = apply_statement(s, self.vectors, self.modulus)
            if self._lengthens(s, vector):
                self._add(s, vector, True)
                return True
        return False

    def _lengthens(self, s: Statement, vector: Vector) -> bool:
        """Whether the result is exactly one operation deeper, not available earlier, and varies.

        Nor may it be one operation on the value before the carrier's.
        """
        depth = self.depth + 1
        return (
            len(set(vector)) >= MIN_IMAGE
            and self.known.get(vector, depth) >= depth
            and all([self.depths.get(operand, 0) < depth for operand in s.reads])
            and self.carrier_is_deep()
            and (depth < self.final_depth or self.answer is None or self.answer in vector)
            and self._step(s, self.last_step) not in _single_operations(self.modulus)
        )

    def _step(self, s: Statement, inputs: Vector | None) -> Vector | None:
        """The results of `s` for these values of the carrier; None if its other operand varies too."""
        if inputs is None:
            return None
        vectors = {self.carrier: inputs}
        for operand in s.reads:
            if operand != self.carrier and operand in self.vectors:
                other = self.vectors[operand]
                if len(set(other)) > 1:
                    return None
                vectors[operand] = other[:1] * len(inputs)
        return apply_statement(s, vectors, self.modulus)

    def carrier_is_deep(self) -> bool:
        """Whether no free result equals the carrier's with fewer operations."""
        return self.known[self.vectors[self.carrier]] == self.depth

    def _free(self) -> None:
        target = self._other_than(self.carrier)
        # Live results are always read. If free ones were read only by chance, that would give them away.
        wanted = list(self.unread) if self.rng.random() < 0.75 else None
        s = self._statement(target, self._pick(wanted or self.names), False)
        assert s is not None
        self._add(s, apply_statement(s, self.vectors, self.modulus), False)

    def _statement(self, target: str, first: str, join: bool) -> Statement | None:
        """A random statement that reads the variable `first`; with `join` also a second computed result."""
        operator = self._pick("dmr" if join else _OPERATOR_LETTERS)
        number = str(1 + int(self.rng.random() * (self.modulus - 2)))  # 0 and p-1 often do nothing
        if join:
            others = [n for n in self.names if 0 < self.depths[n] <= self.depth and n != first]
            if not others:
                return None
            second = self._pick(others)
        elif self.rng.random() < 0.5:
            second = number
        elif self.single and operator not in UNARY:
            others = [n for n in self.names if self.depths[n] == 0 and n not in (first, self.origin)]
            second = self._pick(others) if others else number
        else:
            second = self._other_than(first)
        if operator in UNARY or self.rng.random() < 0.5:
            return Statement(target, operator, second, first)
        return Statement(target, operator, first, second)

    def _add(self, s: Statement, vector: Vector, on_chain: bool) -> None:
        depth = 1 + max([self.depths.get(operand, 0) for operand in s.reads])
        if on_chain:
            self.known[vector] = depth
            self.last_step = self._step(s, _inputs(self.modulus))
        elif len(set(vector)) > 1:  # as in _depth_from
            least = 1 + max([self.known.get(self.vectors.get(x, ()), 0) for x in s.reads])
            self.known[vector] = min(least, self.known.get(vector, least))
        for name in (*s.reads, s.target):
            self.unread.pop(name, None)
        if not on_chain:
            self.unread[s.target] = None
        self.vectors[s.target], self.depths[s.target] = vector, depth
        self.body.append(s)
        self.on_chain.append(on_chain)
        self.results.append(vector)
        if on_chain:
            self.carrier, self.depth = s.target, depth

    def _other_than(self, name: str) -> str:
        while (other := self._pick(self.names)) == name:
            pass
        return other

    def _pick(self, items: Sequence[str]) -> str:
        return items[int(self.rng.random() * len(items))]  # several times as fast as rng.choice


def draw(rng: random.Random, family: str, depth: int, size: Size, answer: int | None) -> Draft | None:
    """One try at a program whose carrier has exactly this depth at the end; None if it failed.

    The carrier's final value is `answer` for at least one value of the origin (None: any value).
    """
    draft = Draft(rng, family, size)
    draft.final_depth, draft.answer = depth, answer
    if family == "convergence":
        draft.join_at = rng.randint(2, depth)
    if family in ("chain", "convergence"):
        good = draft.segment(size.statements, depth)
    else:
        good = all(_parts(rng, draft, family, depth, size.statements))
    return draft if good and draft.carrier_is_deep() else None


def _parts(rng: random.Random, draft: Draft, family: str, depth: int, statements: int) -> Iterator[bool]:
    """Draw a program with a repeated block, part by part, and yield for each whether it worked.

    Inner blocks have `inner_steps` chain statements, outer blocks `outer_steps` more around the inner loop.
    """
    plans = _loop_plans(depth) if family == "loop" else _nested_plans(depth)
    inner_steps, inner_times, outer_steps, outer_times = plans[int(rng.random() * len(plans))]
    room = statements - depth  # for statements off the chain
    inner_free = rng.randint(0, room // (inner_times * outer_times))
    room -= inner_free * inner_times * outer_times
    outer_free = rng.randint(0, room // outer_times) if outer_steps else 0
    room -= outer_free * outer_times
    steps = depth - outer_times * (outer_steps + inner_steps * inner_times)
    before, before_steps = _cut(rng, room + steps, steps)
    yield draft.segment(before, before_steps)
    outer, carrier = len(draft.body), draft.carrier
    head, head_steps = _cut(rng, outer_steps + outer_free, outer_steps)
    # A block must leave the chain in the variable in which it found it.
    yield draft.segment(head, head_steps, carrier if head_steps == outer_steps else None)
    inner = len(draft.body)
    yield draft.segment(inner_steps + inner_free, inner_steps, draft.carrier)
    yield draft.repeat(inner, inner_times - 1)
    yield draft.segment(outer_steps + outer_free - head, outer_steps - head_steps, carrier)
    yield draft.repeat(outer, outer_times - 1)
    yield draft.segment(room + steps - before, steps - before_steps)


def _cut(rng: random.Random, length: int, steps: int) -> tuple[int, int]:
    """Cut `length` statements at random: the length of the first part and its share of the steps."""
    first = rng.randint(0, length)
    return first, sum(position < first for position in rng.sample(range(length), steps))


@lru_cache
def _loop_plans(depth: int) -> list[tuple[int, int, int, int]]:
    """As `_nested_plans`, without an outer loop. Blocks of one step could not reach all answers."""
    return [(s, t, 0, 1) for t in range(2, depth + 1) for s in range(2, depth // t + 1)]


@lru_cache
def _nested_plans(depth: int) -> list[tuple[int, int, int, int]]:
    """All (steps of the inner block, its times, other steps of the outer block, its times) that fit.

    A single step hardly ever gains anything at its third repetition, so its block is repeated only twice.
    """
    return [
        (s, t, outer, times)
        for times in range(2, depth // 3 + 1)
        for t in range(2, depth + 1)
        for s in range(1 if t == 2 else 2, depth // (times * t) + 1)
        for outer in range(1, depth // times - s * t + 1)
    ]
