"""Intervals, corrections and verdicts, against published tables, enumeration and the text of the rules."""

import math
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from experiments.reporting.statistics import (
    Interval,
    Rule,
    bootstrap_interval,
    decide,
    estimate,
    holm_adjusted,
    holm_levels,
    p_value,
    percentiles,
    resampled_means,
    resampled_seeds_and_samples,
    student_inside,
    student_quantile,
)

HIGHER = Rule("higher", (0.0,), 0.05)
NOT_LOWER = Rule("not_lower", (-0.05,), 0.05)
WITHIN = Rule("within", (0.5, 1.0))
RULES = st.sampled_from([HIGHER, NOT_LOWER, WITHIN, Rule("within", (0.2, 0.95))])
EFFECTS = st.lists(st.floats(-1, 1), min_size=3, max_size=5)


@pytest.mark.parametrize(
    ("inside", "degrees", "t"),  # Abramowitz and Stegun, table 26.10
    [
        (0.95, 1, 12.706),
        (0.95, 2, 4.303),
        (0.99, 2, 9.925),
        (0.95, 3, 3.182),
        (0.95, 4, 2.776),
        (0.999, 4, 8.610),
        (0.9, 9, 1.833),
    ],
)
def test_quantiles_of_student_are_those_of_the_table(inside, degrees, t):
    assert student_quantile(inside, degrees) == pytest.approx(t, abs=6e-4)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 8])
def test_student_is_the_integral_of_its_density(degrees):
    x = np.linspace(-1.7, 1.7, 20001)
    scale = math.gamma((degrees + 1) / 2) / math.sqrt(degrees * math.pi) / math.gamma(degrees / 2)
    area = np.trapezoid(scale * (1 + x**2 / degrees) ** (-(degrees + 1) / 2), x)
    assert student_inside(1.7, degrees) == pytest.approx(area, abs=1e-8)


def shares(values: np.ndarray) -> dict[float, float]:
    found, counts = np.unique(np.round(values, 9), return_counts=True)
    return dict(zip(found.tolist(), (counts / len(values)).tolist(), strict=True))


def assert_same_distribution(drawn: np.ndarray, all_draws: list[float]) -> None:
    """Within 5 standard errors of 9,999 draws."""
    exact, seen = shares(np.array(all_draws)), shares(drawn)
    assert set(seen) <= set(exact)
    for value, share in exact.items():
        assert seen.get(value, 0.0) == pytest.approx(share, abs=5 * math.sqrt(share / 9999))


def test_resampled_means_are_those_of_all_resamples():
    values = [0.1, 0.2, 0.7]
    assert_same_distribution(resampled_means(values), [sum(draw) / 3 for draw in product(values, repeat=3)])


def test_seeds_and_samples_are_drawn_together():
    """Against all 2^2 x 3^3 draws: a sample that is drawn is drawn for all seeds."""
    outcomes = np.array([[1.0, 0.0, -1.0], [1.0, 1.0, 0.0]])
    everything = [
        float(outcomes[np.ix_(rows, columns)].mean())
        for rows in product(range(2), repeat=2)
        for columns in product(range(3), repeat=3)
    ]
    assert_same_distribution(resampled_seeds_and_samples(outcomes), everything)


def test_the_bootstrap_of_three_seeds_is_their_range():
    """1 of 27 resamples is three times the least: more than 2.5 %."""
    assert bootstrap_interval([0.4, 0.1, 0.2]) == pytest.approx((0.1, 0.4))


def test_percentiles_beyond_the_draws_are_infinite():
    draws = np.arange(1.0, 100.0)  # 99: the tails of 2 % are one draw each
    assert percentiles(draws, 0.02) == (1.0, 99.0)
    assert percentiles(draws, 0.019) == (-math.inf, math.inf)


@given(st.lists(st.sampled_from([0.0, 0.001, 0.004, 0.01, 0.02, 0.03, 0.05, 0.2, 1.0]), max_size=6))
def test_holm_is_the_closure_of_bonferroni(p_values):
    """A test is rejected if every set of tests that contains it is, by the set's least p times its size."""
    adjusted, levels = holm_adjusted(p_values), holm_levels(p_values)
    for i, p in enumerate(p_values):
        others = [q for j, q in enumerate(p_values) if j != i]
        sets = [[p, *some] for n in range(len(others) + 1) for some in combinations(others, n)]
        exact = max(min(1.0, len(some) * min(some)) for some in sets)
        assert adjusted[i] == pytest.approx(exact)
        if abs(exact - 0.05) > 1e-9:
            assert (p <= levels[i]) == (exact < 0.05)


@settings(max_examples=60, deadline=None)
@given(EFFECTS, RULES, st.sampled_from([0.05, 0.01, 0.002]))
def test_an_interval_decides_where_its_p_value_says(values, rule, alpha):
    found = estimate(values)
    bounds = (*rule.threshold, rule.minimum_effect, -rule.minimum_effect)
    assume(all(abs(found.mean - bound) > 1e-9 for bound in bounds))  # beyond rounding
    p = p_value(rule, found)
    if abs(p - alpha) > 1e-9:
        assert (decide(rule, found.mean, found.interval(alpha)) != "undecided") == (p < alpha)


@settings(max_examples=30, deadline=None)
@given(EFFECTS, st.floats(-3, 3))
def test_adding_a_constant_shifts_the_interval(values, constant):
    before, after = (estimate([v + by for v in values]).interval(0.01) for by in (0.0, constant))
    assert after == pytest.approx((before.lo + constant, before.hi + constant), abs=1e-6)


def test_samples_widen_an_interval_and_limits_cut_it():
    same = np.tile([1.0, 0.0, 0.0, 0.0], (3, 1))
    assert estimate([0.25] * 3).interval() == (0.25, 0.25)
    assert estimate([0.25] * 3, same).interval() == (0.0, 0.75)
    wide = [0.7, 0.9, 0.98]
    assert estimate(wide).interval().hi > 1
    assert estimate(wide, limits=Interval(-1, 1)).interval().hi == 1
    assert p_value(Rule("within", (-1.0, 1.0)), estimate(wide, limits=Interval(-1, 1))) == 0


@pytest.mark.parametrize(
    ("rule", "mean", "interval", "verdict"),
    [
        (HIGHER, 0.05, (0.001, 0.1), "supported"),
        (HIGHER, 0.049, (0.001, 0.1), "undecided"),
        (HIGHER, 0.2, (0.0, 0.4), "undecided"),
        (HIGHER, 0.02, (0.01, 0.049), "refuted"),
        (HIGHER, 0.0, (-0.05, 0.05), "undecided"),
        (NOT_LOWER, 0.0, (-0.049, 0.05), "supported"),
        (NOT_LOWER, 0.0, (-0.05, 0.05), "undecided"),
        (NOT_LOWER, -0.1, (-0.2, -0.051), "refuted"),
        (NOT_LOWER, -0.1, (-0.2, -0.05), "undecided"),
        (WITHIN, 0.7, (0.5, 1.0), "supported"),
        (WITHIN, 0.7, (0.49, 0.9), "undecided"),
        (WITHIN, 0.3, (0.1, 0.49), "refuted"),
        (WITHIN, 1.2, (1.1, 1.3), "refuted"),
    ],
)
def test_the_rule_of_the_claims(rule, mean, interval, verdict):
    assert decide(rule, mean, Interval(*interval)) == verdict


def test_the_ends_are_within():
    found = estimate([0.5] * 3)
    assert p_value(WITHIN, found) < 0.05
    assert decide(WITHIN, found.mean, found.interval()) == "supported"


def test_groups_that_differ_by_chance_alone_are_undecided():
    found = estimate([0.12, -0.1, 0.03, -0.06, 0.04])
    for rule in (HIGHER, NOT_LOWER):
        assert decide(rule, found.mean, found.interval()) == "undecided"
        assert p_value(rule, found) > 0.05


def test_false_alarms_of_few_seeds():
    """Without an effect, 5 % of the intervals of 3 seeds exclude 0; of the bootstrap's, 1 in 4."""
    rng = np.random.default_rng(1)
    found = [estimate(list(rng.normal(0, 0.1, 3))) for _ in range(400)]
    alarms, drawn = (
        sum(interval.lo > 0 or interval.hi < 0 for interval in intervals) / len(found)
        for intervals in ([each.interval() for each in found], [percentiles(each.draws) for each in found])
    )
    assert alarms == pytest.approx(0.05, abs=0.03)
    assert drawn == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize("values", [[0.1], [], [0.1, math.nan], [0.1, math.inf]])
def test_values_without_an_interval_are_refused(values):
    with pytest.raises(ValueError, match="2 or more finite values"):
        estimate(values)
