"""Statistics for few seeds: means with intervals, paired differences, and a correction for many tests.

A verdict rests on the wider of two intervals of a mean over seeds. Student's t over the seeds accounts for
how little 3 to 5 values say about their own spread. A bootstrap does not: resampled means stay in the range
of the values, and 3 differences share one sign by chance in one case of 4, 5 differences in one of 16. The
percentile bootstrap over seeds and, where the outcomes of the samples are known, over the test samples too,
accounts for the test set: another one would have given other values. The seeds do not show this, since all
are tested on the same samples. (Percentiles, not BCa: an acceleration estimated from 3 values is noise.)

Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13; Holm, A simple sequentially
rejective multiple test procedure, Scandinavian Journal of Statistics 6, 1979; Student's distribution for
whole degrees of freedom: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

ALPHA = 0.05  # error rate of all tests together
MIN_PAIRS = 3  # fewer are undecided
DRAWS = 9999  # of a bootstrap: (draws + 1) alpha / 2 is an integer for the usual alphas
SEED = 0

Floats = NDArray[np.float64]
Verdict = Literal["supported", "refuted", "undecided"]


class Interval(NamedTuple):
    """From lo to hi, either of them possibly infinite."""

    lo: float
    hi: float


class Rule(NamedTuple):
    """How a claim is decided: see experiments/CLAIMS.md."""

    direction: str  # higher | not_lower | within
    threshold: tuple[float, ...]  # one value; within: least and most
    minimum_effect: float = 0.0


def student_inside(t: float, degrees: int) -> float:
    """P(|T| < t) of Student's distribution with `degrees` of freedom, 1 or more; t >= 0."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(odd, degrees - 1, 2):
        total += term
        term *= cosine**2 * (k + 1) / (k + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def student_quantile(inside: float, degrees: int) -> float:
    """The t with P(|T| < t) = inside, by bisection; `inside` in (0, 1)."""
    low, high = 0.0, 1.0
    while student_inside(high, degrees) < inside:
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if student_inside(middle, degrees) < inside else (low, middle)
    return high


def resampled_means(values: Sequence[float]) -> Floats:
    """(DRAWS,) rising: means of resamples with replacement, of the same size; always the same draws."""
    n = len(values)
    weights = np.random.default_rng(SEED).multinomial(n, [1 / n] * n, size=DRAWS)
    return np.sort(weights @ np.asarray(values, dtype=np.float64) / n)


def resampled_seeds_and_samples(outcomes: Floats) -> Floats:
    """(DRAWS,) rising: means over seeds drawn with replacement and test samples drawn with replacement.

    Args:
        outcomes: (seeds, samples); the samples are the same for all seeds, so a draw takes whole columns.
    """
    seeds, samples = outcomes.shape
    rng = np.random.default_rng(SEED)
    # Equal columns are interchangeable: draw how often each kind occurs, not each column.
    kinds, counts = np.unique(outcomes, axis=1, return_counts=True)
    columns = rng.multinomial(samples, counts / samples, size=DRAWS)
    rows = rng.multinomial(seeds, [1 / seeds] * seeds, size=DRAWS)
    return np.sort(((columns @ kinds.T) * rows).sum(axis=1) / (samples * seeds))


def percentiles(draws: Floats, alpha: float = ALPHA) -> Interval:
    """The percentile interval at level 1 - alpha; infinite where there are too few draws for its tails."""
    tail = math.floor((len(draws) + 1) * alpha / 2)
    if tail < 1:
        return Interval(-math.inf, math.inf)
    return Interval(float(draws[tail - 1]), float(draws[-tail]))


def bootstrap_interval(values: Sequence[float]) -> Interval:
    """95 % interval of a mean over seeds, for tables and figures; for 3 values their minimum and maximum."""
    return percentiles(resampled_means(sorted(values)))


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, of paired differences or single values, and what its intervals are computed from."""

    values: tuple[float, ...]  # one per seed
    draws: Floats  # rising, bootstrapped means
    over_samples: bool
    limits: Interval  # the range of possible values

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / len(self.values)

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds (n - 1)."""
        squares = math.fsum((value - self.mean) ** 2 for value in self.values)
        return math.sqrt(squares / (len(self.values) - 1))

    @property
    def _error(self) -> float:
        return self.deviation / math.sqrt(len(self.values))

    def interval(self, alpha: float = ALPHA) -> Interval:
        """Two-sided, at level 1 - alpha: at each end the wider of the two intervals, within the limits."""
        reach = student_quantile(1 - alpha, len(self.values) - 1) * self._error
        drawn = percentiles(self.draws, alpha)
        least, most = self.limits
        return Interval(
            max(least, min(self.mean - reach, drawn.lo)), min(most, max(self.mean + reach, drawn.hi))
        )

    def p_above(self, bound: float) -> float:
        """The alpha below which the interval at level 1 - alpha no longer lies above `bound`."""
        distance = self.mean - bound
        if distance <= 0:
            return 1.0
        error = self._error
        student = 1 - student_inside(distance / error, len(self.values) - 1) if error else 0.0
        tail = 1 + int(np.searchsorted(self.draws, bound, side="right"))
        return max(student, min(1.0, 2 * tail / (len(self.draws) + 1)))

    def p_below(self, bound: float) -> float:
        """As p_above, for an interval below `bound`."""
        values = tuple(-value for value in self.values)
        return Estimate(values, -self.draws[::-1], self.over_samples, self.limits).p_above(-bound)


ANY = Interval(-math.inf, math.inf)


def estimate(values: Sequence[float], outcomes: Floats | None = None, limits: Interval = ANY) -> Estimate:
    """The estimate from one value per seed.

    Args:
        outcomes: (seeds, samples); the values are its means over the samples.

    Raises:
        ValueError: fewer than 2 values, or one that is not finite.
    """
    if len(values) < 2 or not all(map(math.isfinite, values)):
        raise ValueError(f"an interval needs 2 or more finite values, one per seed, not {list(values)}")
    draws = resampled_means(values) if outcomes is None else resampled_seeds_and_samples(outcomes)
    return Estimate(tuple(values), draws, outcomes is not None, limits)


def decide(rule: Rule, mean: float, interval: Interval) -> Verdict:
    """The table of experiments/CLAIMS.md, line by line."""
    least, most = rule.threshold[0], rule.threshold[-1]
    effect, (lo, hi) = rule.minimum_effect, interval
    supported, refuted = {
        "higher": (mean >= effect and lo > least, hi < effect),
        "not_lower": (lo > least, hi < -effect),
        "within": (lo >= least and hi <= most, hi < least or lo > most),
    }[rule.direction]
    return "supported" if supported else "refuted" if refuted else "undecided"


def p_value(rule: Rule, found: Estimate) -> float:
    """The least alpha at which the interval at level 1 - alpha decides the rule either way.

    Each end of an interval errs with alpha / 2, so both decisions together err with alpha.
    """
    least, most = rule.threshold[0], rule.threshold[-1]
    effect = rule.minimum_effect
    if rule.direction == "higher":
        supported = found.p_above(least) if found.mean >= effect else 1.0
        return min(supported, found.p_below(effect))
    if rule.direction == "not_lower":
        return min(found.p_above(least), found.p_below(-effect))
    # The thresholds are allowed, so the bounds lie just outside; a limit of the metric needs no test.
    above = 0.0 if least <= found.limits.lo else found.p_above(math.nextafter(least, -math.inf))
    below = 0.0 if most >= found.limits.hi else found.p_below(math.nextafter(most, math.inf))
    inside = max(above, below)
    return min(inside, found.p_below(least), found.p_above(most))


def holm_levels(p_values: Sequence[float], alpha: float = ALPHA) -> list[float]:
    """The level of each test by Holm's step-down procedure: all tests together err with alpha.

    All tests with p <= alpha / m are rejected; the remaining m' tests continue at alpha / m' until none is
    rejected. The tests left have the last level. An interval at level 1 - level then decides as Holm's
    procedure does.
    """
    levels = [alpha] * len(p_values)
    left = set(range(len(p_values)))
    while left:
        level = alpha / len(left)
        rejected = {i for i in left if p_values[i] <= level}
        for i in left:
            levels[i] = level
        if not rejected:
            break
        left -= rejected
    return levels


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values: p times the number of tests left at its turn, non-decreasing and at most 1."""
    adjusted, running = [1.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted
