"""Units: input files as read, the stage between the published files and the shards of a build.

A unit is one input file of a source (a generator is one unit without a file). Reading it gives a folder of
arrays under the build's `work/`, whole or absent; any document is then one access away, which the shuffle
needs, and any process of any machine can read any unit. Everything that is read back is compared with a
checksum first.
"""

import hashlib
import os
import shutil
import zlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.files import sync_folder
from data_pipeline.errors import DataError
from data_pipeline.sources.documents import (
    ANSWER_PREFIX,
    AnyDocument,
    Document,
    LabelledDocument,
    TracedDocument,
)
from data_pipeline.staging.sealed import damaged, read_array, read_sealed, write_array, write_sealed

# bytes: of the text in UTF-8, of which `prompt` are the prompt's (a traced document's question); crc32: its
DOCUMENT_DTYPE = np.dtype([("prompt", "<u8"), ("bytes", "<u8"), ("held_out", "?"), ("crc32", "<u4")])
LABEL_DTYPE = np.dtype([("document", "<u8"), ("index", "<u4"), ("character", "<u4")])
# One row per step of a traced document; bytes: of the step in UTF-8
STEP_DTYPE = np.dtype([("document", "<u8"), ("bytes", "<u8")])
TEXTS, DOCUMENTS, ABOUT = "texts.bin", "documents.npy", "about.json"
LABELS, STEPS = "labels.npy", "steps.npy"  # if the documents have them


class Judge(Protocol):
    """What is asked about each document while it is read, see cleaner.Cleaner."""

    def judge(self, number: int, text: str) -> Any: ...
    def fingerprints(self, text: str) -> dict[str, np.ndarray]: ...


def write_unit(
    folder: Path,
    documents: Iterable[AnyDocument],
    about: dict[str, Any],
    salt: str,
    held_out: float,
    cleaner: Judge,
) -> None:
    """Write documents as a unit; `Unit.about` returns `about` with the removals added.

    Equal texts of one `salt` are held out together, a share `held_out` of all.

    Raises:
        DataError: documents of several kinds, or whose file cannot be read.
        OSError: the folder cannot be written.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _write(temporary, _readable(documents, about), about, salt, held_out, cleaner)
        sync_folder(temporary)
        os.replace(temporary, folder)
        sync_folder(folder.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(error.errno, error.strerror or str(error), str(folder)) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _readable(documents: Iterable[AnyDocument], about: dict[str, Any]) -> Iterator[AnyDocument]:
    """The documents, without an OSError that would read as one of the unit's folder."""
    try:
        yield from documents
    except OSError as error:
        where = error.filename or about.get("file")
        raise DataError(f"{where} cannot be read ({error.strerror or error}): check its disk") from error


def _write(
    folder: Path,
    documents: Iterable[AnyDocument],
    about: dict[str, Any],
    salt: str,
    held_out: float,
    cleaner: Judge,
) -> None:
    prompts, sizes, held, checksums = array("Q"), array("Q"), array("b"), array("Q")
    labels, steps = array("Q"), array("Q")
    kinds: set[type] = set()
    removals: list[Any] = []
    fingerprints: dict[str, list[np.ndarray]] = {}
    with (folder / TEXTS).open("wb") as file:
        for number, document in enumerate(documents):
            kinds.add(type(document))
            text = document.text.encode()
            digest = hashlib.sha256(f"{salt}/".encode() + text).digest()
            file.write(text)
            sizes.append(len(text))
            checksums.append(zlib.crc32(text))
            prompts.append(len(_prompt(document).encode()))
            held.append(int.from_bytes(digest[:8], "big") < held_out * 2**64)
            if removal := cleaner.judge(number, document.text):
                removals.append(removal)
            for step, value in cleaner.fingerprints(document.text).items():
                fingerprints.setdefault(step, []).append(value)
            if isinstance(document, LabelledDocument):
                for index, character in document.labels:
                    labels.extend((number, index, ord(character)))
            if isinstance(document, TracedDocument):
                for step in document.steps:
                    steps.extend((number, len(step.encode())))
        file.flush()
        os.fsync(file.fileno())
    if len(kinds) > 1:
        raise DataError(
            f"source {about['source']!r} mixes documents with and without labels: make it two sources"
        )
    table = np.zeros(len(sizes), DOCUMENT_DTYPE)
    table["prompt"], table["bytes"], table["held_out"], table["crc32"] = prompts, sizes, held, checksums
    arrays = {DOCUMENTS: table}
    if LabelledDocument in kinds:
        arrays[LABELS] = _table(labels, LABEL_DTYPE)
    if TracedDocument in kinds:
        arrays[STEPS] = _table(steps, STEP_DTYPE)
    for step, values in fingerprints.items():
        arrays[f"{step}.npy"] = np.stack(values)
    written = {name: write_array(folder / name, values) for name, values in arrays.items()}
    write_sealed(folder / ABOUT, {**about, "removals": removals, "arrays": written})


def _prompt(document: AnyDocument) -> str:
    if isinstance(document, TracedDocument):
        return document.question
    return document.prompt if isinstance(document, Document) else ""


def _table(values: array, dtype: np.dtype) -> np.ndarray:
    """The structured array with these values, flattened row by row."""
    names = dtype.names or ()
    columns = np.array(values, dtype=np.uint64).reshape(-1, len(names))
    table = np.zeros(len(columns), dtype)
    for name, column in zip(names, columns.T, strict=True):
        table[name] = column
    return table


def about_unit(folder: Path) -> dict[str, Any]:
    """What `write_unit` was told of the unit. Raises DataError for a damaged one."""
    about: dict[str, Any] = read_sealed(folder / ABOUT)
    return about


class Unit:
    """Random access to the documents of a unit folder."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError for a unit that was damaged; a text is compared when it is read."""
        self.folder = folder
        self.about = about_unit(folder)
        self.documents = self.array(DOCUMENTS)
        self.labelled, self.traced = self.has(LABELS), self.has(STEPS)
        self._starts = np.concatenate([[0], np.cumsum(self.documents["bytes"], dtype=np.int64)])
        texts, size = folder / TEXTS, int(self._starts[-1])
        found = texts.stat().st_size if texts.is_file() else None
        if found != size:
            raise damaged(texts, f"it has {found} bytes, its documents {size}")
        # nothing to map where all are empty
        self._texts = np.memmap(texts, np.uint8, mode="r") if size else np.zeros(0, np.uint8)
        if self.labelled or self.traced:
            self._rows = self.array(LABELS if self.labelled else STEPS)
            every = np.arange(len(self.documents) + 1, dtype=np.uint64)
            self._row_starts = np.searchsorted(np.ascontiguousarray(self._rows["document"]), every)

    def has(self, name: str) -> bool:
        """Whether it has an array of that name."""
        return name in self.about["arrays"]

    def array(self, name: str) -> np.ndarray:
        """The array, compared with its checksum."""
        return read_array(self.folder / name, self.about["arrays"][name])

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, number: int) -> AnyDocument:
        start, stop = self._starts[number : number + 2].tolist()
        text = self._texts[start:stop].tobytes()
        if zlib.crc32(text) != self.documents["crc32"][number]:
            raise damaged(self.folder / TEXTS, f"the checksum of document {number} differs")
        prompt = int(self.documents["prompt"][number])
        if not self.labelled and not self.traced:
            return Document(text[:prompt].decode(), text[prompt:].decode())
        first, last = self._row_starts[number : number + 2].tolist()
        rows = self._rows[first:last]
        if self.traced:
            return _traced(text, prompt, rows["bytes"].tolist())
        labels = zip(rows["index"].tolist(), map(chr, rows["character"].tolist()), strict=True)
        return LabelledDocument(text.decode(), tuple(labels))


def _traced(text: bytes, start: int, sizes: list[int]) -> TracedDocument:
    """The document with this `text`, whose steps, of `sizes` bytes, begin at `start`."""
    steps, begin = [], start
    for size in sizes:
        steps.append(text[begin : begin + size].decode())
        begin += size + 1
    begin = max(start, begin - 1)  # no space after the last step
    return TracedDocument(
        text[:start].decode(), tuple(steps), text[begin:].decode().removeprefix(f"{ANSWER_PREFIX} ")
    )


class Units:
    """The documents of a source, its units end to end."""

    def __init__(self, folders: list[Path]) -> None:
        self.units = [Unit(folder) for folder in folders]
        self.starts = np.concatenate([[0], np.cumsum([len(unit) for unit in self.units])]).astype(np.int64)

    def __getitem__(self, number: int) -> AnyDocument:
        unit = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.units[unit][number - int(self.starts[unit])]

    def column(self, name: str) -> np.ndarray:
        """(documents,) of DOCUMENT_DTYPE."""
        return np.concatenate([unit.documents[name] for unit in self.units])

    def has(self, step: str) -> bool:
        """Whether there are fingerprints of that cleaning step."""
        return any(unit.has(f"{step}.npy") for unit in self.units)

    def fingerprints(self, step: str) -> np.ndarray:
        """(documents, ...) of a cleaning step."""
        return np.concatenate([unit.array(f"{step}.npy") for unit in self.units if len(unit)])

    def removals(self) -> Iterator[tuple[int, str, str, str]]:
        """(document, step, reason, matched words) of what was found wrong while reading."""
        for unit, start in zip(self.units, self.starts.tolist(), strict=False):
            for number, *why in unit.about["removals"]:
                yield start + number, *why

    def is_labelled(self, source: str) -> bool:
        kinds = {unit.labelled for unit in self.units if len(unit)}
        if len(kinds) > 1:
            raise DataError(f"source {source!r} mixes documents with and without labels: make it two sources")
        return kinds == {True}
