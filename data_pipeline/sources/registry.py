"""Training text by source kind: the options of each, its files, and the documents in them.

A source is a list of units, one per input file (a synthetic task is one unit without a file), so that
different processes can read different units: `unit_files`, then `read_unit` for each. `read_documents` reads
all of them in order, within the limits of the source.

To add a text source, write its reader in text.py and its record in `TEXT_KINDS`. Published problem sets have
their record in problems.py, synthetic tasks in data_pipeline/tasks/.
"""

import glob
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common.nearest import nearest
from data_pipeline.errors import DataError
from data_pipeline.recipe import structured
from data_pipeline.sources.documents import AnyDocument, Document, TracedDocument
from data_pipeline.sources.files import require_file
from data_pipeline.sources.problems import GSM8K, PROBLEM_SETS
from data_pipeline.sources.published import FixedOptions, ProblemSet
from data_pipeline.sources.remote import expand, fetch, is_url
from data_pipeline.sources.text import read_jsonl, read_parquet, read_text, read_wiki
from data_pipeline.sources.traced import traced_gsm8k, traced_icot, traced_prosqa
from data_pipeline.tasks.registry import TASKS
from data_pipeline.tasks.task import NoOptions, SyntheticTask

CACHE = "cache"  # below the data folder: local copies of URLs


# ---- options of text


@dataclass(frozen=True, kw_only=True)
class FileOptions(FixedOptions):
    files: list[str]  # paths relative to the data folder, URLs, or patterns of either with *


@dataclass(frozen=True)
class TracedOptions(FixedOptions):
    keep_last_step: bool = True  # false: chains of thought end before their last step, as CODI's do


@dataclass(frozen=True)
class TracedFileOptions(FileOptions, TracedOptions):
    pass


@dataclass(frozen=True)
class RowOptions(FileOptions):
    text: str | None = None  # name of the field with the text; "text" if no other is named
    prompt: str | None = None  # or the names of two fields: what is asked,
    completion: str | None = None  # and what follows it as it is, its first space included

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of (text,) or of (prompt, completion). Raises DataError if both or half are named."""
        if self.prompt is None and self.completion is None:
            return (self.text or "text",)
        if self.text is not None or self.prompt is None or self.completion is None:
            raise DataError("name either the field `text` or both `prompt` and `completion`")
        return self.prompt, self.completion


# ---- kinds of text: options, files, reader


class Kind(NamedTuple):
    options: type  # dataclass of what a recipe may say
    files: Callable[[Any], Sequence[str]]  # of the options
    read: Callable[[Any, Any], Iterator[AnyDocument]]  # (file of the unit, options)


def _named_files(options: FileOptions) -> Sequence[str]:
    return options.files


def _fixed(*files: str) -> Callable[[Any], Sequence[str]]:
    return lambda options: files


def _texts(read: Callable[[Path], Iterator[str]]) -> Callable[[Path, Any], Iterator[Document]]:
    return lambda path, options: (Document("", text) for text in read(path))


def _rows(read: Callable[[Path, Sequence[str]], Iterator[Document]]) -> Callable[[Path, Any], Any]:
    return lambda path, options: read(path, options.fields)


def _traced(read: Callable[[Path, bool], Iterator[TracedDocument]]) -> Callable[[Path, Any], Iterator[Any]]:
    return lambda path, options: read(path, options.keep_last_step)


TEXT_KINDS = {
    "wiki": Kind(FileOptions, _named_files, _texts(read_wiki)),
    "text": Kind(FileOptions, _named_files, _texts(read_text)),
    "jsonl": Kind(RowOptions, _named_files, _rows(read_jsonl)),
    "parquet": Kind(RowOptions, _named_files, _rows(read_parquet)),
    "gsm8k_equations": Kind(TracedOptions, _fixed(*GSM8K.train), _traced(traced_gsm8k)),
    "icot": Kind(TracedFileOptions, _named_files, _traced(traced_icot)),
    "prosqa": Kind(TracedFileOptions, _named_files, _traced(traced_prosqa)),
}


# ---- kinds of published problem sets: from their records


def _problem_kind(problems: ProblemSet) -> Kind:
    def read(path: Path, options: Any) -> Iterator[Document]:
        found = problems.read_train(path, options) if problems.read_train else problems.read(path)
        return (Document(problem.prompt, problem.target) for problem in found)

    if problems.recipe_names_files:
        return Kind(FileOptions, _named_files, read)
    return Kind(problems.options, _fixed(*problems.train), read)


# ---- kinds of synthetic tasks: from their records


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """What a recipe may set for every synthetic task, in addition to its sizes."""

    num_samples: int
    seed: int = 0
    split: str = "train"


def _synthetic_kinds(task: SyntheticTask[Any]) -> Iterator[tuple[str, Kind]]:
    def kind(document: Callable[[Any, Any], AnyDocument], more: type = NoOptions) -> Kind:
        options = make_dataclass(
            f"{task.name}_options", [], bases=(SampleOptions, task.options, more), frozen=True
        )

        def read(_: None, given: Any) -> Iterator[AnyDocument]:
            for sample in task.samples(given.num_samples, given, given.seed, given.split):
                yield document(sample, given)

        return Kind(options, _fixed(), read)

    labelled, plain, traced = task.labelled, task.plain, task.traced
    assert (labelled is None) != (plain is None), f"{task.name} needs labelled or plain documents, not both"
    if labelled is not None:
        yield task.name, kind(lambda sample, options: labelled(sample))
    if plain is not None:
        yield task.name, kind(plain, task.plain_options)
    if traced is not None:
        yield f"{task.name}_traced", kind(lambda sample, options: traced(sample))


KINDS = {
    **TEXT_KINDS,
    # Sets that the user brings (`files` is empty) are for evaluation only.
    **{problems.name: _problem_kind(problems) for problems in PROBLEM_SETS if problems.files},
    **{name: kind for task in TASKS.values() for name, kind in _synthetic_kinds(task)},
}


def _parse(kind: str, options: Mapping[str, Any]) -> tuple[Kind, Any]:
    if kind not in KINDS:
        raise DataError(f"unknown source kind {kind!r}; {nearest(kind, list(KINDS))}")
    parsed: Any = structured(KINDS[kind].options, options, f"options of source kind {kind!r}")
    if isinstance(parsed, FileOptions) and not parsed.files:
        raise DataError(f"options of source kind {kind!r}: files is empty: name at least one")
    if isinstance(parsed, RowOptions):
        assert parsed.fields  # finds a wrong set of names before any file is read
    return KINDS[kind], parsed


# ---- files


def input_files(kind: str, options: Mapping[str, Any]) -> list[str]:
    """The files of a source as its options name them: paths relative to the data folder, URLs, patterns.

    Raises DataError for an unknown kind or option.
    """
    entry, parsed = _parse(kind, options)
    return list(entry.files(parsed))


def local_files(kind: str, options: Mapping[str, Any], root: Path, cache: Path | None = None) -> list[Path]:
    """The files of a source on this machine, in reading order; URLs are fetched into `cache` (root/cache).

    Patterns are replaced by what they match, sorted. Raises DataError as `input_files` does, for a file that
    does not exist or cannot be fetched, a pattern without a match and a file that is named twice.
    """
    root, found = Path(root), []
    for file in input_files(kind, options):
        if is_url(file):
            found += [fetch(url, Path(cache or root / CACHE)) for url in expand(file)]
        else:
            found += [require_file(path) for path in _matches(root, file)]
    for path, count in Counter(found).items():
        if count > 1:
            raise DataError(f"{path} is named {count} times: name it once in the files of this source")
    return found


def _matches(root: Path, file: str) -> list[Path]:
    if not glob.has_magic(file) or (root / file).exists():
        return [root / file]
    found = sorted(path for name in glob.glob(file, root_dir=root) if (path := root / name).is_file())
    if not found:
        raise DataError(f"{root / file} matches no file: fix the pattern")
    return found


# ---- documents


def unit_files(
    kind: str, options: Mapping[str, Any], root: Path, cache: Path | None = None
) -> list[Path | None]:
    """One entry for each unit of a source: its file (see `local_files`), or None for a synthetic task."""
    return [*local_files(kind, options, root, cache)] or [None]


def read_unit(
    kind: str, options: Mapping[str, Any], paths: Sequence[Path | None], number: int
) -> Iterator[AnyDocument]:
    """The documents of unit `number` of `paths`, the `unit_files` of the source; training files only.

    If the unit alone exceeds the limits of its source, reading stops after the first document too many:
    that is enough for `within_limits` to decide over all units.
    """
    entry, parsed = _parse(kind, options)
    limits = _Limits(parsed)
    for document in entry.read(paths[number], parsed):
        yield document
        if not limits.admit(document):
            return


def read_documents(
    kind: str, root: Path, options: Mapping[str, Any], cache: Path | None = None
) -> Iterator[AnyDocument]:
    """Training text of a source, one document at a time, within its limits.

    Raises DataError for an unknown kind or option and for a missing or damaged file.
    """
    paths = unit_files(kind, options, root, cache)
    limits = _Limits(_parse(kind, options)[1])
    for number in range(len(paths)):
        for document in read_unit(kind, options, paths, number):
            if not limits.admit(document):
                return
            yield document


def within_limits(kind: str, options: Mapping[str, Any], sizes: Iterable[int]) -> int:
    """How many documents of a source its limits keep; `sizes` are their UTF-8 bytes, unit after unit."""
    limits = _Limits(_parse(kind, options)[1])
    count = 0
    for size in sizes:
        if not limits.admit_bytes(size):
            break
        count += 1
    return count


class _Limits:
    """What is left of max_documents and max_bytes."""

    def __init__(self, options: Any) -> None:
        limited = isinstance(options, FixedOptions)
        self._documents = options.max_documents if limited else None
        self._bytes = options.max_bytes if limited else None

    def admit(self, document: AnyDocument) -> bool:
        return self.admit_bytes(0 if self._bytes is None else len(document.text.encode()))

    def admit_bytes(self, size: int) -> bool:
        if self._documents is not None:
            self._documents -= 1
        if self._bytes is not None:
            self._bytes -= size
        return (self._documents is None or self._documents >= 0) and (self._bytes is None or self._bytes >= 0)
