"""What is known of a published data set: where its files come from, and which of them hold which problems."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.sources.documents import Problem

GITHUB = "https://raw.githubusercontent.com"


@dataclass(frozen=True)
class File:
    path: str  # below the data folder
    source: str  # URL, or the name in the data set's archive
    sha256: str


@dataclass(frozen=True)
class DataSet:
    name: str
    licence: str
    homepage: str
    files: tuple[File, ...]  # that download.py fetches; (): the user brings them
    archive: File | None = None  # a zip that holds the files; removed once they are taken out


@dataclass(frozen=True)
class FixedOptions:
    """Options of a kind whose training files are fixed, so that a test file cannot get into a corpus."""

    max_documents: int | None = None
    max_bytes: int | None = None  # UTF-8 bytes; reading stops before the document that would exceed it


@dataclass(frozen=True, kw_only=True)
class ProblemSet(DataSet):
    """A data set of problems; the paths are relative to the data folder.

    One with `files` is also a kind of source for recipes, under its name (registry.py).

    A build's hash covers the files in `held_out`: adding one changes the hash of every recipe that
    decontaminates.
    """

    read: Callable[[Path], Iterator[Problem]]  # the problems of one of the files below
    train: tuple[str, ...]  # may be trained on; exemplars come from here
    test: tuple[str, ...]  # what the evaluation asks
    held_out: tuple[str, ...] = ()  # decontamination removes training documents with problems of these files
    # Put together from some hundred sentences, which honest text shares: decontamination looks for whole
    # stories.
    templated: bool = False
    # As a kind of source: a recipe's options, and the reader of a training file that needs them or holds
    # other splits too; None: `read`.
    options: type = FixedOptions
    read_train: Callable[[Path, Any], Iterator[Problem]] | None = None
    recipe_names_files: bool = False  # instead of `train`


def files_of(folder: str, base: str, sums: str) -> tuple[File, ...]:
    """The files below `base`, a URL or a folder of the archive; `sums` is what sha256sum prints."""
    rows = [line.split() for line in sums.strip().splitlines()]
    return tuple(File(f"{folder}/{Path(name).name}", base + name, sha256) for sha256, name in rows)
