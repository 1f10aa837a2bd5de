"""Check every byte of a built data folder: `python data_pipeline/verify.py DIR`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from common.errors import user_errors
from data_pipeline.errors import DataError
from data_pipeline.shards.manifest import Manifest, check_sha256, open_manifest


def verify(path: str | Path) -> Manifest:
    """Compare the sha256 of every shard, index and the tokenizer with the manifest; DataError at the first
    difference.
    """
    manifest = open_manifest(path)  # covers the indices and the tokenizer
    for shard in tqdm(list(manifest.shards()), desc="verify", unit="shard", disable=None):
        check_sha256(manifest.path / shard.file, shard.sha256)
    return manifest


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Check every byte of a built data folder.")
    parser.add_argument("path", type=Path, metavar="DIR")
    arguments = parser.parse_args(argv)
    with user_errors(DataError, OSError):
        manifest = verify(arguments.path)
    shards = list(manifest.shards())
    print(
        f"{arguments.path}: good; {len(shards)} shards, {sum(s.bytes for s in shards)} bytes, "
        f"{sum(s.documents for s in shards)} documents, {sum(s.tokens for s in shards)} tokens"
    )


if __name__ == "__main__":
    main()
