"""Training text by source kind: the options of each, its files, and the documents in them.

A source is a list of units, one for each input file (a synthetic task is one unit without a file), so that
different processes can read different units: `unit_files`, then `read_unit` for each. `read_documents` is
all of them in a row, within the limits of the source.
"""

import glob
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import MISSING

from common.nearest import nearest
from data_pipeline.errors import DataError
from data_pipeline.recipe import structured
from data_pipeline.sources.documents import AnyDocument, Document, LabelledDocument, Problem, TracedDocument
from data_pipeline.sources.files import require_file
from data_pipeline.sources.problems import read_arc, read_babi, read_gsm8k, read_logiqa
from data_pipeline.sources.remote import expand, fetch, is_url
from data_pipeline.sources.text import read_jsonl, read_parquet, read_text, read_wiki
from data_pipeline.sources.traced import traced_causal_loop_v2, traced_gsm8k, traced_icot, traced_prosqa
from data_pipeline.tasks import addition, causal_loop, causal_loop_v2, p_hop

CACHE = "cache"  # below the data folder: local copies of URLs


# ---- options


@dataclass(frozen=True)
class FixedOptions:
    """Options of a kind whose training files are fixed, so that a test file cannot get into a corpus."""

    max_documents: int | None = None
    max_bytes: int | None = None  # UTF-8 bytes; reading stops before the document that would exceed it


@dataclass(frozen=True)
class BabiOptions(FixedOptions):
    size: str = "en-10k"  # or en


@dataclass(frozen=True)
class FileOptions(FixedOptions):
    files: list[str] = MISSING  # paths relative to the data folder, URLs, or patterns of either with *


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


@dataclass(frozen=True)
class CausalLoopOptions:
    num_samples: int = MISSING
    levels: list[int] = field(default_factory=lambda: list(causal_loop.LEVELS))
    seed: int = 0
    trace_fraction: float = 0.75  # share of documents with the worked trace


@dataclass(frozen=True)
class PHopOptions:
    num_samples: int = MISSING
    hops: int = 3
    length: int = 24  # characters
    alphabet: int = 4  # letters
    seed: int = 0
    split: str = "train"


@dataclass(frozen=True)
class CausalLoopV2Options:
    num_samples: int = MISSING
    depths: list[int] = field(default_factory=lambda: list(range(1, 9)))
    families: list[str] = field(default_factory=lambda: list(causal_loop_v2.FAMILIES))
    modulus: int = 7
    variables: int = 5
    statements: int = 12
    names: int = 26
    constants: int = 0
    seed: int = 0
    split: str = "train"


@dataclass(frozen=True)
class AdditionOptions:
    num_samples: int = MISSING
    operands: int = 8
    modulus: int = 10
    seed: int = 0
    split: str = "train"


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
        raise DataError(f"{root / file} matches no file: mend the pattern")
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


# ---- kinds


class _Kind(NamedTuple):
    options: type
    files: Callable[[Any], Sequence[str]]  # of the options
    read: Callable[[Any, Any], Iterator[AnyDocument]]  # (file of the unit, options)


def _parse(kind: str, options: Mapping[str, Any]) -> tuple[_Kind, Any]:
    if kind not in KINDS:
        raise DataError(f"unknown source kind {kind!r}; {nearest(kind, list(KINDS))}")
    parsed: Any = structured(KINDS[kind].options, options, f"options of source kind {kind!r}")
    if isinstance(parsed, RowOptions):
        assert parsed.fields  # finds a wrong set of names before any file is read
    return KINDS[kind], parsed


def _problems(read: Callable[[Path], Iterator[Problem]]) -> Callable[[Path, Any], Iterator[Document]]:
    return lambda path, _: (Document(p.prompt, p.target) for p in read(path))


def _texts(read: Callable[[Path], Iterator[str]]) -> Callable[[Path, Any], Iterator[Document]]:
    return lambda path, _: (Document("", text) for text in read(path))


def _rows(read: Callable[[Path, Sequence[str]], Iterator[Document]]) -> Callable[[Path, Any], Any]:
    return lambda path, options: read(path, options.fields)


def _read_babi_documents(path: Path, options: BabiOptions) -> Iterator[Document]:
    return (Document(p.prompt, p.target) for p in read_babi(path, "train", options.size))


def _read_causal_loop(_: None, options: CausalLoopOptions) -> Iterator[Document]:
    for sample in causal_loop.generate(options.num_samples, options.levels, options.seed, "train"):
        yield Document(*causal_loop.training_document(sample, options.trace_fraction))


def _read_p_hop(_: None, o: PHopOptions) -> Iterator[LabelledDocument]:
    for sample in p_hop.generate(o.num_samples, o.hops, o.length, o.alphabet, o.seed, o.split):
        yield LabelledDocument(sample.text, sample.labels)


def _read_addition(_: None, o: AdditionOptions) -> Iterator[LabelledDocument]:
    for sample in addition.generate(o.num_samples, o.operands, o.modulus, o.seed, o.split):
        yield LabelledDocument(sample.text, sample.labels)


def _causal_loop_v2_samples(o: CausalLoopV2Options) -> Iterator[causal_loop_v2.Sample]:
    size = (o.modulus, o.variables, o.statements, o.names, o.constants)
    return causal_loop_v2.generate(o.num_samples, o.depths, o.families, *size, o.seed, o.split)


def _read_causal_loop_v2(_: None, options: CausalLoopV2Options) -> Iterator[LabelledDocument]:
    return (LabelledDocument(*sample.labelled()) for sample in _causal_loop_v2_samples(options))


def _read_causal_loop_v2_traced(_: None, options: CausalLoopV2Options) -> Iterator[TracedDocument]:
    return map(traced_causal_loop_v2, _causal_loop_v2_samples(options))


def _traced(read: Callable[[Path, bool], Iterator[TracedDocument]]) -> Callable[[Path, Any], Iterator[Any]]:
    return lambda path, options: read(path, options.keep_last_step)


_ARC_TRAIN = ("arc/ARC-Easy-Train.jsonl", "arc/ARC-Challenge-Train.jsonl")
KINDS = {
    "gsm8k": _Kind(FixedOptions, lambda _: ("gsm8k/train.jsonl",), _problems(read_gsm8k)),
    "arc": _Kind(FixedOptions, lambda _: _ARC_TRAIN, _problems(read_arc)),
    "babi": _Kind(BabiOptions, lambda _: ("babi/tasks_1-20_v1-2.tar.gz",), _read_babi_documents),
    "logiqa": _Kind(FileOptions, lambda options: options.files, _problems(read_logiqa)),
    "wiki": _Kind(FileOptions, lambda options: options.files, _texts(read_wiki)),
    "text": _Kind(FileOptions, lambda options: options.files, _texts(read_text)),
    "jsonl": _Kind(RowOptions, lambda options: options.files, _rows(read_jsonl)),
    "parquet": _Kind(RowOptions, lambda options: options.files, _rows(read_parquet)),
    "causal_loop": _Kind(CausalLoopOptions, lambda _: (), _read_causal_loop),
    "p_hop": _Kind(PHopOptions, lambda _: (), _read_p_hop),
    "causal_loop_v2": _Kind(CausalLoopV2Options, lambda _: (), _read_causal_loop_v2),
    "gsm8k_equations": _Kind(TracedOptions, lambda _: ("gsm8k/train.jsonl",), _traced(traced_gsm8k)),
    "icot": _Kind(TracedFileOptions, lambda options: options.files, _traced(traced_icot)),
    "prosqa": _Kind(TracedFileOptions, lambda options: options.files, _traced(traced_prosqa)),
    "causal_loop_v2_traced": _Kind(CausalLoopV2Options, lambda _: (), _read_causal_loop_v2_traced),
    "addition": _Kind(AdditionOptions, lambda _: (), _read_addition),
}
