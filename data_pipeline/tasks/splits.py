"""The two splits of synthetic tasks, which share no sample."""

import hashlib

from data_pipeline.errors import DataError

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
