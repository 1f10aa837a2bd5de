"""Finds the held-out problems of the published sets (sources/problems.py) in training text.

A document is contaminated by a problem if it holds a run of `ngram_words` (13, as GPT-3, Brown et al. 2020,
appendix C) consecutive words of it, or the whole problem where that is shorter, down to MIN_WORDS. Case,
punctuation, symbols and white space do not count (ngrams.py). What is compared of a problem:

- The question without its choices, or the passage it is about; with the question if the passage is below
  `ngram_words`. LogiQA's questions alone ("Which of the following, if true, most weakens the argument?") are
  the phrases of every such test.
- The worked answer of a problem without choices (GSM8K).
- Story and question of a templated set (bAbI). They are put together from some hundred sentences, so that 13
  words of a test story are in nearly every training story: here a run is STORY_WORDS words. Numbers are left
  out on both sides, so that the published files with their line numbers, answers in between, are found too.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.cleaning.ngrams import ngram_hashes, normalised_words, word_hashes
from data_pipeline.sources.documents import Problem
from data_pipeline.sources.problems import PROBLEM_SETS

NGRAM_WORDS = 13
# A shorter problem is not looked for (294 of ARC's 4417): "Which of these is a mineral?" is in honest text.
MIN_WORDS = 8
STORY_WORDS = 32
_LABEL = re.compile(r"^(?:Passage|Question|Problem|Choices|Answer):|^[A-D]\. ", re.MULTILINE)

# What a Decontaminator reads, relative to the data folder.
EVALUATION_FILES = tuple(file for problem_set in PROBLEM_SETS for file in problem_set.held_out)


class Match(NamedTuple):
    """Why a document is contaminated."""

    set: str  # ProblemSet.name
    problem: str  # Problem.id
    kind: str  # "ngram", a run of words out of the problem, or "question", the whole of a short one
    words: str  # the words both have, normalised


class Decontaminator:
    """An index of the held-out problems under the data folder `root`.

    Raises DataError as their readers do, for a missing or damaged file.
    """

    def __init__(self, root: Path, ngram_words: int = NGRAM_WORDS) -> None:
        root = Path(root)
        self._problems = _Runs(_problem_texts(root, ngram_words), ngram_words)
        self._stories = _Runs(_story_texts(root), STORY_WORDS)

    def match(self, text: str) -> Match | None:
        """The first problem that contaminates `text`; n-grams before whole questions, stories last."""
        words = normalised_words(text)
        hashes = word_hashes(words)
        if match := self._problems.match(words, hashes):
            return match
        number = np.fromiter(map(str.isdecimal, words), bool, len(words))
        if not self._stories.may_match(hashes[~number]):
            return None
        return self._stories.match([word for word in words if not word.isdecimal()], hashes[~number])


class _Named(NamedTuple):
    set: str
    problem: str
    words: list[str]


def _problems(root: Path, templated: bool) -> Iterator[tuple[str, Problem]]:
    """(name of the set, problem) of the held-out files."""
    for problem_set in PROBLEM_SETS:
        if problem_set.templated == templated:
            for file in problem_set.held_out:
                yield from ((problem_set.name, problem) for problem in problem_set.read(root / file))


def _parts(problem: Problem) -> list[str]:
    """What follows each label of the prompt: passage, question, choices."""
    return [part for part in _LABEL.split(problem.prompt) if part.strip()]


def _problem_texts(root: Path, ngram_words: int) -> Iterator[_Named]:
    for name, problem in _problems(root, templated=False):
        asked, *others = _parts(problem)
        words = normalised_words(asked)
        if problem.prompt.startswith("Passage:") and len(words) < ngram_words:
            words += normalised_words(others[0])
        yield _Named(name, problem.id, words)
        answer = [] if problem.choices else normalised_words(problem.target)
        if len(answer) >= ngram_words:  # a shorter one is a handful of numbers
            yield _Named(name, problem.id, answer)


def _story_texts(root: Path) -> Iterator[_Named]:
    """Each problem as it is asked, with and without the label "Question:", and each whole story as it is
    published, with its questions and answers in between.

    Where a story continues from problem to problem, only the new runs are given.
    """
    before, story, published = "", list[str](), _Named("", "", [])
    for name, problem in _problems(root, templated=True):
        passage, question = _parts(problem)
        if not before or not passage.startswith(before):
            yield published
            before, story, published = "", [], _Named(name, problem.id, [])
        added, ask = normalised_words(passage[len(before) :]), normalised_words(question)
        runs = story[max(0, len(story) - STORY_WORDS + 1) :] + added
        yield _Named(name, problem.id, runs + ask)
        if len(runs + ask) >= MIN_WORDS:  # not with the help of the label
            yield _Named(name, problem.id, [*runs, "question", *ask])
        published.words.extend(added + ask + normalised_words(problem.target))
        before, story = passage, story + added
    yield published


class _Runs:
    """The runs of `length` words of some texts, and texts from MIN_WORDS to length - 1 words as a whole."""

    def __init__(self, texts: Iterable[_Named], length: int) -> None:
        self._length = length
        self._names: list[tuple[str, str]] = []
        by_size: dict[int, tuple[list[str], list[int]]] = {}  # words and their text, one text after the other
        for text in texts:
            size = min(length, len(text.words))
            if size >= MIN_WORDS:
                words, owners = by_size.setdefault(size, ([], []))
                words += text.words
                owners += [len(self._names)] * len(text.words)
                self._names.append((text.set, text.problem))
        self._runs, some = {}, []
        for size in sorted(by_size, reverse=True):
            hashes, owned_by = word_hashes(by_size[size][0]), np.array(by_size[size][1], np.int32)
            self._runs[size] = _Grams(*_within(hashes, owned_by, size))
            some.append(_within(hashes, owned_by, MIN_WORDS)[0])
        starts = np.concatenate(some)
        self._some = _Grams(starts, np.zeros(len(starts), np.int32))

    def may_match(self, hashes: np.ndarray) -> bool:
        """Whether words with these `hashes` (W,) hold MIN_WORDS words of any text, without which no match."""
        return len(self._some.find(ngram_hashes(hashes, MIN_WORDS))[0]) > 0

    def match(self, words: list[str], hashes: np.ndarray) -> Match | None:
        if not self.may_match(hashes):
            return None
        for size, grams in self._runs.items():
            positions, owners = grams.find(ngram_hashes(hashes, size))
            if len(positions):
                kind = "ngram" if size == self._length else "question"
                start = int(positions[0])
                name, problem = self._names[owners[0]]
                return Match(name, problem, kind, " ".join(words[start : start + size]))
        return None


def _within(hashes: np.ndarray, owners: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The n-grams of words of one owner each, and that owner; `hashes`, `owners` (W,)."""
    whole = owners[: len(owners) - n + 1] == owners[n - 1 :]
    return ngram_hashes(hashes, n)[whole], owners[: len(owners) - n + 1][whole]


class _Grams:
    """A set of 64-bit hashes, each with the first owner it was given with."""

    def __init__(self, grams: np.ndarray, owners: np.ndarray) -> None:
        self._grams, first = np.unique(grams, return_index=True)
        self._owners = owners[first]
        # Nearly every hash that is looked up is absent: a table of its first bits says so without a search.
        self._shift = np.uint64(64 - 4 - len(self._grams).bit_length())
        self._table = np.zeros(16 << len(self._grams).bit_length(), bool)
        self._table[self._grams >> self._shift] = True

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(positions in `hashes` (W,) that are in the set, ascending; their owners)."""
        positions = np.flatnonzero(self._table[hashes >> self._shift])
        candidates = np.searchsorted(self._grams, hashes[positions])
        candidates[candidates == len(self._grams)] = 0
        found = self._grams[candidates] == hashes[positions]
        return positions[found], self._owners[candidates[found]]
