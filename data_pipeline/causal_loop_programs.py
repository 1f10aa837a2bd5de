"""Random causal-loop programs and their execution step by step; `causal_loop.py` makes samples of them."""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_PASSES = 6  # passes of one loop run that may change the state; one more confirms


class Assign(NamedTuple):
    """`target = left operator right`; a constant assignment has operator "" and its digit in `left`."""

    target: str
    left: str
    operator: str = ""
    right: str = ""

    def __str__(self) -> str:
        return f"{self.target}={self.left}{self.operator}{self.right}"


class Loop(NamedTuple):
    body: "tuple[Statement, ...]"

    def __str__(self) -> str:
        return "loop{" + program_text(self.body) + "}"


Statement = Assign | Loop


def program_text(body: Sequence[Statement]) -> str:
    return ";".join(map(str, body))


def variants(rng: random.Random, body: Sequence[Statement]) -> Iterator[Sequence[Statement]]:
    """`body`, then `body` with one of its added or subtracted digits replaced by every other one.

    Most of the random loops diverge; a loop that converges is worth nine tries for the answer that was drawn.
    """
    yield body
    shifts = [s for s in _assignments(body) if s.operator in ("+", "-") and s.right.isdigit()]
    if shifts:
        shift = rng.choice(shifts)
        for digit in rng.sample("123456789", 9):
            if digit != shift.right:
                yield _replace(body, shift, shift._replace(right=digit))


def _assignments(body: Sequence[Statement]) -> list[Assign]:
    """The assignments of `body` in the order of the text."""
    flat: list[Assign] = []
    for statement in body:
        flat += _assignments(statement.body) if isinstance(statement, Loop) else [statement]
    return flat


def _replace(body: Sequence[Statement], old: Assign, new: Assign) -> tuple[Statement, ...]:
    return tuple(
        Loop(_replace(s.body, old, new)) if isinstance(s, Loop) else new if s == old else s for s in body
    )


def _operation(rng: random.Random, target: str, left: str, variables: Sequence[str]) -> Assign:
    """`target = left op right`: right is a useful digit or one of `variables` other than left."""
    others = [name for name in variables if name != left]
    operator = rng.choice("+-*")
    if others and rng.random() < 0.5:
        return Assign(target, left, operator, rng.choice(others))
    return Assign(target, left, operator, rng.choice("23456789" if operator == "*" else "123456789"))


def _chain(rng: random.Random, names: Sequence[str]) -> list[Statement]:
    body: list[Statement] = [Assign(names[0], rng.choice("0123456789"))]
    body += [_operation(rng, target, left, ()) for left, target in zip(names, names[1:], strict=False)]
    return body


def _draw_chain(rng: random.Random, names: Sequence[str]) -> tuple[list[Statement], Sequence[str]]:
    used = names[: rng.randint(3, 6)]
    return _chain(rng, used), used[2:]


def _draw_converging(rng: random.Random, names: Sequence[str]) -> tuple[list[Statement], Sequence[str]]:
    """Two chains of 2 or 3 statements, their join, and perhaps one statement more; the query is at the join
    or after.
    """
    first = rng.randint(2, 3)
    join = first + rng.randint(2, 3)
    body = _chain(rng, names[:first]) + _chain(rng, names[first:join])
    body.append(Assign(names[join], names[first - 1], rng.choice("+-*"), names[join - 1]))
    end = join + rng.randint(1, 2)
    if end > join + 1:
        body.append(_operation(rng, names[join + 1], names[join], ()))
    return body, names[join:end]


def _draw_loop(rng: random.Random, names: Sequence[str]) -> tuple[list[Statement], Sequence[str]]:
    """A cycle of 2 to 4 updates in any order, each reading the variable before it in the cycle."""
    variables = names[: rng.randint(2, 4)]
    updates = [_operation(rng, target, variables[k - 1], variables) for k, target in enumerate(variables)]
    rng.shuffle(updates)
    return [*_initial_values(rng, updates), Loop(tuple(updates))], variables


def _draw_nested(rng: random.Random, names: Sequence[str]) -> tuple[list[Statement], Sequence[str]]:
    """A cycle through 3 or 4 variables of which two neighbours are updated by an inner loop."""
    variables = names[: rng.randint(3, 4)]
    updates = [_operation(rng, target, variables[k - 1], variables) for k, target in enumerate(variables)]
    # The inner loop's two variables must feed each other, or it would be a loop in name only.
    first, second = updates[0], updates[1]
    inner = [first._replace(right=second.target), second]
    rng.shuffle(inner)
    body: list[Statement] = [*updates[2:]]
    body.insert(rng.randint(0, len(body)), Loop(tuple(inner)))
    return [*_initial_values(rng, body), Loop(tuple(body))], variables


def _initial_values(rng: random.Random, body: Sequence[Statement]) -> list[Statement]:
    """A constant for every variable that the first pass reads before it assigns it."""
    assigned: set[str] = set()
    needed: list[str] = []
    for update in _assignments(body):
        needed += [name for name in (update.left, update.right) if name.isalpha() and name not in assigned]
        assigned.add(update.target)
    return [Assign(name, rng.choice("0123456789")) for name in dict.fromkeys(needed)]


DRAW = {1: _draw_chain, 2: _draw_loop, 3: _draw_converging, 4: _draw_nested}


class Run:
    """Executes statements and keeps what a trace needs; its text is made for accepted programs only."""

    def __init__(self) -> None:
        self.state: dict[str, int] = {}
        self.steps: list[str | tuple[Assign, int, int, int, str]] = []
        self.late_changes: set[str] = set()  # variables that changed in a later pass of the outermost loop
        self.depth = 0
        self.late = False

    def trace_text(self) -> str:
        return "".join(map(_step_text, self.steps))

    def block(self, body: Sequence[Statement]) -> bool:
        """Run `body`; False as soon as one of its loops still changes in pass MAX_PASSES + 1."""
        for statement in body:
            if isinstance(statement, Loop):
                if not self._loop(statement):
                    return False
            else:
                self._assign(statement)
        return True

    def _assign(self, s: Assign) -> None:
        state = self.state
        left = state[s.left] if s.left in state else int(s.left)
        right = 0
        result = left
        if s.operator:
            right = state[s.right] if s.right in state else int(s.right)
            result = apply_operator(left, s.operator, right)
        end = ";"
        if state.get(s.target) != result:
            state[s.target] = result
            if self.depth:
                end = "!"
            if self.late:
                self.late_changes.add(s.target)
        self.steps.append((s, left, right, result, end))

    def _loop(self, loop: Loop) -> bool:
        self.depth += 1
        self.steps.append("{")
        for passes in range(MAX_PASSES + 1):
            if passes:
                self.steps.append("|")
            if self.depth == 1:
                self.late = passes > 0
            before = dict(self.state)
            if not self.block(loop.body):
                return False
            if self.state == before:
                self.steps.append("}")
                self.depth -= 1
                self.late = self.late and self.depth > 0
                return True
        return False


def _step_text(step: str | tuple[Assign, int, int, int, str]) -> str:
    if isinstance(step, str):
        return step
    s, left, right, result, end = step
    return f"{s}={left}{s.operator}{right}={result}{end}" if s.operator else f"{s}{end}"


def apply_operator(left: int, operator: str, right: int) -> int:
    return (left + right if operator == "+" else left - right if operator == "-" else left * right) % 10
