"""What the generators of reasoning tasks share: their two splits and their command line."""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from common.errors import user_errors
from data_pipeline.errors import DataError

S = TypeVar("S")

SPLITS = ("train", "test")
TEST_SHARE = 0.1  # of all canonical samples


def check_request(num_samples: int, split: str) -> None:
    """Raises DataError for an unknown split and a negative count."""
    if split not in SPLITS:
        raise DataError(f"split {split!r} is not one of {', '.join(SPLITS)}: choose one of them")
    if num_samples < 0:
        raise DataError(f"num_samples {num_samples} is negative: give 0 or more")


def hashed_split(canonical: bytes) -> str:
    """ "train" or "test": a fixed share of the sha256 of a canonical sample."""
    bucket = int.from_bytes(hashlib.sha256(canonical).digest()[:8], "big")
    return "test" if bucket < TEST_SHARE * 2**64 else "train"


def parser(description: str, counted: str = "", audited: str = "") -> argparse.ArgumentParser:
    """The options that every generator has; counted and audited: what their help says besides."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--num_samples", type=int, required=True, help=f"number of samples{counted}")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--split", choices=SPLITS, default="train")
    result.add_argument("--out", type=Path, help="JSONL file to write; without it nothing is written")
    result.add_argument("--audit", action="store_true", help=f"print how far guessing gets{audited}")
    return result


def run(
    arguments: argparse.Namespace, generate: Callable[[], Iterable[S]], audit: Callable[[list[S]], str]
) -> None:
    """Writes the samples of `generate`, one JSON object a line, and prints the text of their `audit`.

    A user's mistake ends with one line and exit code 2.
    """
    with user_errors(DataError, OSError):
        if arguments.out is None and not arguments.audit:
            raise DataError("nothing to do: give --out FILE.jsonl, --audit or both")
        samples = list(generate())
        if arguments.out is not None:
            with arguments.out.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(_fields(sample)) + "\n" for sample in samples)
            print(f"{arguments.out}: {len(samples)} samples")
        if arguments.audit:
            print(audit(samples))


def _fields(sample: Any) -> Any:
    """Of a named tuple or a dataclass."""
    return sample._asdict() if hasattr(sample, "_asdict") else asdict(sample)
