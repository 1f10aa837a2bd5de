"""One corpus in every form that bench/data.py's readers take, and the check that all read the same."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from data_peers import (
    Arrays,
    Shape,
    memmap_batches,
    webdataset_batches,
    write_tar,
    write_tokens,
)

from data_pipeline.build import build
from data_pipeline.loading.loader import Loader
from data_pipeline.recipe import Recipe, TokenizerRecipe
from data_pipeline.shards.format import IGNORE_INDEX
from data_pipeline.shards.manifest import open_manifest
from data_pipeline.shards.token_stream import TokenStream
from data_pipeline.sources.documents import Document
from data_pipeline.sources.registry import read_documents

SOURCE = "text"
WIKIPEDIA = "text/enwiki2015-AA.tar.xz"
# Characters per document: log-normal with the median and mean (299 and 774 tokens) of a mixed corpus.
MEDIAN_CHARACTERS, SIGMA = 950.0, 1.38
LEARNT_BYTES = 4_000_000  # of text that a tokenizer is trained on
MEMBER = 64  # documents per sample in the tar with several per sample
MEMMAP, ONE, MANY, SHARDS = PEERS = (
    "memmap",
    "webdataset, 1 document per sample",
    f"webdataset, {MEMBER} documents per sample",
    "webdataset on our shards",
)


@dataclass(frozen=True)
class Corpus:
    """The built folder and its documents; `folder` holds every other form of them."""

    kind: str  # of the text
    texts: list[str]
    folder: Path
    stream: TokenStream
    flat: np.ndarray  # (n,) int32: every token

    @property
    def data(self) -> Path:
        return self.folder / "data"


def make_corpus(root: Path, folder: Path, characters: int, vocab_size: int) -> Corpus:
    """Wikipedia text below `root`, or pseudo-words where that is missing, built with a BPE tokenizer."""
    real = (root / WIKIPEDIA).is_file()
    texts = list(_cut(_wikipedia(root) if real else _pseudo_words(), characters))
    write_jsonl(folder / "corpus.jsonl", texts)
    source = {"name": SOURCE, "kind": "jsonl", "weight": 1.0, "files": ["corpus.jsonl"]}
    tokenizer = TokenizerRecipe(vocab_size, "bpe", LEARNT_BYTES)
    build(Recipe("bench", 0, 0.0, tokenizer, [source]), folder, folder / "data")
    stream = TokenStream(open_manifest(folder / "data"), SOURCE, "train")
    flat = stream.read(0, stream.tokens)
    write_tokens(folder / "tokens.bin", flat)
    for documents in (1, MEMBER):
        write_tar(folder / f"{documents}.tar", flat, stream.document_starts, documents)
    return Corpus("Wikipedia" if real else "pseudo-words", texts, folder, stream, flat)


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def _wikipedia(root: Path) -> Iterator[str]:
    for document in read_documents("wiki", root, {"files": [WIKIPEDIA]}):
        assert isinstance(document, Document)
        yield document.text


def _pseudo_words() -> Iterator[str]:
    """Words with the frequencies of a language, by Zipf's law."""
    generator, letters = np.random.default_rng(0), np.array(list("etaoinshrdlu"))
    words = ["".join(generator.choice(letters, size)) for size in generator.integers(2, 11, 20_000)]
    while True:
        ranks = generator.zipf(1.2, 10_000)
        yield " ".join(words[rank] for rank in ranks[ranks < len(words)].tolist()) + ".\n"


def _cut(texts: Iterator[str], characters: int) -> Iterator[str]:
    """Documents of log-normal lengths, `characters` in total or until the texts end."""
    generator, pending, left = np.random.default_rng(1), "", characters
    while left > 0:
        size = min(left, 1 + int(generator.lognormal(np.log(MEDIAN_CHARACTERS), SIGMA)))
        while len(pending) < size:
            text = next(texts, None)
            if text is None:
                return
            pending += text
        yield pending[:size]
        pending, left = pending[size:], left - size


# ---- the same work


def peer_order(corpus: Corpus, length: int) -> np.ndarray:
    """Rows with a target everywhere, shuffled: an epoch of the memmap reader."""
    return np.random.default_rng(0).permutation((len(corpus.flat) - 1) // length)


def peer_readers(corpus: Corpus, shape: Shape) -> dict[str, Iterator[Arrays]]:
    """Readers by the names in PEERS."""
    folder, order = corpus.folder, peer_order(corpus, shape.length)
    shards = [corpus.data / shard.file for shard in corpus.stream.shards]
    return {
        MEMMAP: memmap_batches(folder / "tokens.bin", order, shape),
        ONE: webdataset_batches([folder / "1.tar"], shape),
        MANY: webdataset_batches([folder / f"{MEMBER}.tar"], shape),
        SHARDS: webdataset_batches(shards, shape, headers=True),
    }


def check_peers(corpus: Corpus, shape: Shape) -> None:
    """Raises ValueError unless an epoch of every reader gives the rows of the corpus, in int32."""
    order = peer_order(corpus, shape.length)
    for name, batches in peer_readers(corpus, shape).items():
        rows = order if name == MEMMAP else np.arange(len(order))
        for first in range(0, len(rows) - shape.rows + 1, shape.rows):
            _check_rows(corpus, name, rows[first : first + shape.rows], next(batches))


def check_loader(corpus: Corpus, loader: Loader) -> None:
    """Raises ValueError unless an epoch of a loader gives the rows of the corpus, in int32. A loader that
    packs differently must give every token once, and every document's end once without a target.
    """
    rows, documents = loader.rows[SOURCE], len(corpus.stream.prompt_ends)
    packs = loader.padded_tokens[SOURCE] > 0
    tokens, ends = np.zeros(loader.vocab_size, dtype=np.int64), 0
    for step in range(-(-rows // loader.global_batch_size)):
        batch = loader.batch(step)
        inside = np.flatnonzero(np.array(batch.epochs) == 0)
        found = Arrays(batch.tokens[inside], batch.targets[inside], batch.cu_seqlens[inside])
        if not packs:
            numbers = np.array([row for _, row in batch.sample_ids])[inside]
            _check_rows(corpus, "ours", numbers, found)
            continue
        real = np.arange(loader.sequence_length) < batch.lengths[inside, None]
        tokens += np.bincount(found.tokens[real], minlength=len(tokens))
        ends += int((found.targets[real] == IGNORE_INDEX).sum())
    expected = np.bincount(corpus.flat, minlength=len(tokens))
    if packs and not (np.array_equal(tokens, expected) and ends == documents):
        raise ValueError(
            f"ours gives {tokens.sum()} tokens with {ends} ends, the corpus has {expected.sum()}"
        )


def _check_rows(corpus: Corpus, name: str, rows: np.ndarray, found: Arrays) -> None:
    """Compares with rows cut from the corpus one by one by its index."""
    T, flat, starts = found.tokens.shape[1], corpus.flat, corpus.stream.document_starts
    for i, row in enumerate(rows.tolist()):
        first, stop = row * T, row * T + T
        targets = np.full(T, IGNORE_INDEX, dtype=np.int32)
        targets[: len(flat) - first - 1] = flat[first + 1 : stop + 1]
        same = np.array_equal(found.tokens[i], flat[first:stop])
        if found.cu_seqlens is not None:
            inside = starts[np.searchsorted(starts, first, "right") : np.searchsorted(starts, stop, "left")]
            after = starts[np.searchsorted(starts, first, "right") : np.searchsorted(starts, stop, "right")]
            targets[after - 1 - first] = IGNORE_INDEX
            cu = np.full(found.cu_seqlens.shape[1], T)
            cu[: len(inside) + 1] = [0, *(inside - first)]
            same &= np.array_equal(found.cu_seqlens[i], cu)
        same &= np.array_equal(found.targets[i], targets)
        if not same or any(part is not None and part.dtype != np.int32 for part in found):
            raise ValueError(f"{name}: row {row} differs from the corpus; the comparison would mean nothing")
