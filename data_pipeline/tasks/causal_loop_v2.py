"""Causal-loop programs, version 2: straight-line programs of an exact serial depth, with worked traces.

A program gives every one of its variables an initial constant, then runs a fixed number of statements; the
question is the final value of one variable. Values are 0..p-1 (p is the modulus). The text:

    program   = initial {initial} {statement}        A3K5B0 CmAB...
    initial   = variable number                      A3: A starts at 3
    statement = variable operator operand operand    CmA4: C = max(A, 4)
    operand   = variable | number                    at most one of the two is a number
    query     = "?" variable                         ?C
    variable  = A..Z;  number = decimal digits;  operators, with operands x and y:

    d  |x - y|      m  max(x, y)      r  x - y if y <= x, else y
    n  p - 1 - y    e  y if y is odd, else (y + 1) mod p

Statements have no separator: their form shows where one ends. With p <= 10 each statement has 4 characters
and all programs of one size are equally long, whatever their depth. `n` and `e` do not read their first
operand. The operations do not commute, most of them reveal part of the result when one operand is known, and
they do not collapse into a short formula as affine maps do: for a fixed x, `r` reverses the values 0..x, and
such reversals generate every permutation of the values.

**Depth.** A constant has depth 0, a result is one deeper than the deepest operand that its operation reads.
The queried value has exactly the wanted depth. So that no identity shortens the path, each result of the
longest chain is looked at while the chain's first constant, its origin, runs through all values (16 random
ones if p > 16): it must take at least 3 different values, and they must differ from those of every earlier
result that takes fewer operations. This rules out `max(x, x)`, `|x - x|`, `p-1-(p-1-y)`, `max(x, 0)`,
constants that always win, and loops that come back to an earlier state; `effective_depth` repeats the check
from the text alone. Nor may two consecutive operations of the chain equal one operation with a number as a
function of their input: no `max(max(x, 3), 4)`, no `|p-1-x - 2|`. They may still agree with one operation on
the values that happen to arise.

**Families**, all unrolled:

    chain        no live statement reads two computed results
    convergence  one does: chains that join, or a value that is used again
    loop         a block of statements is repeated 2 or more times; depth 4 and more
    nested       so does a block that itself holds a repeated block; depth 6 and more

Dead statements are drawn by the same rules as live ones. Names are drawn from the whole alphabet, or from the
first letters only, and initial constants from all values or from the smallest only, to test a model on names
and constants it has not seen.
For p <= 10 answers are uniform (the answer is drawn first). `--audit` measures what guessing yields.

The trace copies each statement, fills in the values it reads and gives the result (`CmA4:3,4=4;`), so that
predicting the next character takes at most one look-up or one operation. The trace ends with the query.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.sources.documents import LabelledDocument, TracedDocument
from data_pipeline.tasks.programs.causal_loop_v2_audit import audit, one_step_answer
from data_pipeline.tasks.programs.causal_loop_v2_programs import (
    FAMILIES,
    LETTERS,
    MIN_DEPTH,
    Draft,
    Size,
    draw,
)
from data_pipeline.tasks.programs.causal_loop_v2_sample import LABEL_MODULUS, Sample
from data_pipeline.tasks.splits import check_request, hashed_split
from data_pipeline.tasks.task import Evaluation, SyntheticTask, require, size

MIN_MODULUS, MAX_MODULUS = 5, 997
MIN_VARIABLES = 3
ATTEMPTS = 200_000  # programs drawn for one sample; the rarest kind that exists needs some thousands


@dataclass(frozen=True)
class Options:
    depths: list[int] = size(tuple(range(1, 9)), "serial depths of the answer, dealt round-robin")
    families: list[str] = size(FAMILIES, "families dealt round-robin to the depths that they have")
    modulus: int = size(7, "values are below it")
    variables: int = size(5, "variables of a program")
    statements: int = size(12, "statements of a program")
    names: int = size(26, "how many letters name variables")
    constants: int = size(0, "initial constants are below it; 0: all values")


def generate(
    num_samples: int,
    depths: Sequence[int] = tuple(range(1, 9)),
    families: Sequence[str] = FAMILIES,
    modulus: int = 7,
    variables: int = 5,
    statements: int = 12,
    names: int = len(LETTERS),
    constants: int = 0,
    seed: int = 0,
    split: str = "train",
) -> Iterator[Sample]:
    """Yield `num_samples` samples with `variables` variables, of the first `names` letters, and `statements`
    statements each. Initial constants are below `constants`, 0: below the modulus.

    Depths are dealt round-robin; for one depth, so are the families that have it. Sample i depends on the
    arguments other than `num_samples` and on i only. Programs of the two splits are disjoint up to the names
    of variables. Raises DataError for an argument out of range, a depth that none of the families has, and
    if no program was found (few variables, few statements).
    """
    size = Size(modulus, variables, statements, names, constants or modulus)
    _check(num_samples, depths, families, size, split)
    for i in range(num_samples):
        depth = depths[i % len(depths)]
        able = [family for family in families if MIN_DEPTH[family] <= depth]
        yield _sample(i, able[i // len(depths) % len(able)], depth, size, seed, split)


def split_of(program: str) -> str:
    """ "train" or "test": a fixed share of the sha256 of the program, its variables renamed in order."""
    names = "".join(dict.fromkeys(re.findall("[A-Z]", program)))
    canonical = program.translate(str.maketrans(names, LETTERS[: len(names)]))
    return hashed_split(canonical.encode())


def execute(program: str, modulus: int = 7) -> dict[str, int]:
    """Run program text (with or without a final `?X`) and return the final value of every variable.

    Shares no code with the generator, so it checks the generator. Raises DataError for text that is not a
    program, for a number of `modulus` or more and for a variable that has no value.
    """
    text = re.sub(r"\?[A-Z]$", "", program)
    state: dict[str, int] = {}

    def value(operand: str) -> int:
        if operand.isalpha() and operand not in state:
            raise DataError(f"program reads {operand} before it has a value: {program!r}")
        number = state[operand] if operand.isalpha() else int(operand)
        if number >= modulus:
            raise DataError(f"number {number} is not below the modulus {modulus}: {program!r}")
        return number

    position = 0
    while position < len(text):
        initial = re.compile(r"([A-Z])([0-9]+)").match(text, position)
        statement = re.compile(r"([A-Z])([dmrne])([A-Z]|[0-9]+)([A-Z]|[0-9]+)").match(text, position)
        if initial:
            state[initial[1]] = value(initial[2])
        elif statement:
            target, operator, left, right = statement.groups()
            y = value(right)
            if operator == "n":
                result = modulus - 1 - y
            elif operator == "e":
                result = y if y % 2 == 1 else (y + 1) % modulus
            else:
                x = value(left)
                flipped = x - y if y <= x else y
                result = {"d": abs(x - y), "m": max(x, y), "r": flipped}[operator]
            state[target] = result
        else:
            raise DataError(f"not a causal-loop program at {text[position : position + 4]!r}: {program!r}")
        position = (initial or statement).end()  # type: ignore[union-attr]
    if not state:
        raise DataError(f"empty program {program!r}: give it at least one initial constant")
    return state


# ---- generation


def _sample(i: int, family: str, depth: int, size: Size, seed: int, split: str) -> Sample:
    modulus = size.modulus
    key = f"{family}/{depth}/{modulus}/{size.variables}/{size.statements}"
    rng = random.Random(f"causal_loop_v2/{seed}/{split}/{key}/{i}")
    answer = rng.randrange(modulus) if modulus <= LABEL_MODULUS else None  # so that none is more common
    for _ in range(ATTEMPTS):
        draft = draw(rng, family, depth, size, answer)
        if draft is None:
            continue
        final = draft.vectors[draft.carrier]
        columns = [
            k
            for k, (value, constant) in enumerate(zip(final, draft.origin_values, strict=True))
            if constant < size.constants and (answer is None or value == answer)
        ]
        for column in rng.sample(columns, len(columns)):
            initial = {**draft.initial, draft.origin: draft.origin_values[column]}
            program = "".join([f"{name}{value}" for name, value in initial.items()])
            program += "".join(["".join(s) for s in draft.body])
            if split_of(program) == split:
                values = tuple([vector[column] for vector in draft.results])
                return _document(f"{split}-{seed}-{i}", family, modulus, initial, draft, program, values)
    raise DataError(
        f"no program of family {family}, depth {depth}, {size.variables} variables and {size.statements} "
        f"statements in {ATTEMPTS} attempts: raise variables or statements, or leave out the family"
    )


def _document(
    name: str,
    family: str,
    modulus: int,
    initial: dict[str, int],
    draft: Draft,
    program: str,
    values: tuple[int, ...],
) -> Sample:
    state = dict(initial)
    steps = []
    for s, value in zip(draft.body, values, strict=True):
        read = ",".join([str(state[x]) if x in state else x for x in s.reads])
        steps.append(f"{''.join(s)}:{read}={value};")
        state[s.target] = value
    question, trace = draft.carrier, "".join(steps)
    answer, query = state[question], f"{program}?{question}\n"
    return Sample(
        id=f"causal_loop_v2-{name}",
        family=family,
        depth=draft.depth,
        modulus=modulus,
        program=program,
        question=question,
        answer=answer,
        values=values,
        trace=trace,
        prompt_trace=f"{query}Trace:",
        completion_trace=f" {trace}?{question}\nAnswer: {answer}",
        prompt_direct=f"{query}Answer:",
        completion_direct=f" {answer}",
    )


def _check(num_samples: int, depths: Sequence[int], families: Sequence[str], size: Size, split: str) -> None:
    modulus, variables, statements, names, constants = size
    check_request(num_samples, split)
    if not families or any(family not in FAMILIES for family in families):
        raise DataError(
            f"families {list(families)} must be a non-empty list of {', '.join(FAMILIES)}: choose from them"
        )
    require("modulus", modulus, MIN_MODULUS, MAX_MODULUS)
    require("variables", variables, MIN_VARIABLES, len(LETTERS))
    require("names", names, variables, len(LETTERS))
    require("constants", constants, 1, modulus)
    least = min(MIN_DEPTH[family] for family in families)
    if not depths or any(not least <= depth <= statements for depth in depths):
        raise DataError(
            f"depths {list(depths)} must be a non-empty list of {least}..{statements} with {statements} "
            f"statements and families {', '.join(families)}: choose from them"
        )


# ---- the task


def traced_document(sample: Sample) -> TracedDocument:
    """`program?X`, the statements as the generator works them out (`CmA4:3,4=C4`), and the value of X.

    The variable precedes its new value as it precedes its first one in the program, so that a small model
    finds both in the same way. The generator's `;` and its repeated query are left out: the separator of
    steps and the question say the same.
    """
    worked = (step.rpartition("=") for step in sample.trace.removesuffix(";").split(";"))
    steps = tuple(f"{work}={work[0]}{value}" for work, _, value in worked)
    return TracedDocument(f"{sample.program}?{sample.question}", steps, str(sample.answer))


def _audit_table(samples: Sequence[Sample]) -> str:
    rows = audit(samples)
    lines = ["depth" + "".join(f"{name:>12}" for name in next(iter(rows.values()), {}))]
    for depth, row in rows.items():
        shares = [f"{value:12.0f}" if name == "samples" else f"{value:12.3f}" for name, value in row.items()]
        lines.append(f"{depth:5d}" + "".join(shares))
    return "\n".join(lines)


@dataclass(frozen=True)
class EvaluationOptions:
    min_depth: int = 1
    max_depth: int = 8
    modulus: int = 7
    variables: int = 5
    statements: int = 12
    names: int = 26
    constants: int = 0  # below which initial ones are; 0: the modulus


def _evaluation_arguments(options: EvaluationOptions) -> dict[str, Any]:
    sizes = dict(vars(options))
    depths = range(sizes.pop("min_depth"), sizes.pop("max_depth") + 1)
    # Families that all depths from 2 on have: an accuracy by depth must not be one by family.
    return {"depths": depths, "families": ("chain", "convergence"), **sizes}


TASK = SyntheticTask(
    name="causal_loop_v2",
    about="causal-loop programs of version 2: straight-line programs of an exact serial depth",
    options=Options,
    generate=generate,
    shortcuts=lambda samples, _: {"one step": [str(one_step_answer(sample)) for sample in samples]},
    labelled=lambda sample: LabelledDocument(*sample.labelled()),
    traced=traced_document,
    audit=_audit_table,
    evaluation=Evaluation(
        chance=lambda options: 1 / options.modulus,
        depth=lambda sample: sample.depth,
        options=EvaluationOptions,
        arguments=_evaluation_arguments,
    ),
    experiment={  # 12 statements, trained on serial depth 1-4, tested to 8
        "data": [
            "sources.0.depths=[1,2,3,4]",
            "sources.0.families=[chain,convergence]",
            "sources.0.names=5",
            "tokenizer.vocab_size=278",  # 4 control pieces + 256 bytes + 5 + 7 + 5 + ?, none merged
        ],
        "examples": 110000,
        "vocab_size": 278,
        "sequence_length": 62,
        "training": ["model.embedding_mixing=4"],
        "layers": 1,
        "steps": 6,
        "trained_depth": 4,
        "evaluation": {
            "num_samples": 4000,
            "task_options": "max_depth=8,names=5",
            "steps": [1, 3, 6, 12, 18, 24],
        },
        "gaps": {
            "3 variables": "max_depth=4,names=5,variables=3",
            "8 statements": "max_depth=4,names=5,statements=8",
            "16 statements": "max_depth=4,names=5,statements=16",
        },
    },
)
