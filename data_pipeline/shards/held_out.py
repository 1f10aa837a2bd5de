"""The held-out documents of a built data folder as text, for scoring with another tokenizer."""

from collections.abc import Iterator
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.shards.manifest import MANIFEST, open_manifest
from data_pipeline.shards.token_stream import TokenStream
from data_pipeline.tokenization.tokenizer import Tokenizer


def is_build(path: Path) -> bool:
    """Whether `path` is a folder that build.py made."""
    return (path / MANIFEST).is_file()


def held_out_texts(folder: Path) -> Iterator[str]:
    """The documents of all sources' validation splits, source by source, decoded by the folder's tokenizer.

    Raises DataError for a damaged folder and for one without held-out documents.
    """
    manifest = open_manifest(folder)
    tokenizer = Tokenizer(manifest.tokenizer_path)
    held_out = {name: source.splits["validation"] for name, source in manifest.sources.items()}
    if not any(split.documents for split in held_out.values()):
        raise DataError(f"{folder} has no held-out documents: raise its recipe's validation_fraction")
    for name in held_out:
        stream = TokenStream(manifest, name, "validation")
        starts = stream.document_starts.tolist()
        for start, stop in zip(starts, starts[1:], strict=False):
            yield tokenizer.decode(stream.read(start, stop).tolist())
