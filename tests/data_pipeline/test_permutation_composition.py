from collections import Counter
from itertools import permutations, product

import numpy as np
import pytest
from sympy.combinatorics import Permutation, PermutationGroup

from data_pipeline.errors import DataError
from data_pipeline.tasks.labelled import BLOCK
from data_pipeline.tasks.permutation_composition import (
    Options,
    generate,
    is_odd,
    parse,
    shortcuts,
    symmetric_group,
)

SIZES = [(5, 2, 12), (5, 3, 20), (4, 2, 7), (3, 8, 30)]


def read(text: str, points: int) -> tuple[dict[str, tuple[int, ...]], int, str]:
    """Permutations as tuples from 0, start point and word."""
    definitions, rest = text.split(":")
    parts = [definitions[i : i + points + 1] for i in range(0, len(definitions), points + 1)]
    return {p[0]: tuple(int(c) - 1 for c in p[1:]) for p in parts}, int(rest[0]) - 1, rest[1:]


def brute_force(text: str, points: int) -> dict[int, str]:
    """Labels from whole products of permutations, not from following a point."""
    elements, start, word = read(text, points)
    composed = tuple(range(points))
    labels = {}
    for i, letter in enumerate(word):
        composed = tuple(elements[letter][composed[x]] for x in range(points))
        labels[len(text) - len(word) + i] = str(composed[start] + 1)
    return labels


def canonical(text: str, points: int) -> tuple:
    """The least text of all namings of points, with letters named in the order of their definitions."""
    elements, start, word = read(text, points)
    place = {letter: k for k, letter in enumerate(elements)}
    renamed = []
    for s in permutations(range(points)):
        back = {s[x]: x for x in range(points)}
        moved = tuple(tuple(s[g[back[y]]] for y in range(points)) for g in elements.values())
        renamed.append((moved, s[start]))
    return (*min(renamed), tuple(place[letter] for letter in word))


@pytest.mark.parametrize(("points", "generators", "length"), SIZES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_equal_brute_force(points, generators, length, split):
    samples = list(generate(200, points, generators, length, 3, split))
    assert len({sample.id for sample in samples}) == len(samples) == 200
    for sample in samples:
        elements, _, word = read(sample.text, points)
        assert set(elements) == set("abcdefgh"[:generators])
        assert all(sorted(images) == list(range(points)) for images in elements.values())
        assert len(word) == length
        assert dict(sample.labels) == brute_force(sample.text, points)
        assert list(sample.labels) == sorted(sample.labels)
        assert sample.labels[-1] == (len(sample.text) - 1, sample.answer)


def test_worked_example():
    assert brute_force("a25134b31254:3abba", 5) == {14: "1", 15: "3", 16: "2", 17: "5"}


@pytest.mark.parametrize("split", ["train", "test"])
def test_longer_runs_begin_with_the_shorter(split):
    long = list(generate(BLOCK + 5, 5, 2, 12, 0, split))
    for count in (0, 1, BLOCK - 1, BLOCK, BLOCK + 3):
        assert list(generate(count, 5, 2, 12, 0, split)) == long[:count]
    assert long[:50] != list(generate(50, 5, 2, 12, 1, split))


def test_splits_are_disjoint_up_to_the_names_of_letters_and_points():
    """Of the shortest words, so that all texts occur."""
    train, test = (
        {canonical(s.text, 3) for s in generate(10_000, 3, 2, 2, 0, split)} for split in ("train", "test")
    )
    assert test
    assert not train & test
    elements = list(permutations(range(3)))
    every = {
        canonical(f"a{''.join(str(x + 1) for x in a)}b{''.join(str(x + 1) for x in b)}:{start}{word}", 3)
        for a, b in product(elements, elements)
        if PermutationGroup([Permutation(a), Permutation(b)]).order() >= 3
        for start in "123"
        for word in ("aa", "ab", "ba", "bb")
    }
    assert train | test == every


@pytest.mark.parametrize("points", [3, 4, 5])
def test_pairs_are_those_that_generate_the_group(points):
    group = symmetric_group(points)
    pairs = {(int(a), int(b)) for a, b in group.pairs}
    every = list(product(range(len(group.images)), repeat=2))
    rng = np.random.default_rng(0)
    for a, b in every if points < 5 else [every[i] for i in rng.integers(len(every), size=300)]:
        order = PermutationGroup([Permutation(group.images[i].tolist()) for i in (a, b)]).order()
        assert ((a, b) in pairs) == (order >= len(group.images) // 2)


@pytest.mark.parametrize(("points", "generators", "length"), SIZES)
def test_every_text_generates_at_least_the_alternating_group(points, generators, length):
    for sample in generate(100, points, generators, length, 5):
        elements, _, _ = read(sample.text, points)
        group = PermutationGroup([Permutation(images) for images in elements.values()])
        assert group.order() >= len(symmetric_group(points).images) // 2
        if points == 5:
            assert not group.is_solvable


def test_labels_are_uniform_and_shortcuts_fail_as_the_audit_says():
    samples = list(generate(10_000, 5, 2, 12, 0))
    for counts in (
        Counter(s.answer for s in samples),
        Counter(label for s in samples for _, label in s.labels),
    ):
        assert set(counts) == set("12345")
        assert all(0.185 < count / counts.total() < 0.215 for count in counts.values())
    right = {
        name: np.mean([guess == s.answer for guess, s in zip(given, samples, strict=True)])
        for name, given in shortcuts(samples, Options()).items()
    }
    assert right["start"] < 0.22
    assert right["last letter"] < 0.22
    assert right["parity"] < 0.23
    assert 0.2 < right["any order"] < 0.29
    long = list(generate(10_000, 5, 2, 40, 0))
    any_order = shortcuts(long, Options(length=40))["any order"]
    assert np.mean([guess == s.answer for guess, s in zip(any_order, long, strict=True)]) < 0.22


def test_parity_is_that_of_the_product():
    for sample in generate(100, 5, 3, 9, 0):
        elements, _, word = read(sample.text, 5)
        product_of_word = Permutation(range(5))
        for letter in word:
            product_of_word = product_of_word * Permutation(elements[letter])
        assert is_odd(parse(sample.text)) == product_of_word.is_odd


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 2, 2, 12, 0), "points 2 is not in 3..5"),
        ((1, 6, 2, 12, 0), "points 6"),
        ((1, 5, 1, 12, 0), "generators 1 is not in 2..8"),
        ((1, 5, 9, 12, 0), "generators 9"),
        ((1, 5, 2, 0, 0), "length 0 is not in 1.."),
        ((-1, 5, 2, 12, 0), "num_samples -1"),
        ((1, 5, 2, 12, 0, "dev"), "split 'dev' is not one of train, test"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message):
    with pytest.raises(DataError, match=message) as error:
        list(generate(*arguments))
    assert "\n" not in str(error.value)
