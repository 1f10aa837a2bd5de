import re
from collections import Counter
from itertools import product
from math import factorial

import pytest
from sympy.combinatorics import Permutation, PermutationGroup

from data_pipeline.errors import DataError
from data_pipeline.tasks.labelled import BLOCK
from data_pipeline.tasks.modular_exponent import MODULI, TASK, Options, generate, operations, shortcuts

SIZES = [(11, 3, 8, 1, 4), (13, 2, 5, 1, 4), (31, 4, 12, 2, 6), (11, 1, 3, 3, 3)]


def brute_force(text: str, modulus: int) -> tuple[dict[int, str], int]:
    """Labels and depth, from the text alone, by multiplying over and over."""
    digits = "0123456789ABCDEFGHIJKLMNOPQRSTU"
    program, asked = text.split("?")
    initial = re.match(r"([a-z][0-9A-Z])*(?=.\^)", program)
    assert initial is not None
    state = {name: int(value, 36) for name, value in re.findall(r"([a-z])(.)", initial[0])}
    labels, updates, position = {}, Counter[str](), initial.end()
    while position < len(program):
        base, caret, exponent = program[position : position + 3]
        assert caret == "^"
        (name,) = set(base + exponent) & set(state)
        value = 1
        for _ in range(state.get(exponent, 0) or int(exponent, 36)):
            value = value * (state.get(base, 0) or int(base, 36)) % modulus
        state[name] = value
        updates[name] += 1
        position += 3
        labels[position - 1] = digits[value]
    labels[len(text) - 1] = digits[state[asked]]
    return labels, updates[asked]


def canonical(text: str) -> str:
    """The text with its variables renamed in order of appearance."""
    names = list(dict.fromkeys(re.findall("[a-z]", text)))
    return text.translate({ord(name): chr(ord("a") + i) for i, name in enumerate(names)})


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_and_depths_equal_brute_force(sizes, split):
    modulus, variables, statements, min_depth, max_depth = sizes
    samples = list(generate(300, *sizes, 3, split))
    assert len({sample.id for sample in samples}) == 300
    assert TASK.evaluation is not None
    depths = set()
    for sample in samples:
        labels, depth = brute_force(sample.text, modulus)
        assert len(sample.text) == 2 * variables + 3 * statements + 2
        assert dict(sample.labels) == labels
        assert len(labels) == statements + 1
        assert list(sample.labels) == sorted(sample.labels)
        assert sample.labels[-1] == (len(sample.text) - 1, sample.answer)
        assert TASK.evaluation.depth(sample) == depth
        depths.add(depth)
        body = sample.text[2 * variables : -2]
        assert max(Counter(re.findall("[a-z]", body)).values()) <= max_depth
    assert depths == set(range(min_depth, max_depth + 1))


@pytest.mark.parametrize("split", ["train", "test"])
def test_longer_runs_begin_with_the_shorter(split):
    long = list(generate(BLOCK + 5, 11, 3, 8, 1, 4, 0, split))
    for count in (0, 1, BLOCK - 1, BLOCK, BLOCK + 3):
        assert list(generate(count, 11, 3, 8, 1, 4, 0, split)) == long[:count]
    assert long[:50] != list(generate(50, 11, 3, 8, 1, 4, 1, split))


def test_splits_are_disjoint_up_to_the_names_of_variables():
    """Programs of one or two statements, so few that all of them occur."""
    for sizes in ((11, 2, 1, 1, 1), (11, 1, 2, 2, 2)):
        train, test = (
            {canonical(s.text) for s in generate(10_000, *sizes, 0, split)} for split in ("train", "test")
        )
        assert test
        assert not train & test
        if sizes[1] == 1:  # everything there is: a start value and two of seven operations
            statements = ["a^3", "a^7", "a^9", "2^a", "6^a", "7^a", "8^a"]
            every = {f"a{x}{s}{t}?a" for x, s, t in product("123456789A", statements, statements)}
            assert train | test == every
        else:
            assert 0.05 < len(test) / len(train | test) < 0.15


@pytest.mark.parametrize("modulus", MODULI)
def test_statements_permute_the_values_and_generate_a_large_group(modulus):
    """All permutations or all even ones: a solvable group would make the chain less deep than it looks."""
    known = operations(modulus)
    moves = known.results[:, 1:].astype(int) - 1
    for number, exponential, row in zip(known.number.tolist(), known.exponential, moves, strict=True):
        assert sorted(row) == list(range(modulus - 1))
        for x in range(1, modulus):
            expected = number**x if exponential else x**number
            assert row[x - 1] + 1 == expected % modulus
    group = PermutationGroup([Permutation(row.tolist()) for row in moves])
    assert group.order() in (factorial(modulus - 1), factorial(modulus - 1) // 2)


def test_answers_are_uniform_and_shortcuts_fail_as_the_audit_says():
    samples = list(generate(10_000, 11, 3, 8, 1, 4, 0))
    answers = Counter(s.answer for s in samples)
    assert set(answers) == set("123456789A")
    assert all(0.09 < count / 10_000 < 0.11 for count in answers.values())
    depths = [brute_force(s.text, 11)[1] for s in samples]
    guesses = shortcuts(samples, Options())
    right = {
        name: {
            at: sum(g == s.answer for g, s, d in zip(given, samples, depths, strict=True) if d == at)
            / depths.count(at)
            for at in range(1, 5)
        }
        for name, given in guesses.items()
    }
    assert right["one step"][1] == right["reversed"][1] == 1
    assert all(right["one step"][d] < 0.16 for d in (2, 3, 4))
    assert all(right["last number"][d] < 0.13 for d in (1, 2, 3, 4))
    assert right["reversed"][2] < 0.4
    assert right["reversed"][4] < 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 7, 3, 8, 1, 4, 0), "modulus 7 is not one of 11, 13"),
        ((1, 11, 0, 8, 1, 4, 0), "variables 0 is not in 1..26"),
        ((1, 11, 27, 8, 1, 4, 0), "variables 27"),
        ((1, 11, 3, 8, 0, 4, 0), "min_depth 0 is not in 1..4"),
        ((1, 11, 3, 8, 5, 4, 0), "min_depth 5"),
        ((1, 11, 3, 8, 1, 9, 0), "max_depth 9 is not in 1..8"),
        ((1, 11, 2, 8, 1, 4, 0), r"statements 8 are more than 1 \+ 1 \* 4"),
        ((-1, 11, 3, 8, 1, 4, 0), "num_samples -1"),
        ((1, 11, 3, 8, 1, 4, 0, "dev"), "split 'dev' is not one of train, test"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message):
    with pytest.raises(DataError, match=message) as error:
        list(generate(*arguments))
    assert "\n" not in str(error.value)
