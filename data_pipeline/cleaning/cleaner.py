"""The cleaning of a build: what each document shows on its own, and what only all of them show together.

A source of the recipe names its steps (`cleaning: [exact, near, quality, decontaminate]`). Quality and
contamination are judged as a file is read. Duplicates are found once all files are read, among all the
sources that name the step; the first stays, in the order of the recipe's sources and of their files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.cleaning.decontaminate import Decontaminator
from data_pipeline.cleaning.dedup import Duplicates, exact_hash, keep_exact, keep_near, signature
from data_pipeline.cleaning.quality import first_failure
from data_pipeline.cleaning.report import CleaningReport, Removed
from data_pipeline.recipe import CleaningRecipe
from data_pipeline.staging.units import Units


class Removal(NamedTuple):
    """Why a document is removed."""

    document: int
    step: str
    reason: str
    matched: str  # words of the evaluation set, or ""


@dataclass(frozen=True)
class Cleaner:
    """Judges each document of a file as it is read."""

    steps: Sequence[str]
    recipe: CleaningRecipe
    root: Path  # folder of the evaluation sets

    def judge(self, number: int, text: str) -> Removal | None:
        if "quality" in self.steps and (rule := first_failure(text, self.recipe.quality)):
            return Removal(number, "quality", rule, "")
        if "decontaminate" in self.steps:
            match = _decontaminator(self.root, self.recipe.ngram_words).match(text)
            if match:
                return Removal(number, "decontaminate", f"{match.set} {match.kind}", match.words)
        return None

    def fingerprints(self, text: str) -> dict[str, np.ndarray]:
        """By step, what identifies a duplicate."""
        functions = {"exact": exact_hash, "near": signature}
        return {step: function(text) for step, function in functions.items() if step in self.steps}


@cache
def _decontaminator(root: Path, ngram_words: int) -> Decontaminator:
    return Decontaminator(root, ngram_words)


def choose(
    units: dict[str, Units], admitted: dict[str, int], recipe: CleaningRecipe
) -> tuple[dict[str, np.ndarray], CleaningReport]:
    """Which documents stay.

    Args:
        admitted: source -> how many documents its limits let in.

    Returns:
        Source -> mask of its documents (admitted,) bool; and the report.
    """
    report, kept = CleaningReport(), {}
    for name, source in units.items():
        kept[name] = np.ones(admitted[name], dtype=bool)
        sizes = source.column("bytes")[: admitted[name]]
        report.read(name, len(sizes), int(sizes.sum()))
        for number, step, reason, matched in source.removals():
            if number < admitted[name]:
                kept[name][number] = False
                _report(report, Removed(name, step, reason), source, number, matched)
    for step in ("exact", "near"):
        _remove_duplicates(step, units, kept, recipe, report)
    return kept, report


def _remove_duplicates(
    step: str,
    units: dict[str, Units],
    kept: dict[str, np.ndarray],
    recipe: CleaningRecipe,
    report: CleaningReport,
) -> None:
    names = [name for name, source in units.items() if source.has(step)]
    if not names:
        return
    # (source, number) and fingerprint of each document that is left, all sources end to end.
    numbers = {name: np.flatnonzero(kept[name]) for name in names}
    owners = [(name, number) for name in names for number in numbers[name].tolist()]
    prints = np.concatenate([units[name].fingerprints(step)[numbers[name]] for name in names])
    found: Duplicates = keep_exact(prints) if step == "exact" else keep_near(prints, recipe.near_threshold)
    for index in np.flatnonzero(~found.keep).tolist():
        (name, number), (first_name, first) = owners[index], owners[int(found.duplicate_of[index])]
        kept[name][number] = False
        original = units[first_name][first].text
        _report(report, Removed(name, step, "duplicate"), units[name], number, original)


def _report(report: CleaningReport, removed: Removed, source: Units, number: int, matched: str) -> None:
    text = source[number].text
    report.remove(removed, 1, len(text.encode()))
    report.example(removed, text, matched)
