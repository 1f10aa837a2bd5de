"""Text -> tokenizer, shards, manifest.

    python data_pipeline/build.py --recipe RECIPE.yaml --out DIR [a.b=c ...]

The same recipe and input files give the same bytes. The manifest is written last: a folder without one is an
interrupted build and is built anew.
"""

import argparse
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipeline.errors import DataError, user_errors
from data_pipeline.files import require_file
from data_pipeline.kinds import input_files, read_documents
from data_pipeline.order import key_of, mixture_table, permute
from data_pipeline.recipe import Recipe, load_recipe
from data_pipeline.shards import (
    FORMAT,
    IGNORE_INDEX,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    EncodedDocument,
    Manifest,
    Source,
    Split,
    open_manifest,
    token_dtype,
    write_file,
    write_manifest,
    write_shards,
)
from data_pipeline.sources import Document, LabelledDocument
from data_pipeline.tokenizer import BOS_ID, EOS_ID, Tokenizer, train_tokenizer

OWN_KEYS = ("name", "kind", "weight", "mask_prompt")  # of a source; the others are options of its kind
OWN_FILES = re.compile(
    r"tokenizer\.model(\.tmp)?|manifest\.json\.tmp|[a-z0-9_]+-[a-z]+-\d{5}\.(tar|idx)(\.tmp)?"
)
AnyDocument = Document | LabelledDocument


def build(recipe: Recipe, root: Path, out: Path) -> Manifest:
    """Build `recipe` from the data folder `root` into `out` and return its manifest.

    A complete build of the same recipe and data in `out` is returned as it is. Raises DataError if `out`
    holds anything else, for missing input, for a source without documents and for a labelled source that has
    a character without a piece of its own or a masked prompt.
    """
    weights = {source["name"]: float(source["weight"]) for source in recipe.sources}
    mixture_table(weights)  # a weight too small to be drawn is found before hours of work
    build_hash = _build_hash(recipe, root)
    if (out / MANIFEST).is_file():
        manifest = open_manifest(out)
        if manifest.build_hash != build_hash:
            raise DataError(
                f"{out} holds a build of another recipe or data: choose another --out or delete it"
            )
        print(f"{out} already holds this build: nothing to do")
        return manifest
    _clear(out)

    texts = {source["name"]: _read(source, recipe, root) for source in recipe.sources}
    tokenizer = _train_tokenizer(
        recipe, weights, {name: splits["train"] for name, splits in texts.items()}, out
    )
    labelled = {name: _is_labelled(name, splits) for name, splits in texts.items()}
    dtype = token_dtype(tokenizer.vocab_size + any(labelled.values()))  # one value more: no label
    sources = {}
    for source in recipe.sources:
        name, splits = source["name"], texts.pop(source["name"])
        encode = _encoder(source, labelled[name], tokenizer)
        sources[name] = Source(
            weights[name],
            {
                split: _write_split(out, name, split, splits[split], encode, recipe.seed, dtype)
                for split in SPLITS
            },
            labelled[name],
        )
    manifest = Manifest(
        path=out,
        sha256="",
        build_hash=build_hash,
        recipe=asdict(recipe),
        tokenizer_bytes=(out / TOKENIZER).stat().st_size,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        dtype=dtype,
        sources=sources,
    )
    write_manifest(manifest)
    return open_manifest(out)


def _options(source: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in source.items() if key not in OWN_KEYS}


def _build_hash(recipe: Recipe, root: Path) -> str:
    """Hash of all that decides the bytes of a build. Finds unknown kinds, options and missing files."""
    files = sorted({f for source in recipe.sources for f in input_files(source["kind"], _options(source))})
    inputs = {}
    for file in files:
        with require_file(root / file).open("rb") as stream:
            inputs[file] = hashlib.file_digest(stream, "sha256").hexdigest()
    identity = {"format": FORMAT, "recipe": asdict(recipe), "inputs": inputs}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _clear(out: Path) -> None:
    """Make `out` an empty folder if nothing but the remains of an interrupted build would be lost."""
    out.mkdir(parents=True, exist_ok=True)
    names = [path.name for path in out.iterdir()]
    foreign = sorted(name for name in names if not OWN_FILES.fullmatch(name))
    if foreign:
        raise DataError(f"{out} holds {foreign[0]!r} and no finished build: choose another --out or empty it")
    for name in names:
        (out / name).unlink()


def _read(source: dict[str, Any], recipe: Recipe, root: Path) -> dict[str, list[AnyDocument]]:
    """The documents of a source by split; equal documents always fall into the same split."""
    texts: dict[str, list[AnyDocument]] = {split: [] for split in SPLITS}
    documents = read_documents(source["kind"], root, _options(source))
    for document in tqdm(documents, desc=f"read {source['name']}", unit=" documents", disable=None):
        digest = hashlib.sha256(f"{recipe.seed}/".encode() + document.text.encode()).digest()
        held_out = int.from_bytes(digest[:8], "big") < recipe.validation_fraction * 2**64
        texts["validation" if held_out else "train"].append(document)
    if not texts["train"]:
        raise DataError(f"source {source['name']!r} has no training documents: check its options")
    return texts


def _is_labelled(name: str, splits: dict[str, list[AnyDocument]]) -> bool:
    kinds = {type(document) for documents in splits.values() for document in documents}
    if len(kinds) > 1:
        raise DataError(f"source {name!r} mixes documents with and without labels: make it two sources")
    return kinds == {LabelledDocument}


def _train_tokenizer(
    recipe: Recipe, weights: dict[str, float], texts: dict[str, list[AnyDocument]], out: Path
) -> Tokenizer:
    total = sum(weights.values())

    def selection() -> Iterator[str]:
        for name, documents in texts.items():
            left = recipe.tokenizer.train_bytes * weights[name] / total
            # Shuffled, because files are often sorted by topic.
            for i in permute(
                np.arange(len(documents)), len(documents), key_of(recipe.seed, name, "tokenizer")
            ):
                if left <= 0:
                    break
                document = documents[i]
                text = document.text
                if isinstance(document, LabelledDocument):
                    text += "".join(character for _, character in document.labels)
                left -= len(text.encode())
                yield text

    bar = tqdm(selection(), desc="train tokenizer", unit=" documents", disable=None)
    write_file(
        out / TOKENIZER, train_tokenizer(bar, recipe.tokenizer.vocab_size, recipe.tokenizer.model_type)
    )
    return Tokenizer(out / TOKENIZER)


def _write_split(
    out: Path,
    name: str,
    split: str,
    documents: list[AnyDocument],
    encode: Callable[[Any], EncodedDocument],
    seed: int,
    dtype: str,
) -> Split:
    """Encode and write the documents in a shuffled order."""
    order = permute(np.arange(len(documents)), max(1, len(documents)), key_of(seed, name, split))
    bar = tqdm(order, desc=f"encode {name} {split}", unit=" documents", disable=None)
    shards = write_shards(out, f"{name}-{split}", (encode(documents[i]) for i in bar), dtype)
    return Split(
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        text_bytes=sum(len(document.text.encode()) for document in documents),
        shards=shards,
    )


def _encoder(
    source: dict[str, Any], labelled: bool, tokenizer: Tokenizer
) -> Callable[[Any], EncodedDocument]:
    """The function from a document of `source` to its tokens."""
    mask_prompt = source.get("mask_prompt", False)
    if not labelled:
        return partial(_encode, tokenizer=tokenizer, mask_prompt=mask_prompt)
    if mask_prompt:
        raise DataError(
            f"source {source['name']!r} has mask_prompt, but its labels say what to predict: remove it"
        )
    return partial(encode_labelled, ids=CharacterIds(source["name"], tokenizer))


def _encode(document: Document, tokenizer: Tokenizer, mask_prompt: bool) -> EncodedDocument:
    """A masked prompt is encoded by itself, so that the loss begins exactly where the completion does."""
    if not mask_prompt:
        return EncodedDocument(tokenizer.encode(document.text, bos=True, eos=True))
    prompt = tokenizer.encode(document.prompt, bos=True)
    return EncodedDocument(prompt + tokenizer.encode(document.completion, eos=True), len(prompt))


class CharacterIds(dict[str, int]):
    """Character -> its one token id, looked up in the tokenizer at first use."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._source, self._tokenizer = source, tokenizer

    def __missing__(self, character: str) -> int:
        assert len(character) == 1, character
        ids = self._tokenizer.encode(character)
        if len(ids) != 1:
            raise DataError(
                f"source {self._source!r} has the character {character!r} in text or labels, which is "
                f"{len(ids)} tokens, not 1: raise tokenizer.vocab_size or tokenizer.train_bytes"
            )
        self[character] = ids[0]
        return ids[0]


def encode_labelled(document: LabelledDocument, ids: CharacterIds) -> EncodedDocument:
    """One token a character, so that a label stays at its character; bos and eos have no label."""
    tokens = [BOS_ID, *(ids[character] for character in document.text), EOS_ID]
    labels = [IGNORE_INDEX] * len(tokens)
    for index, character in document.labels:
        assert 0 <= index < len(document.text), (index, document.text)
        labels[1 + index] = ids[character]
    return EncodedDocument(tokens, labels=labels)


def summary(manifest: Manifest) -> str:
    """A table of what a build holds."""
    lines = [f"{'source':20} {'split':10} {'weight':>7} {'documents':>10} {'tokens':>12} {'bytes/token':>11}"]
    for name, source in manifest.sources.items():
        for split, value in source.splits.items():
            ratio = f"{value.text_bytes / value.tokens:.2f}" if value.tokens else "-"
            counts = f"{value.documents:10d} {value.tokens:12d} {ratio:>11}"
            lines.append(f"{name:20} {split:10} {source.weight:7g} {counts}")
    lines.append(f"vocabulary: {manifest.vocab_size} pieces")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Build tokenizer, shards and manifest from a recipe.")
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="data folder to write")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("DATA_ROOT", "data")),
        help="folder of the published data sets (default: DATA_ROOT, else data)",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. tokenizer.vocab_size=512")
    arguments = parser.parse_intermixed_args(argv)
    with user_errors(DataError, OSError):
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        print(summary(build(recipe, arguments.data, arguments.out)))


if __name__ == "__main__":
    main()
