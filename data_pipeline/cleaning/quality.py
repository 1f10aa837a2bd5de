"""Heuristic quality rules: which texts are prose, and which are menus, logs, key lists or repetitions.

The rules are those of Gopher (Rae et al. 2021, arXiv 2112.11446, section A.1.1 and table A1), one of C4
(Raffel et al. 2020) and one of FineWeb (Penedo et al. 2024, arXiv 2406.17557, section 3.6). `RULES` is their
table. They are meant for running text; leave them out for a source of short questions and answers.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

import numpy as np

from data_pipeline.cleaning.ngrams import MULTIPLIER, word_hashes

_SYMBOL = re.compile(r"#|\.\.\.|…")
_BULLETS = tuple("-*•‣▪●◦·–")  # Gopher leaves open which; a hyphen is the usual one in plain text
_STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
_PARAGRAPH = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class QualityLimits:
    """The limit of each rule of RULES, by its name. The published value unless a comment says otherwise."""

    min_words: int = 50
    # Gopher: 100,000, against machine-made pages of the web. Half of LitBank's novels are longer.
    max_words: int = 1_000_000
    min_mean_word_length: float = 3.0
    max_mean_word_length: float = 10.0
    max_symbols_per_word: float = 0.1
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_alphabetic_words: float = 0.8
    min_stop_words: int = 2  # English: 0 for other languages
    # Gopher: 0.3, which takes the speaker names of a play and the \begin{proof} of LaTeX for repetition.
    max_duplicate_lines: float = 0.5
    max_duplicate_line_characters: float = 0.2
    max_duplicate_paragraphs: float = 0.3
    max_duplicate_paragraph_characters: float = 0.2
    max_top_2gram: float = 0.2
    max_top_3gram: float = 0.18
    max_top_4gram: float = 0.16
    max_duplicate_5grams: float = 0.15
    max_duplicate_6grams: float = 0.14
    max_duplicate_7grams: float = 0.13
    max_duplicate_8grams: float = 0.12
    max_duplicate_9grams: float = 0.11
    max_duplicate_10grams: float = 0.1
    max_lorem_ipsum: int = 0
    max_short_lines: float = 0.67


class _Text:
    """What the rules measure, computed when first asked for. Words are what white space separates."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        return self.text.split()

    @cached_property
    def lengths(self) -> np.ndarray:
        """Characters of each word: (W,) int64."""
        return np.fromiter(map(len, self.words), np.int64, len(self.words))

    @cached_property
    def characters(self) -> int:
        """Without white space, as all shares of characters below are."""
        return max(1, int(self.lengths.sum()))

    @property
    def mean_word_length(self) -> float:
        return self.characters / max(1, len(self.words))

    @cached_property
    def lines(self) -> list[str]:
        return [stripped for line in self.text.splitlines() if (stripped := line.strip())]

    @cached_property
    def paragraphs(self) -> list[str]:
        return [stripped for part in _PARAGRAPH.split(self.text) if (stripped := part.strip())]

    def share_of_words(self, has: Callable[[str], bool]) -> float:
        return sum(map(has, self.words)) / max(1, len(self.words))

    def share_of_lines(self, has: Callable[[str], bool]) -> float:
        return sum(map(has, self.lines)) / max(1, len(self.lines))

    @cached_property
    def repeats(self) -> dict[int, tuple[float, float]]:
        """n -> (share of characters of the n-gram that takes most of them, share in repeated n-grams).

        A word counts as repeated if it is in an n-gram that occurred before; the first occurrence does
        not count, and overlaps count once. An n-gram that occurs once takes none.
        """
        count, hashes = len(self.words), word_hashes(self.words)
        before = np.concatenate([[0], np.cumsum(self.lengths)])  # characters before each word
        positions, grams = np.arange(count), hashes
        shares = {}
        for n in range(2, 11):
            inside = positions + n <= count
            positions = positions[inside]
            grams = grams[inside] * MULTIPLIER + hashes[positions + n - 1]
            _, first, inverse, times = np.unique(
                grams, return_index=True, return_inverse=True, return_counts=True
            )
            starts = positions[first]
            taken = (times * (before[starts + n] - before[starts]))[times > 1]
            later = np.delete(positions, first)
            edges = np.bincount(later, minlength=count + 1) - np.bincount(later + n, minlength=count + 1)
            repeated = self.lengths[np.cumsum(edges)[:count] > 0].sum()
            shares[n] = (float(taken.max(initial=0)) / self.characters, float(repeated) / self.characters)
            # A repeated (n+1)-gram begins with a repeated n-gram: the others need not be looked at again.
            again = times[inverse] > 1
            positions, grams = positions[again], grams[again]
        return shares


def _duplicates(parts: list[str]) -> float:
    """Share of `parts` that equal an earlier part."""
    return 1 - len(set(parts)) / max(1, len(parts))


def _duplicate_characters(parts: list[str]) -> float:
    total = sum(map(len, parts))
    return (total - sum(map(len, set(parts)))) / max(1, total)


class Rule(NamedTuple):
    """A text fails it if its measure is below a limit `min_...` or above a limit `max_...`."""

    limit: str  # the field of QualityLimits, and the rule's name in reports
    formula: str
    source: str
    measure: Callable[[_Text], float]


def _repetition(n: int, kind: str) -> Rule:
    if kind == "top":
        formula = f"characters of the {n}-gram with most of them, all its occurrences / characters"
        return Rule(f"max_top_{n}gram", formula, "Gopher", lambda t: t.repeats[n][0])
    formula = f"characters of words inside a {n}-gram that occurred before / characters"
    return Rule(f"max_duplicate_{n}grams", formula, "Gopher", lambda t: t.repeats[n][1])


# In the order they are tried, cheap ones first. Characters do not count white space, but inside lines and
# paragraphs. Left out: C4's rule on curly brackets and FineWeb's on lines without final punctuation, for they
# remove code and formulas.
RULES = (
    Rule("min_words", "words", "Gopher", lambda t: len(t.words)),
    Rule("max_words", "words", "Gopher", lambda t: len(t.words)),
    Rule("min_mean_word_length", "characters / words", "Gopher", lambda t: t.mean_word_length),
    Rule("max_mean_word_length", "characters / words", "Gopher", lambda t: t.mean_word_length),
    Rule("max_lorem_ipsum", "occurrences of 'lorem ipsum'", "C4",
         lambda t: t.text.lower().count("lorem ipsum")),
    Rule("min_stop_words", "different words of the, be, to, of, and, that, have, with", "Gopher",
         lambda t: len(_STOP_WORDS.intersection(map(str.lower, t.words)))),
    Rule("max_symbols_per_word", "(hashes + ellipses) / words", "Gopher",
         lambda t: len(_SYMBOL.findall(t.text)) / max(1, len(t.words))),
    Rule("min_alphabetic_words", "words with a letter / words", "Gopher",
         lambda t: t.share_of_words(lambda word: any(map(str.isalpha, word)))),
    Rule("max_bullet_lines", "lines that begin with a bullet / lines", "Gopher",
         lambda t: t.share_of_lines(lambda line: line.startswith(_BULLETS))),
    Rule("max_ellipsis_lines", "lines that end with an ellipsis / lines", "Gopher",
         lambda t: t.share_of_lines(lambda line: line.endswith(("...", "…")))),
    Rule("max_short_lines", "lines below 30 characters / lines", "FineWeb",
         lambda t: t.share_of_lines(lambda line: len(line) < 30)),
    Rule("max_duplicate_lines", "lines that occurred before / lines", "Gopher",
         lambda t: _duplicates(t.lines)),
    Rule("max_duplicate_line_characters", "their characters / characters", "Gopher",
         lambda t: _duplicate_characters(t.lines)),
    Rule("max_duplicate_paragraphs", "paragraphs that occurred before / paragraphs", "Gopher",
         lambda t: _duplicates(t.paragraphs)),
    Rule("max_duplicate_paragraph_characters", "their characters / characters", "Gopher",
         lambda t: _duplicate_characters(t.paragraphs)),
    *(_repetition(n, "top") for n in (2, 3, 4)),
    *(_repetition(n, "duplicate") for n in range(5, 11)),
)  # fmt: skip
assert sorted(rule.limit for rule in RULES) == sorted(f.name for f in fields(QualityLimits))


def first_failure(text: str, limits: QualityLimits) -> str | None:
    """The name of the first rule of RULES that `text` breaks, None if it keeps all."""
    measured = _Text(text)
    for rule in RULES:
        value, limit = rule.measure(measured), getattr(limits, rule.limit)
        if value < limit if rule.limit.startswith("min_") else value > limit:
            return rule.limit
    return None
