"""What cleaning removed from each source, and why: numbers and a few examples."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import xxhash

from common.files import write_file

EXAMPLES = 3  # of each source, step and reason
EXAMPLE_CHARACTERS = 200


class Removed(NamedTuple):
    """The key under which the report counts removed documents."""

    source: str
    step: str  # one of recipe.CLEANING_STEPS
    reason: str  # the rule, "duplicate", or the evaluation set


class CleaningReport:
    """Counts of documents and bytes (UTF-8) per source, step and reason, with examples.

    Each unit of work makes its own; `merge` adds them up. The result does not depend on the order or the
    grouping of the merges: the examples are the texts with the smallest hashes.
    """

    def __init__(self) -> None:
        self._read: dict[str, tuple[int, int]] = {}  # source -> (documents, bytes)
        self._removed: dict[Removed, tuple[int, int]] = {}
        self._examples: dict[Removed, list[tuple[int, str, str]]] = {}  # (hash, text, what it matched)

    def read(self, source: str, documents: int, size: int) -> None:
        """Count `documents`, `size` bytes in total, that went into cleaning."""
        self._read[source] = _sum(self._read.get(source), (documents, size))

    def remove(self, removed: Removed, documents: int, size: int) -> None:
        """Count `documents`, `size` bytes in total, that were removed."""
        self._removed[removed] = _sum(self._removed.get(removed), (documents, size))

    def example(self, removed: Removed, text: str, matched: str) -> None:
        """Offer a removed text as an example; `matched`: the words, the duplicate's text, or ""."""
        key = xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))
        shown = (key, text[:EXAMPLE_CHARACTERS], matched[:EXAMPLE_CHARACTERS])
        self._examples[removed] = sorted([*self._examples.get(removed, ()), shown])[:EXAMPLES]

    def merge(self, other: "CleaningReport") -> None:
        for source, numbers in other._read.items():
            self.read(source, *numbers)
        for removed, numbers in other._removed.items():
            self.remove(removed, *numbers)
        for removed, examples in other._examples.items():
            self._examples[removed] = sorted(self._examples.get(removed, []) + examples)[:EXAMPLES]

    def to_json(self) -> str:
        """The report as sorted JSON; `from_json` reads it back completely."""
        sources = {
            source: {"documents": documents, "bytes": size, "removed": []}
            for source, (documents, size) in sorted(self._read.items())
        }
        for removed, (documents, size) in sorted(self._removed.items()):
            examples = [
                {"hash": f"{key:016x}", "text": text, "matched": matched}
                for key, text, matched in self._examples.get(removed, [])
            ]
            entry = {"step": removed.step, "reason": removed.reason, "documents": documents, "bytes": size}
            removals = sources[removed.source]["removed"]
            assert isinstance(removals, list)
            removals.append(entry | {"examples": examples})
        return json.dumps(sources, indent=1) + "\n"

    @classmethod
    def from_json(cls, data: str) -> "CleaningReport":
        report = cls()
        for source, values in json.loads(data).items():
            report.read(source, values["documents"], values["bytes"])
            for entry in values["removed"]:
                removed = Removed(source, entry["step"], entry["reason"])
                report.remove(removed, entry["documents"], entry["bytes"])
                report._examples[removed] = [
                    (int(example["hash"], 16), example["text"], example["matched"])
                    for example in entry["examples"]
                ]
        return report

    def table(self) -> str:
        """The numbers, one per line, with their share of what was read, then the examples."""
        lines = [f"{'source':20} {'step':13} {'reason':34} {'documents':>10} {'':>7} {'bytes':>14} {'':>7}"]
        for source, total in sorted(self._read.items()):
            removals = [(removed, n) for removed, n in sorted(self._removed.items()) if removed[0] == source]
            rows = [("read", "", total), *((removed.step, removed.reason, n) for removed, n in removals)]
            gone = [sum(column) for column in zip((0, 0), *(n for _, n in removals), strict=True)]
            rows.append(("stays", "", (total[0] - gone[0], total[1] - gone[1])))
            for step, reason, (documents, size) in rows:
                counts = (
                    f"{documents:10d} {100 * documents / max(1, total[0]):6.2f}% "
                    f"{size:14d} {100 * size / max(1, total[1]):6.2f}%"
                )
                lines.append(f"{source:20} {step:13} {reason:34} {counts}")
        return "\n".join([*lines, "", *self._shown()]) + "\n"

    def _shown(self) -> Iterator[str]:
        for removed, examples in sorted(self._examples.items()):
            yield f"{removed.source}, {removed.step}, {removed.reason}:"
            for _, text, matched in examples:
                yield f"  {text!r}"
                if matched:
                    yield f"    matched {matched!r}"

    def write(self, folder: Path) -> None:
        """Write cleaning.json and cleaning.txt into `folder`."""
        write_file(Path(folder) / "cleaning.json", self.to_json().encode())
        write_file(Path(folder) / "cleaning.txt", self.table().encode())


def _sum(a: tuple[int, int] | None, b: tuple[int, int]) -> tuple[int, int]:
    return (a[0] + b[0], a[1] + b[1]) if a else b
