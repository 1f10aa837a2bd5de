"""Runs causal-loop programs in batches, keeps the useful ones and writes their texts.

Most random loops never converge. `settle` therefore runs thousands of programs in lockstep and drops the
useless ones early; `traces` runs only the rest again, with their traces.
"""

import numpy as np

from data_pipeline.tasks.programs.causal_loop_programs import (
    CONSTANT,
    LAYOUTS,
    LOOP_VARIABLES,
    MINUS,
    NOTHING,
    PLUS,
    SYMBOLS,
    TIMES,
    VARIABLE,
    Array,
    Block,
    Draws,
    Programs,
    draw_chains,
    draw_joins,
    draw_loops,
    draw_nested,
    put_initial_values,
)

# Most loops converge to zeros: one program in nine is asked for a variable that is 0, the others for one that
# is not, where rare answers are preferred.
WEIGHTS = np.array([0, 2, 2, 16, 2, 2, 1, 16, 2, 8], np.uint8)
MAX_PASSES = 6  # passes of one loop run that may change the state; one more confirms
INNER_PASSES = 4  # the same for an inner loop; fewer than two in a hundred would take longer
STARTS = {2: 3, 4: 16}  # initial values that a loop gets once it has converged from some
CHUNK = 8192  # programs in lockstep: numpy would allocate a longer array anew each time
UNSET = 10  # value of a variable before its first assignment: no result equals it
HASH_FACTOR = 0x9E3779B97F4A7C15
CHARACTERS = np.frombuffer(b"0123456789ABCDEFGH\0", np.uint8)  # of each symbol
SIGNS = np.frombuffer(b"+-*\0", np.uint8)  # of each operator


def _result_table() -> Array:
    """Result of [operator, left, right], flat; UNSET operands are looked up for empty slots only."""
    left, right = np.ogrid[:11, :11]
    table = np.zeros((4, 11, 11), np.int16)
    table[PLUS], table[MINUS], table[TIMES], table[CONSTANT] = left + right, left - right, left * right, left
    return table.reshape(-1) % 10


RESULTS = _result_table()


# ---- which programs are useful


def candidates(level: int, draws: Draws) -> tuple[Programs, Array, Array]:
    """The useful ones of some thousand random programs, the symbol each is asked for and its answer (N,)."""
    draw = _straight if level in (1, 3) else _looped
    return draw(level, draws, CHUNK)


def _straight(level: int, draws: Draws, count: int) -> tuple[Programs, Array, Array]:
    programs, asked = draw_chains(draws, count) if level == 1 else draw_joins(draws, count)
    machine = Machine(programs, np.zeros((LOOP_VARIABLES, count), np.uint8), range(len(programs.target)))
    machine.block(LAYOUTS[level])
    return programs, asked, machine.state.reshape(SYMBOLS, count)[asked, np.arange(count)]


def _looped(level: int, draws: Draws, count: int) -> tuple[Programs, Array, Array]:
    drawn = draw_loops(draws, count) if level == 2 else draw_nested(draws, count)
    restful, _, _ = settle(drawn, _initial_values(draws, count))
    programs = drawn.take(np.tile(restful, STARTS[level]))
    values = _initial_values(draws, programs.count)
    kept, first, last = settle(programs, values)
    late = first != last  # the loop must be needed: its first pass alone gives another value
    zero = draws.below(9, kept.size) == 0
    weight = np.where(zero, last == 0, WEIGHTS[last]) * late
    total = weight.sum(axis=0, dtype=np.uint8)
    useful = np.flatnonzero(total)
    weight, kept = weight[:, useful], kept[useful]
    choice = draws.below(total[useful], useful.size)
    asked = (np.cumsum(weight, axis=0, dtype=np.uint8) > choice).argmax(axis=0)
    programs = programs.take(kept)
    put_initial_values(programs, values[:, kept])
    return programs, asked + VARIABLE, last[asked, useful]


def _initial_values(draws: Draws, count: int) -> Array:
    return draws.below(10, LOOP_VARIABLES * count).reshape(LOOP_VARIABLES, count)


def settle(programs: Programs, values: Array) -> tuple[Array, Array, Array]:
    """Run the loops of programs in lockstep from the initial `values` (variables, N).

    Returns the columns of the programs whose loops all come to rest in time, but not after one pass, and the
    values of their variables after the first pass and at the end, each (variables, kept). A loop at rest
    stays at rest, so every loop can run for as long as the slowest may.
    """
    body = LAYOUTS[programs.level][LOOP_VARIABLES]
    assert isinstance(body, tuple)
    kept, good, first = np.arange(programs.count), np.ones(programs.count, bool), values
    slots = range(LOOP_VARIABLES, len(programs.target))
    machine = Machine(programs, values, slots)
    for passes in range(MAX_PASSES + 1):
        before = machine.variables()
        machine.block(body)
        after = machine.variables()
        good &= ~machine.restless
        last = passes == MAX_PASSES
        if passes == 0:
            first = after
        elif passes == 1 or last:
            good &= (before != after).any(axis=0) == (not last)
        if last or 4 * good.sum() < 3 * good.size:  # dropping a few costs more than running them
            columns = np.flatnonzero(good)
            kept, first, after, good = kept[columns], first[:, columns], after[:, columns], good[columns]
        if not last and kept.size < programs.count:
            programs = programs.take(columns)
            machine = Machine(programs, after, slots)
    return kept, first, after


class Machine:
    """Runs a batch statement by statement, all programs at once and every loop to the last pass allowed."""

    def __init__(self, programs: Programs, values: Array, slots: range) -> None:
        count = programs.count
        columns = np.arange(count)
        state = np.zeros((SYMBOLS, count), np.int16)
        state[:VARIABLE] = np.arange(VARIABLE)[:, None]
        state[VARIABLE : VARIABLE + LOOP_VARIABLES] = values
        self.state = state.reshape(-1)  # flat: one index finds an operand
        self.target = {k: programs.target[k] * np.intp(count) + columns for k in slots}
        self.left = {k: programs.left[k] * np.intp(count) + columns for k in slots}
        self.right = {k: programs.right[k] * np.intp(count) + columns for k in slots}
        self.operator = {k: programs.operator[k] * np.int16(121) for k in slots}
        self.restless = np.zeros(count, bool)  # an inner loop did not converge

    def variables(self) -> Array:
        """A copy of the values of the loop's variables, (variables, N)."""
        return self.state.reshape(SYMBOLS, -1)[VARIABLE : VARIABLE + LOOP_VARIABLES].copy()

    def block(self, body: Block) -> None:
        for item in body:
            if isinstance(item, int):
                key = self.state.take(self.left[item]) * 11
                key += self.state.take(self.right[item])
                key += self.operator[item]
                self.state[self.target[item]] = RESULTS.take(key)
            else:
                for _ in range(INNER_PASSES):
                    self.block(item)
                before = self.variables()
                self.block(item)
                self.restless |= (before != self.variables()).any(axis=0)


def ranks(answers: Array) -> Array:
    """For each answer (N,), how many equal ones precede it."""
    order = np.argsort(answers, kind="stable")
    ordered = answers[order]
    rank = np.empty(answers.size, np.intp)
    rank[order] = np.arange(answers.size) - np.searchsorted(ordered, ordered)
    return rank


# ---- texts


def program_bytes(programs: Programs) -> Array:
    """The text of each program in a column of characters, with zeros in between: uint8 (width, N)."""
    rows: list[Array] = []  # from the last character to the first
    every = np.ones(programs.count, bool)

    def block(body: Block) -> None:
        later = ~every  # another statement follows in this block
        for item in reversed(body):
            there = programs.target[item] != NOTHING if isinstance(item, int) else every
            rows.append((there & later) * np.uint8(ord(";")))
            later = later | there
            if isinstance(item, int):
                rows.extend(row * there for row in reversed(_statement(programs, item)))
            else:
                rows.append(every * np.uint8(ord("}")))
                block(item)
                rows.extend(every * np.uint8(c) for c in reversed(b"loop{"))

    block(LAYOUTS[programs.level])
    return np.array(rows[::-1])


def _statement(programs: Programs, slot: int) -> list[Array]:
    """The five characters of a slot's statements, the last two of them zero for a constant."""
    operator = programs.operator[slot]
    right = np.where(operator == CONSTANT, 0, CHARACTERS[programs.right[slot]])
    equals = np.full(programs.count, ord("="), np.uint8)
    return [
        CHARACTERS[programs.target[slot]],
        equals,
        CHARACTERS[programs.left[slot]],
        SIGNS[operator],
        right,
    ]


def joined(characters: Array) -> list[str]:
    """The strings of the columns of ASCII characters (width, N); zeros are left out."""
    end = np.full((1, characters.shape[1]), ord("\n"), np.uint8)
    return _lines(np.concatenate([characters, end]).T)


def _lines(characters: Array) -> list[str]:
    return characters.tobytes().translate(None, b"\0").decode("ascii").split("\n")[:-1]


def hashes(characters: Array) -> Array:
    """The hash (N,) uint64 of each column of `program_bytes`, of a canonical program for the split.

    The characters are the digits of a number in base HASH_FACTOR modulo 2^64; `mixed` spreads its bits.
    """
    number = np.zeros(characters.shape[1], np.uint64)
    for row in characters:
        np.copyto(number, number * np.uint64(HASH_FACTOR) + row, where=row != 0)
    return mixed(number)


def mixed(values: Array) -> Array:
    """The finalizer of MurmurHash3 (fmix64, public domain) of uint64 values."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        values = (values ^ values >> np.uint64(33)) * np.uint64(factor)
    return values ^ values >> np.uint64(33)


def traces(programs: Programs) -> list[str]:
    """The worked trace of each program, whose loops must all converge; at most 65536 programs."""
    tracer = _Tracer(programs)
    columns = np.arange(programs.count)
    tracer.run(LAYOUTS[programs.level], columns, False)
    tracer.mark(columns, "\n")
    return tracer.texts()


class _Tracer:
    """Runs a batch, each loop until it converges, and logs each step; all texts are made from the log.

    A step has a fragment of twelve characters, `B=A+2=3+2=5;`. Statements and marks have a template each, the
    log says which template it is and which four bytes are added to it.
    """

    MARKS = "{|}\n"

    def __init__(self, programs: Programs) -> None:
        self.programs = programs
        unset = np.full((LOOP_VARIABLES, programs.count), UNSET)
        self.machine = Machine(programs, unset, range(len(programs.target)))
        self.clock = 0
        self.changed_at = np.zeros(programs.count, int)  # clock of the last step that changed a variable
        self.columns: list[Array] = []
        self.templates: list[Array] = []
        self.added: list[
            Array
        ] = []  # uint32: value on the right, on the left, result, end; lowest byte first

    def run(self, body: Block, columns: Array, in_loop: bool) -> None:
        """Run `body` for the programs in `columns`."""
        for item in body:
            if isinstance(item, int):
                self.statement(item, columns[self.programs.target[item].take(columns) != NOTHING], in_loop)
            else:
                self.loop(item, columns)

    def loop(self, body: Block, columns: Array) -> None:
        start = "{"
        while columns.size:
            self.mark(columns, start)
            before = self.clock
            self.run(body, columns, True)
            changed = self.changed_at.take(columns) > before
            self.mark(columns[~changed], "}")
            columns = columns[changed]
            start = "|"

    def mark(self, columns: Array, character: str) -> None:
        template = (len(self.programs.target) + self.MARKS.index(character)) * self.programs.count
        self.log(columns, np.full(columns.size, template), np.zeros(columns.size, np.uint32))

    def log(self, columns: Array, templates: Array, added: Array) -> None:
        self.columns.append(columns.astype(np.uint16))
        self.templates.append(templates)
        self.added.append(added)

    def statement(self, slot: int, columns: Array, in_loop: bool) -> None:
        machine = self.machine
        left = machine.state.take(machine.left[slot].take(columns))
        right = machine.state.take(machine.right[slot].take(columns))
        operator = machine.operator[slot].take(columns)
        result = RESULTS.take(operator + left * 11 + right)
        target = machine.target[slot].take(columns)
        changed = machine.state.take(target) != result
        machine.state[target] = result
        self.clock += 1
        self.changed_at[columns[changed]] = self.clock
        added = np.where(changed & in_loop, np.uint32(ord("!") << 24), np.uint32(ord(";") << 24))
        values = (right + (left << 8)).astype(np.uint32) + (result.astype(np.uint32) << 16)
        values[operator == CONSTANT * 121] = 0
        self.log(columns, columns + slot * self.programs.count, added + values)

    def texts(self) -> list[str]:
        columns, templates, added = map(np.concatenate, (self.columns, self.templates, self.added))
        # A stable sort brings the steps of one program together, in the order of time.
        order = np.argsort(columns, kind="stable")
        templates, added = templates.take(order), added.take(order)
        words = [part.take(templates) for part in self._template_words()]
        words[1] += (added & 0xFF00) << 8
        words[2] += added & 0xFFFF00FF
        return _lines(np.array(words, "<u4").T)

    def _template_words(self) -> Array:
        """The templates as uint32 words (3, (slots + marks) * N), the first character in the lowest byte."""
        programs = self.programs
        slots, count = programs.target.shape
        parts = np.zeros((12, slots + len(self.MARKS), count), np.uint32)
        for slot in range(slots):
            update = programs.operator[slot] != CONSTANT
            parts[:5, slot] = statement = _statement(programs, slot)
            parts[7, slot] = statement[3]
            parts[[5, 9], slot] = ord("=") * update
            parts[[6, 8, 10], slot] = ord("0") * update
        parts[0, slots:] = np.frombuffer(self.MARKS.encode(), np.uint8)[:, None]
        shifts = np.array([0, 8, 16, 24], np.uint32)[:, None, None]
        words = [(parts[k : k + 4] << shifts).sum(axis=0, dtype=np.uint32) for k in (0, 4, 8)]
        return np.array(words).reshape(3, -1)
