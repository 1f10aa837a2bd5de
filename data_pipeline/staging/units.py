"""Units: input files as read, the stage between the published files and the shards of a build.

A unit is one input file of a source (a generator is one unit without a file). Reading it gives a folder of
arrays under the build's `work/`, whole or absent; any document is then one access away, which the shuffle
needs, and any process of any machine can read any unit.
"""

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.sources.documents import (
    ANSWER_PREFIX,
    AnyDocument,
    Document,
    LabelledDocument,
    TracedDocument,
)

# bytes: of the text in UTF-8, of which `prompt` are the prompt's (a traced document's question)
DOCUMENT_DTYPE = np.dtype([("prompt", "<u8"), ("bytes", "<u8"), ("held_out", "?")])
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
        DataError: documents of several kinds.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    prompts, sizes, held = array("Q"), array("Q"), array("b")
    labels, steps = array("Q"), array("Q")
    kinds: set[type] = set()
    removals: list[Any] = []
    fingerprints: dict[str, list[np.ndarray]] = {}
    with (temporary / TEXTS).open("wb") as file:
        for number, document in enumerate(documents):
            kinds.add(type(document))
            text = document.text.encode()
            digest = hashlib.sha256(f"{salt}/".encode() + text).digest()
            file.write(text)
            sizes.append(len(text))
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
    table = np.zeros(len(sizes), DOCUMENT_DTYPE)
    table["prompt"], table["bytes"], table["held_out"] = prompts, sizes, held
    np.save(temporary / DOCUMENTS, table)
    if LabelledDocument in kinds:
        np.save(temporary / LABELS, _table(labels, LABEL_DTYPE))
    if TracedDocument in kinds:
        np.save(temporary / STEPS, _table(steps, STEP_DTYPE))
    for step, values in fingerprints.items():
        np.save(temporary / f"{step}.npy", np.stack(values))
    if len(kinds) > 1:
        raise DataError(
            f"source {about['source']!r} mixes documents with and without labels: make it two sources"
        )
    (temporary / ABOUT).write_text(json.dumps({**about, "removals": removals}))
    for path in temporary.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    os.replace(temporary, folder)


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


class Unit:
    """Random access to the documents of a unit folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about: dict[str, Any] = json.loads((folder / ABOUT).read_text())
        self.documents = np.load(folder / DOCUMENTS)
        self.labelled = (folder / LABELS).is_file()
        self.traced = (folder / STEPS).is_file()
        self._starts = np.concatenate([[0], np.cumsum(self.documents["bytes"], dtype=np.int64)])
        empty = not self._starts[-1]  # nothing to map
        self._texts = np.zeros(0, np.uint8) if empty else np.memmap(folder / TEXTS, np.uint8, mode="r")
        if self.labelled or self.traced:
            self._rows = np.load(folder / (LABELS if self.labelled else STEPS))
            every = np.arange(len(self.documents) + 1, dtype=np.uint64)
            self._row_starts = np.searchsorted(np.ascontiguousarray(self._rows["document"]), every)

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, number: int) -> AnyDocument:
        start, stop = self._starts[number : number + 2].tolist()
        text = self._texts[start:stop].tobytes()
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
        return any((unit.folder / f"{step}.npy").is_file() for unit in self.units)

    def fingerprints(self, step: str) -> np.ndarray:
        """(documents, ...) of a cleaning step."""
        return np.concatenate([np.load(unit.folder / f"{step}.npy") for unit in self.units if len(unit)])

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
