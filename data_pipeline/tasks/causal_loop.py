"""Causal-loop programs (version 1, four levels) with worked traces.

A program assigns one-digit values to variables named A, B, C, ...; every operation is `+`, `-` or `*`
modulo 10 on a variable and a second operand (a digit or a variable):

    level 1  a chain                `A=3;B=A+2;C=B*2;D=C-1`                             ?D
    level 2  a loop                 `Z=2;L=7;loop{L=Z*L;H=L*3;Z=H-L}`                   ?L
    level 3  chains that join       `A=3;B=A+2;C=7;D=C*2;E=B+D`                         ?E
    level 4  a loop inside a loop   `S=4;E=5;loop{loop{Q=S-E;E=Q-S};S=E-8}`             ?Q

`loop{...}` repeats its body until a whole pass leaves every variable as it was. No program reads a variable
before it has a value. The trace copies each statement, fills in the values and gives the result
(`B=A+2=3+2=5`), so predicting the next character takes at most one look-up or one one-digit operation. In a
loop a result ends with `!` if it changed its variable and with `;` if not, `|` starts the next pass and `}`
follows a pass without any `!`. The trace ends with the query again, or the answer would need two look-ups.

Against guessing: answers are uniform over 0..9 (the digit is drawn first), operations that do nothing or
erase their operand (`+0`, `-0`, `*1`, `*0`, `X-X`) are not used in generation, the query of levels 1 and 3
lies at least two operations deep, and in levels 2 and 4 the queried variable ends with another value than
it has after the first pass.

A hash of the program with its variables renamed in order of appearance decides the split, so train and test
are disjoint. Programs are drawn, run and written by the thousand in numpy
(`causal_loop_batch.py`); raw random bits and integers are all that is used, so a seed gives the same bytes on
every machine.
"""

import hashlib
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.sources.documents import Document
from data_pipeline.tasks.programs.causal_loop_batch import (
    HASH_FACTOR,
    candidates,
    hashes,
    joined,
    mixed,
    program_bytes,
    ranks,
    traces,
)
from data_pipeline.tasks.programs.causal_loop_programs import VARIABLE, Array, Draws, canonical
from data_pipeline.tasks.splits import SPLITS, TEST_SHARE, check_request
from data_pipeline.tasks.task import SyntheticTask, size

LEVELS = (1, 2, 3, 4)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
WAITING = 512  # most programs that wait for one answer
MAX_DOCUMENT_LENGTH = {1: 180, 2: 350, 3: 180, 4: 350}  # characters of prompt_trace + completion_trace


@dataclass(frozen=True)
class Options:
    levels: list[int] = size(LEVELS, "levels dealt round-robin")


@dataclass(frozen=True)
class DocumentOptions:
    trace_fraction: float = 0.75  # share of documents with the worked trace


@dataclass  # not frozen: that would take three times as long to make
class Sample:
    """One question about one program. A document is prompt + completion, joined without a separator."""

    id: str
    level: int
    program: str  # without the query
    question: str  # the queried variable, one capital letter
    answer: int  # 0..9
    trace: str  # the worked steps, without prompt and answer
    prompt_trace: str
    completion_trace: str
    prompt_direct: str
    completion_direct: str


def generate(num_samples: int, levels: Sequence[int], seed: int, split: str = "train") -> Iterator[Sample]:
    """Yield `num_samples` samples, levels round-robin; sample i depends on (levels, seed, split, i) only.

    Programs of the two splits are disjoint up to the names of variables. Raises DataError for an unknown
    level or split and for a negative count.
    """
    check_request(num_samples, split)
    if not levels or any(level not in LEVELS for level in levels):
        raise DataError(f"levels {list(levels)} must be a non-empty list of 1, 2, 3, 4: choose from them")
    texts = {level: _Level(level, seed, split).texts() for level in set(levels)}
    for i, level in zip(range(num_samples), cycle(levels)):
        yield Sample(f"causal_loop-{split}-{seed}-{i}", level, *next(texts[level]))


def split_of(program: str) -> str:
    """ "train" or "test": a fixed share of the hash of the program, its variables renamed in order.

    It is the hash of `causal_loop_batch.hashes`: the characters are the digits of a number in base
    HASH_FACTOR modulo 2^64, whose bits the finalizer of MurmurHash3 mixes.
    """
    names: dict[str, str] = {}
    renamed = re.sub("[A-Z]", lambda m: names.setdefault(m.group(), LETTERS[len(names)]), program)
    number = 0
    for code in renamed.encode():
        number = (number * HASH_FACTOR + code) % 2**64
    return SPLITS[int(in_test(mixed(np.array([number], np.uint64)))[0])]


def in_test(hashed: Array) -> Array:
    """Which hashes (N,) uint64 of canonical programs belong to the test split: the lowest TEST_SHARE."""
    return hashed < np.uint64(TEST_SHARE * 2**64)


def execute(program: str) -> dict[str, int]:
    """Run program text (with or without a final `?X`) and return the final value of every variable.

    Reads only the text, so it checks the generator. Raises DataError for text that is not a program,
    for a variable that is read before it has a value and for a loop that does not converge within 1000
    passes.
    """
    tokens = re.findall(r"loop\{|[A-Z]=[A-Z0-9](?:[-+*][A-Z0-9])?|[;{}]|\?[A-Z]|.", program, re.DOTALL)
    if tokens and tokens[-1].startswith("?"):
        tokens.pop()
    state: dict[str, int] = {}

    def value(operand: str) -> int:
        if operand.isdigit():
            return int(operand)
        if operand not in state:
            raise DataError(f"program reads {operand} before it has a value: {program!r}")
        return state[operand]

    def block(start: int, end: str) -> int:
        """Run the statements from tokens[start] to the closing `end`; return the position after it."""
        position = start
        while True:
            token = tokens[position] if position < len(tokens) else ""
            if token == "loop{":
                for _ in range(1000):
                    before = dict(state)
                    after = block(position + 1, "}")
                    if state == before:
                        break
                else:
                    raise DataError(f"loop does not converge within 1000 passes: {program!r}")
                position = after
            elif re.fullmatch(r"[A-Z]=.*", token):
                left, operator, right = token[2], token[3:4], token[4:5]
                result = value(left)
                if operator == "+":
                    result += value(right)
                elif operator == "-":
                    result -= value(right)
                elif operator == "*":
                    result *= value(right)
                state[token[0]] = result % 10
                position += 1
            else:
                raise DataError(f"not a causal-loop program at {token!r}: {program!r}")
            separator = tokens[position] if position < len(tokens) else ""
            if separator == end:
                return position + 1
            if separator != ";":
                raise DataError(f"expected ';' or the end, found {separator!r}: {program!r}")
            position += 1

    block(0, "")
    return state


def one_step_answer(sample: Sample) -> int:
    """A shortcut that should fail: the last rule of the queried variable, applied once to the initial values.

    The initial value of a variable is the constant first assigned to it, else 0.
    """
    rules = re.findall(r"([A-Z])=([A-Z0-9])([-+*]?)([A-Z0-9]?)", sample.program)
    initial: dict[str, int] = {}
    for target, left, operator, _ in rules:
        if not operator and left.isdigit():
            initial.setdefault(target, int(left))
    _, left, operator, right = [rule for rule in rules if rule[0] == sample.question][-1]

    def value(operand: str) -> int:
        return int(operand) if operand.isdigit() else initial.get(operand, 0)

    x, y = value(left), value(right) if operator else 0
    return {"": x, "+": x + y, "-": x - y, "*": x * y}[operator] % 10


def majority_answer(samples: Iterable[Sample]) -> int:
    """The most common answer (the smallest of equals). Raises DataError for no samples."""
    counts = Counter(sample.answer for sample in samples)
    if not counts:
        raise DataError("no samples to take the majority answer of: give at least 1")
    return max(sorted(counts), key=counts.__getitem__)


def training_document(sample: Sample, trace_fraction: float) -> tuple[str, str]:
    """Prompt and completion with the trace for `trace_fraction` of the samples, without it for the others.

    The hash of the sample's id decides. Raises DataError for a fraction outside 0..1.
    """
    if not 0 <= trace_fraction <= 1:
        raise DataError(f"trace_fraction {trace_fraction} is not in 0..1: give a share of the samples")
    bucket = int.from_bytes(hashlib.sha256(sample.id.encode()).digest()[:8], "big")
    if bucket < trace_fraction * 2**64:
        return sample.prompt_trace, sample.completion_trace
    return sample.prompt_direct, sample.completion_direct


def audit(samples: Iterable[Sample]) -> dict[int, dict[str, float]]:
    """Per level: number of samples, share of the majority answer, accuracy of `one_step_answer`, longest
    document.
    """
    by_level: dict[int, list[Sample]] = {}
    for sample in samples:
        by_level.setdefault(sample.level, []).append(sample)
    report = {}
    for level, members in sorted(by_level.items()):
        majority = majority_answer(members)
        report[level] = {
            "samples": len(members),
            "majority": sum(s.answer == majority for s in members) / len(members),
            "one_step": sum(s.answer == one_step_answer(s) for s in members) / len(members),
            "longest": max(len(s.prompt_trace) + len(s.completion_trace) for s in members),
        }
    return report


# ---- generation: draw the answer, then take the next program that has it


_Text = tuple[str, str, int, str, str, str, str, str]  # the fields of a sample after its level


class _Level:
    """The endless samples of one level: programs come in batches and wait, by answer, until it is drawn."""

    def __init__(self, level: int, seed: int, split: str) -> None:
        self.level = level
        self.split = split
        self.draws = Draws(f"causal_loop/{seed}/{split}/{level}")
        self.waiting: list[deque[_Text]] = [deque() for _ in range(10)]

    def texts(self) -> Iterator[_Text]:
        while True:
            # The answer is drawn first, so that none is more common than another.
            for answer in self.draws.below(10, 1024).tolist():
                while not self.waiting[answer]:
                    self.refill()
                yield self.waiting[answer].popleft()

    def refill(self) -> None:
        """Draw a batch; its programs that are in this split and not in surplus wait."""
        programs, asked, answers = candidates(self.level, self.draws)
        room = np.array([WAITING - len(texts) for texts in self.waiting])
        columns = np.flatnonzero(ranks(answers) < room[answers])
        test = in_test(hashes(program_bytes(canonical(programs.take(columns)))))
        columns = columns[test == (self.split == "test")]
        programs = programs.take(columns)
        rows = zip(
            joined(program_bytes(programs)),
            [LETTERS[symbol] for symbol in (asked[columns] - VARIABLE).tolist()],
            answers[columns].tolist(),
            traces(programs),
            strict=True,
        )
        longest = MAX_DOCUMENT_LENGTH[self.level] - len("?X\nTrace: ?X\nAnswer: 0")
        for program, question, answer, trace in rows:
            if len(program) + len(trace) <= longest:
                self.waiting[answer].append(_text(program, question, answer, trace))


def _text(program: str, question: str, answer: int, trace: str) -> _Text:
    query = f"{program}?{question}\n"
    return (
        program,
        question,
        answer,
        trace,
        f"{query}Trace:",
        f" {trace}?{question}\nAnswer: {answer}",
        f"{query}Answer:",
        f" {answer}",
    )


# ---- the task


def _audit_table(samples: Sequence[Sample]) -> str:
    lines = ["level  samples  majority  one-step  longest document"]
    for level, row in audit(samples).items():
        shares = f"{row['majority']:10.3f}{row['one_step']:10.3f}"
        lines.append(f"{level:5d}{row['samples']:9.0f}{shares}{row['longest']:10.0f}")
    return "\n".join(lines)


TASK = SyntheticTask(
    name="causal_loop",
    about="causal-loop programs of version 1, four levels, with worked traces",
    options=Options,
    generate=generate,
    shortcuts=lambda samples, _: {"one step": [str(one_step_answer(sample)) for sample in samples]},
    plain=lambda sample, options: Document(*training_document(sample, options.trace_fraction)),
    plain_options=DocumentOptions,
    audit=_audit_table,
)
