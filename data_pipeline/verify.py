"""Check every byte of a built data folder: `python data_pipeline/verify.py DIR`.

Compared with the manifest: size and sha256 of every shard, index and the tokenizer; the number of members,
documents and tokens; the bytes of text that the tokens of each split decode to. Besides, every member's
checksum and every token's range. The manifest itself has nothing to be compared with.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common.errors import user_errors
from data_pipeline.errors import DataError
from data_pipeline.shards.manifest import REBUILD, Manifest, check_sha256, open_manifest
from data_pipeline.shards.token_stream import TokenStream
from data_pipeline.tokenization.tokenizer import Tokenizer

CHUNK_TOKENS = 1 << 20  # read at a time


class Verified(NamedTuple):
    manifest: Manifest
    empty: int  # documents without text


def verify(path: str | Path) -> Verified:
    """Compare everything with the manifest. Raises DataError at the first difference."""
    manifest = open_manifest(path)  # covers the indices and the tokenizer
    for shard in tqdm(list(manifest.shards()), desc="verify", unit="shard", disable=None):
        check_sha256(manifest.path / shard.file, shard.sha256)
    tokenizer = Tokenizer(manifest.tokenizer_path)
    if tokenizer.vocab_size != manifest.vocab_size:
        raise DataError(
            f"{manifest.tokenizer_path} has {tokenizer.vocab_size} pieces, the manifest says "
            f"{manifest.vocab_size}: {REBUILD}"
        )
    splits = [(name, split) for name, source in manifest.sources.items() for split in source.splits]
    bar = tqdm(splits, desc="decode", unit="split", disable=None)
    return Verified(manifest, sum(_check_texts(manifest, *split, tokenizer) for split in bar))


def _check_texts(manifest: Manifest, source: str, split: str, tokenizer: Tokenizer) -> int:
    """How many documents of a split have no text; reads all of them."""
    total = empty = 0
    for sizes in _text_sizes(manifest, source, split, tokenizer):
        total += int(sizes.sum())
        empty += int((sizes == 0).sum())
    told = manifest.sources[source].splits[split].text_bytes
    if total != told:
        raise DataError(
            f"{manifest.path}: the {split} documents of {source!r} have {total} bytes of text, the manifest "
            f"says {told}: {REBUILD}"
        )
    return empty


def _text_sizes(manifest: Manifest, source: str, split: str, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The UTF-8 bytes of each document, some documents at a time."""
    stream = TokenStream(manifest, source, split)
    starts, of_token = stream.document_starts, tokenizer.text_bytes()
    first = 0
    while first < len(starts) - 1:
        limit = int(starts[first]) + CHUNK_TOKENS
        last = max(first + 1, int(np.searchsorted(starts, limit, side="right")) - 1)
        tokens = stream.read(int(starts[first]), int(starts[last]))
        if tokens.max(initial=0) >= manifest.vocab_size:
            raise DataError(
                f"{manifest.path}: source {source!r} has the token {tokens.max()}, the vocabulary "
                f"{manifest.vocab_size}: {REBUILD}"
            )
        bounds = starts[first : last + 1] - starts[first]
        if of_token is None:
            documents = np.split(tokens, bounds[1:-1])
            yield np.array([len(tokenizer.decode(d.tolist()).encode()) for d in documents], np.int64)
        else:
            yield np.diff(np.concatenate([[0], np.cumsum(of_token[tokens])])[bounds])
        first = last


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Check every byte of a built data folder.")
    parser.add_argument("path", type=Path, metavar="DIR")
    arguments = parser.parse_args(argv)
    with user_errors(DataError, OSError):
        manifest, empty = verify(arguments.path)
    shards = list(manifest.shards())
    print(
        f"{arguments.path}: good; {len(shards)} shards, {sum(s.bytes for s in shards)} bytes, "
        f"{sum(s.documents for s in shards)} documents ({empty} of them empty), "
        f"{sum(s.tokens for s in shards)} tokens"
    )


if __name__ == "__main__":
    main()
