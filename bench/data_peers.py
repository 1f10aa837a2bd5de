"""What bench/data.py compares the data pipeline with: other implementations of the same work."""

import importlib.util
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
import webdataset
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from data_pipeline.shards.format import IGNORE_INDEX
from data_pipeline.tokenization.tokenizer import BOS_ID, EOS_ID, META_SPACE, UNK_ID

STORED = "<u2"  # how every file here stores a token


class Arrays(NamedTuple):
    """A batch as all readers give it: b rows of T tokens, all int32."""

    tokens: np.ndarray  # (b, T)
    targets: np.ndarray  # (b, T)
    cu_seqlens: np.ndarray | None  # (b, S) as in loader.Batch


class Shape(NamedTuple):
    """What the readers are asked for."""

    rows: int  # b
    length: int  # T
    segments: int | None  # S; None: no boundaries


# ---- reading


def memmap_batches(path: Path, order: np.ndarray, shape: Shape) -> Iterator[Arrays]:
    """nanoGPT's `get_batch` over one file of tokens, endlessly: every row is a separate slice at
    `order` (n,) x T, so that an epoch has each row once, as with our loader.
    """
    data, (b, T, segments) = np.memmap(path, STORED, mode="r"), shape
    while True:
        for first in range(0, len(order) - b + 1, b):
            starts = [row * T for row in order[first : first + b].tolist()]
            tokens = np.stack([data[i : i + T].astype(np.int32) for i in starts])
            targets = np.stack([data[i + 1 : i + 1 + T].astype(np.int32) for i in starts])
            yield with_boundaries(tokens, targets, segments)


def webdataset_batches(tars: Sequence[Path], shape: Shape, headers: bool = False) -> Iterator[Arrays]:
    """The rows in order, endlessly, from samples that stock webdataset reads one after another, unshuffled.
    `headers`: the samples are members of our shards, see data_pipeline/shards/format.py.
    """
    while True:
        samples = webdataset.WebDataset([str(path) for path in tars], shardshuffle=False)
        yield from _packed((_stored(sample["tokens"], headers) for sample in samples), shape)


def _stored(payload: bytes, header: bool) -> np.ndarray:
    documents = int.from_bytes(payload[:4], "little") if header else 0
    return np.frombuffer(payload, STORED, offset=4 * (1 + 2 * documents) if header else 0)


def _packed(samples: Iterator[np.ndarray], shape: Shape) -> Iterator[Arrays]:
    """Tokens end to end, cut into rows; an incomplete last batch is dropped."""
    b, T, segments = shape
    needed = b * T + 1  # the last target is one token on
    pending, at = np.zeros(0, STORED), 0
    while True:
        if len(pending) - at < needed:
            parts = [pending[at:]]
            size = len(parts[0])
            while size < needed:
                sample = next(samples, None)
                if sample is None:
                    return
                parts.append(sample)
                size += len(sample)
            pending, at = np.concatenate(parts), 0
        flat = pending[at : at + needed].astype(np.int32)
        at += b * T
        targets = flat[1:] if segments is None else flat[1:].copy()  # they will differ from the tokens
        yield with_boundaries(flat[:-1].reshape(b, T), targets.reshape(b, T), segments)


def with_boundaries(tokens: np.ndarray, targets: np.ndarray, segments: int | None) -> Arrays:
    """Finds the ends of documents by their EOS: no target there, and cu_seqlens; all rows at once."""
    if segments is None:
        return Arrays(tokens, targets, None)
    b, T = tokens.shape
    ends = tokens == EOS_ID
    targets[ends] = IGNORE_INDEX
    row, column = np.nonzero(ends[:, :-1])  # an end at the row's edge does not start a segment in this row
    counts = np.bincount(row, minlength=b)
    number = np.arange(len(row)) - (np.cumsum(counts) - counts)[row]
    cu = np.full((b, segments), T, dtype=np.int32)
    cu[:, 0] = 0
    cu[row, number + 1] = column + 1
    return Arrays(tokens, targets, cu)


def write_tokens(path: Path, flat: np.ndarray) -> None:
    """One file of all tokens (n,), nanoGPT's .bin."""
    flat.astype(STORED).tofile(path)


def write_tar(path: Path, flat: np.ndarray, starts: np.ndarray, documents: int) -> None:
    """A tar with this many documents per member; `starts` (documents + 1,) as in TokenStream."""
    stored, edges = flat.astype(STORED), [*starts[:-1:documents].tolist(), int(starts[-1])]
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for number, (start, stop) in enumerate(itertools.pairwise(edges)):
            writer.write({"__key__": f"{number:08d}", "tokens": stored[start:stop].tobytes()})


# ---- preparing


def fast_tokenizer(model: Path) -> Any:
    """A PreTrainedTokenizerFast with the pieces and scores of our `tokenizer.model`; a text
    becomes bos + pieces + eos.
    """
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.vocab_size())]
    if _is_bpe(processor):
        ids = {piece: i for i, (piece, _) in enumerate(pieces)}
        learnt = {piece: i for piece, i in ids.items() if i > EOS_ID and not processor.is_byte(i)}
        unknown = pieces[UNK_ID][0]
        core: Any = models.BPE(ids, _merges(learnt), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    else:
        core = models.Unigram(pieces, UNK_ID, byte_fallback=True)
    tokenizer = FastTokenizer(core)
    tokenizer.normalizer = normalizers.Replace(" ", META_SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(META_SPACE, " "), decoders.ByteFallback()])
    bos, eos = pieces[BOS_ID][0], pieces[EOS_ID][0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(bos, BOS_ID), (eos, EOS_ID)]
    )
    inputs = ["input_ids", "attention_mask"]  # what a causal model takes
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs)


def _is_bpe(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Judged by the scores: BPE's are the ranks of its merges, integers from 0 down."""
    ids = [i for i in range(EOS_ID + 1, processor.vocab_size()) if not processor.is_byte(i)]
    return all(processor.get_score(i).is_integer() for i in ids)


def _merges(ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces; pieces with lower ids were learnt earlier and come first."""
    merges = []
    for piece in sorted(ids, key=ids.__getitem__):
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        found = [(a, b) for a, b in splits if a in ids and b in ids]
        merges += sorted(found, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def datasets_version() -> str | None:
    """Version of the `datasets` library; None: not installed."""
    if importlib.util.find_spec("datasets") is None:
        return None
    return importlib.import_module("datasets").__version__


def tokenise_and_group(texts: Path, tokenizer: Any, length: int) -> None:
    """transformers' run_clm.py preprocessing, its functions unchanged, from a jsonl file with `text` to rows
    of `length` tokens on disk, in a folder that is then deleted.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    datasets: Any = importlib.import_module("datasets")
    datasets.disable_progress_bars()

    def tokenize_function(examples: dict[str, list[Any]]) -> Any:
        return tokenizer(examples["text"])

    def group_texts(examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        concatenated_examples = {k: list(itertools.chain(*examples[k])) for k in examples}
        total_length = len(concatenated_examples[next(iter(examples))])
        total_length = (total_length // length) * length
        result = {
            k: [t[i : i + length] for i in range(0, total_length, length)]
            for k, t in concatenated_examples.items()
        }
        result["labels"] = result["input_ids"].copy()
        return result

    with tempfile.TemporaryDirectory() as folder:
        raw = datasets.load_dataset("json", data_files=str(texts), split="train", cache_dir=folder)
        options: dict[str, Any] = {"batched": True, "load_from_cache_file": False}
        tokenized = raw.map(tokenize_function, remove_columns=["text"], **options)
        tokenized.map(group_texts, **options)
