"""Answers kept while an evaluation runs, so that an interrupted one resumes bit-exactly.

`unfinished_<digest>.jsonl` in the output folder: the first line holds the fingerprint of everything that the
answers depend on, each further line the answers of one batch and their sha256, so that the second run has the
same batches as the first. A torn last line, normal after a kill, is cut off; any other damaged line is named
and stays in the file, and its batch is computed again.
"""

import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.files import writing_failed
from common.locks import FolderLock
from eval.scoring.inference import Answer

PATTERN = "unfinished_*.jsonl"


def checkpoint_fingerprint(checkpoint: Path) -> dict[str, str]:
    """sha256 of the folder's files, on which a score depends, by name. Raises OSError if one cannot be
    read.
    """
    found = {}
    for path in sorted(path for path in checkpoint.iterdir() if path.is_file()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def request_key(*parts: Any) -> str:
    """sha256 of a request: its kind, token ids and all else that its answer depends on."""
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()


class Journal:
    """The answers by request key. One process at a time holds the file."""

    def __init__(self, path: Path, file: io.FileIO, lock: FolderLock) -> None:
        self.path, self._file, self._lock = path, file, lock
        self._answers: dict[str, Answer] = {}

    @classmethod
    def open(cls, folder: Path, fingerprint: Mapping[str, Any]) -> "Journal":
        """The journal of this fingerprint, created if it is missing.

        Others in the folder, of another checkpoint or command, are left alone and named in one printed
        line each, as are damaged lines. Raises FolderInUseError if another process writes to it.
        """
        first = json.dumps(fingerprint, sort_keys=True)
        path = folder / PATTERN.replace("*", hashlib.sha256(first.encode()).hexdigest()[:16])
        folder.mkdir(parents=True, exist_ok=True)
        for other in sorted(folder.glob(PATTERN)):
            if other != path:
                print(f"{other} belongs to another checkpoint or command: not used, delete it if stale")
        fix = "choose another --output_path"
        lock = FolderLock(folder, "an evaluation of the same settings", fix, name=f".{path.name}.lock")
        file = io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+")
        lines = file.readall().split(b"\n")[:-1]  # what follows the last line's end is torn
        file.seek(sum(len(line) + 1 for line in lines))
        file.truncate()
        journal = cls(path, file, lock)
        if not lines:
            journal._write(first.encode())
        damaged = [1] if lines and lines[0] != first.encode() else []  # the file's name says whose it is
        for number, line in enumerate(lines[1:], 2):
            if (answers := _answers(line)) is None:
                damaged.append(number)
            else:
                journal._answers |= answers
        for number in damaged:
            print(f"{path} line {number} is damaged: it is not used, what it held is computed again")
        if journal._answers:
            print(f"{path}: {len(journal._answers)} answers of an interrupted evaluation are reused")
        return journal

    @property
    def kept(self) -> str:
        """What is safe, and how to go on."""
        return f"{len(self._answers)} answers are kept in {self.path}, the same command resumes from them"

    def get(self, key: str) -> Answer | None:
        return self._answers.get(key)

    def put(self, answers: Mapping[str, Answer]) -> None:
        """Writes the answers of a batch. Raises OSError for a full disk: what was written before is kept."""
        text = _text(answers)
        self._write(f'{{"sha256":"{_sha256(text)}","answers":{text}}}'.encode())
        self._answers |= answers

    def _write(self, line: bytes) -> None:
        rest = memoryview(line + b"\n")
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise writing_failed(error, self.path, self.kept) from error

    def close(self, finished: bool) -> None:
        """Gives the file back, and deletes it if its answers are no longer needed."""
        if finished:
            self.path.unlink()
        self._file.close()
        self._lock.release()


def _answers(line: bytes) -> dict[str, Answer] | None:
    """The answers of a line; None if it is damaged."""
    try:
        record = json.loads(line)
        answers = {key: Answer(*answer) for key, answer in record["answers"].items()}
        return answers if record["sha256"] == _sha256(_text(answers)) else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _text(answers: Mapping[str, Answer]) -> str:
    return json.dumps(answers, separators=(",", ":"))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
