"""Answers kept while an evaluation runs, so that an interrupted one resumes bit-exactly.

`unfinished_<digest>.jsonl` in the output folder: the first line holds the fingerprint of everything that the
answers depend on, each further line the answers of one batch. A line is written in one call, so that a batch
is there as a whole or not at all, and the second run has the same batches as the first.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

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

    def __init__(self, path: Path, file: IO[bytes], answers: dict[str, Answer]) -> None:
        self.path, self._file, self._answers = path, file, answers

    @classmethod
    def open(cls, folder: Path, fingerprint: Mapping[str, Any]) -> "Journal":
        """The journal of this fingerprint, created if it is missing; a torn last line is cut off.

        Others in the folder, of another checkpoint or command, are left alone and named in one printed
        line each. Raises ValueError if another process writes to it.
        """
        first = json.dumps(fingerprint, sort_keys=True)
        path = folder / PATTERN.replace("*", hashlib.sha256(first.encode()).hexdigest()[:16])
        folder.mkdir(parents=True, exist_ok=True)
        for other in sorted(folder.glob(PATTERN)):
            if other != path:
                print(f"{other} belongs to another checkpoint or command: not used, delete it if stale")
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(
                f"{path} is in use by another evaluation of the same settings: wait for it or choose another"
                " --output_path"
            ) from None
        lines = file.read().split(b"\n")[:-1]  # what follows the last line's end is torn
        file.seek(sum(len(line) + 1 for line in lines))
        file.truncate()
        if not lines:
            file.write(first.encode() + b"\n")
            file.flush()
        answers: dict[str, Answer] = {}
        for line in lines[1:]:
            answers |= {key: Answer(*answer) for key, answer in json.loads(line).items()}
        if answers:
            print(f"{path}: {len(answers)} answers of an interrupted evaluation are reused")
        return cls(path, file, answers)

    def get(self, key: str) -> Answer | None:
        return self._answers.get(key)

    def put(self, answers: Mapping[str, Answer]) -> None:
        """Writes the answers of a batch, whole."""
        self._file.write(json.dumps(answers, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        self._answers |= answers

    def close(self, finished: bool) -> None:
        """Releases the file, and deletes it if its answers are no longer needed."""
        if finished:
            self.path.unlink()
        self._file.close()
