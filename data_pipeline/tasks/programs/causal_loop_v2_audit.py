"""How far guessing gets on causal-loop programs of version 2, and what their text gives away."""

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import correlation

from data_pipeline.tasks.programs.causal_loop_v2_programs import (
    Statement,
    Vector,
    apply_statement,
    depths_of,
    effective_depth,
    live_statements,
    parse,
)
from data_pipeline.tasks.programs.causal_loop_v2_sample import Sample


def one_step_answer(sample: Sample) -> int:
    """A shortcut that should fail: the statement that computes the answer, on initial constants."""
    initial, body = parse(sample.program)
    last = body[live_statements(body, sample.question)[-1]]
    return apply_statement(last, {name: (v,) for name, v in initial.items()}, sample.modulus)[0]


def late_half_answer(sample: Sample) -> int:
    """The best guess of a solver that knows only the deeper half of the computation.

    Every result of depth ceil(depth / 2) or less is replaced by random values, 64 times over; the most common
    answer (the smallest of ties) is the guess. If every operation were a bijection it would be right once in
    p times; it is right more often to the extent that operations forget their input.
    """
    rng = random.Random(sample.id)
    initial, body = parse(sample.program)
    vectors: dict[str, Vector] = {name: (value,) * 64 for name, value in initial.items()}
    for s, depth in zip(body, depths_of(body), strict=True):
        if depth <= (sample.depth + 1) // 2:
            vectors[s.target] = tuple(rng.choices(range(sample.modulus), k=64))
        else:
            vectors[s.target] = apply_statement(s, vectors, sample.modulus)
    counts = Counter(vectors[sample.question])
    return max(sorted(counts), key=counts.__getitem__)


def audit(samples: Iterable[Sample]) -> dict[int, dict[str, float]]:
    """Per depth the shares of samples that shortcuts answer, and what the text gives away.

    samples       their number
    majority      the most common answer of this depth
    one_step      `one_step_answer`
    last_number   the last number in the text
    operator      the best constant for each operator of the statement that computes the answer (fitted on
                  these samples, so a little too good)
    late_half     `late_half_answer`
    position      correlation (Pearson) of the answer with the position of that statement
    plain_dead    programs with dead code in which no later statement reads any of it before it is overwritten
    shortened     programs whose `effective_depth` is below their depth
    """
    by_depth: dict[int, list[Sample]] = {}
    for sample in samples:
        by_depth.setdefault(sample.depth, []).append(sample)
    return {depth: _audit_row(members) for depth, members in sorted(by_depth.items())}


def _audit_row(members: Sequence[Sample]) -> dict[str, float]:
    count = len(members)
    parsed = [parse(s.program) for s in members]
    finals = [live_statements(body, s.question)[-1] for s, (_, body) in zip(members, parsed, strict=True)]
    pairs = Counter(
        (body[i].operator, s.answer) for s, i, (_, body) in zip(members, finals, parsed, strict=True)
    )
    best = {operator: max(n for (o, _), n in pairs.items() if o == operator) for operator, _ in pairs}
    answers = [s.answer for s in members]
    varied = len(set(finals)) > 1 and len(set(answers)) > 1
    shortened = sum(
        effective_depth(initial, body, s.question, s.modulus) < s.depth
        for s, (initial, body) in zip(members, parsed, strict=True)
    )
    return {
        "samples": count,
        "majority": max(Counter(answers).values()) / count,
        "one_step": sum(s.answer == one_step_answer(s) for s in members) / count,
        "last_number": sum(s.answer == int(re.findall("[0-9]+", s.program)[-1]) for s in members) / count,
        "operator": sum(best.values()) / count,
        "late_half": sum(s.answer == late_half_answer(s) for s in members) / count,
        "position": correlation(finals, answers) if varied else 0.0,
        "plain_dead": sum(_plain_dead(s, body) for s, (_, body) in zip(members, parsed, strict=True)) / count,
        "shortened": shortened / count,
    }


def _plain_dead(sample: Sample, body: Sequence[Statement]) -> bool:
    """Whether there is dead code and nothing reads its results."""
    dead = set(range(len(body))) - set(live_statements(body, sample.question))
    writer: dict[str, int] = {}
    read: set[int] = set()
    for index, s in enumerate(body):
        read.update(writer[operand] for operand in s.reads if operand in writer)
        writer[s.target] = index
    return bool(dead) and not dead & read
