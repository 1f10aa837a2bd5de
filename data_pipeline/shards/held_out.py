"""The documents of a built data folder as text, for scoring with another tokenizer and for calibration."""

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
    sources = open_manifest(folder).sources.values()
    if not any(source.splits["validation"].documents for source in sources):
        raise DataError(f"{folder} has no held-out documents: raise its recipe's validation_fraction")
    yield from texts(folder, "validation")


def texts(folder: Path, split: str) -> Iterator[str]:
    """The documents of all sources' train or validation splits, decoded by the folder's tokenizer.

    Raises DataError for a damaged folder.
    """
    manifest = open_manifest(folder)
    tokenizer = Tokenizer(manifest.tokenizer_path)
    for name in manifest.sources:
        stream = TokenStream(manifest, name, split)
        starts = stream.document_starts.tolist()
        for start, stop in zip(starts, starts[1:], strict=False):
            yield tokenizer.decode(stream.read(start, stop).tolist())
