from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.loading.loader import Loader
from data_pipeline.loading.packing import IGNORE_INDEX, PACKINGS, BestFitPacking, best_fit, packing_of
from data_pipeline.shards.format import EncodedDocument
from data_pipeline.shards.manifest import Manifest, Source, Split, open_manifest
from data_pipeline.shards.token_stream import TokenStream
from data_pipeline.shards.writer import write_shards
from model import ModelConfig, ZeroModel

from .conftest import prompt_length, read_row


def naive_best_fit(lengths: list[int], length: int) -> list[int]:
    """The space left in each row, by looking at all rows for each piece."""
    spaces: list[int] = []
    for piece in sorted(lengths, reverse=True):
        fitting = [space for space in spaces if space >= piece]
        if fitting:
            spaces.remove(min(fitting))
            spaces.append(min(fitting) - piece)
        else:
            spaces.append(length - piece)
    return sorted(spaces)


@settings(deadline=None)
@given(st.integers(1, 40).flatmap(lambda T: st.tuples(st.just(T), st.lists(st.integers(1, T), max_size=80))))
def test_best_fit_equals_the_naive_one(case):
    T, lengths = case
    rows, count = best_fit(np.array(lengths, dtype=np.int64), T)
    filled = np.bincount(rows, weights=lengths, minlength=count)
    assert sorted((T - filled).astype(int).tolist()) == naive_best_fit(lengths, T)
    assert np.array_equal(rows, best_fit(np.array(lengths, dtype=np.int64), T)[0])


def test_best_fit_of_many_documents():
    """A real mixture of lengths, against the naive one and the known lower limit of rows."""
    lengths = np.clip(np.exp(np.random.default_rng(0).normal(4, 1.3, 3000)).astype(int), 1, 512)
    rows, count = best_fit(lengths, 512)
    assert np.bincount(rows, weights=lengths).max() <= 512
    assert count == len(naive_best_fit(lengths.tolist(), 512))
    assert lengths.sum() / 512 <= count < 1.01 * lengths.sum() / 512 + 1


def stream_of(folder: Path, documents: list[EncodedDocument], shard_bytes: int = 400) -> TokenStream:
    shards = write_shards(folder, "x-train", documents, "<u2", shard_bytes)
    split = Split(len(documents), sum(len(d.tokens) for d in documents), 0, shards)
    labelled = bool(documents) and documents[0].labels is not None
    sources = {"x": Source(1.0, {"train": split}, labelled)}
    return TokenStream(Manifest(folder, "", "", {}, 0, "", 5000, "<u2", sources), "x", "train")


def numbered(lengths: list[int], labelled: bool = False) -> list[EncodedDocument]:
    """Every token its own number; prompts of 0, 1, 2 ... tokens as far as they go."""
    first, documents = 1, []
    for i, length in enumerate(lengths):
        tokens = list(range(first, first + length))
        first += length
        labels = [token + 1000 if token % 3 else IGNORE_INDEX for token in tokens] if labelled else None
        documents.append(EncodedDocument(tokens, 0 if labelled else i % (length + 1), labels))
    return documents


def expected_targets(documents: list[EncodedDocument]) -> dict[int, int]:
    """Token -> target."""
    targets = {}
    for tokens, prompt, labels in documents:
        for i, token in enumerate(tokens):
            following = tokens[i + 1] if prompt <= i + 1 < len(tokens) else IGNORE_INDEX
            targets[token] = following if labels is None else labels[i]
    return targets


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=30),
    st.integers(1, 24),
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from(sorted(PACKINGS)),
)
def test_every_token_and_target_once(tmp_path_factory, lengths, T, shards, labelled, name):
    """Odd sizes: one document, longer than T, T=1; one block or blocks of shards; masked or labelled."""
    documents = numbered(lengths, labelled)
    stream = stream_of(tmp_path_factory.mktemp("packed"), documents)
    blocks = np.append(stream.shard_documents[:-1][::shards], len(documents)) if shards else None
    packing = packing_of(name)(stream, T, blocks)
    targets, seen, segments = expected_targets(documents), [], [1]
    document_of = {token: d for d, document in enumerate(documents) for token in document.tokens}
    block_of = np.searchsorted(np.zeros(1) if blocks is None else blocks, np.arange(len(lengths)), "right")
    row_blocks = np.repeat(np.arange(len(packing.block_rows)), packing.block_rows)
    for row in range(packing.rows):
        tokens, found, starts = read_row(packing, row)
        real = int((tokens != 0).sum())
        assert not tokens[real:].any()
        assert (found[real:] == IGNORE_INDEX).all()
        assert found[:real].tolist() == [targets[token] for token in tokens[:real].tolist()]
        ids = [document_of[token] for token in tokens[:real].tolist()] + [-1] * (T - real)
        edges = [0] + [k for k in range(1, T) if ids[k] != ids[k - 1]]
        assert starts.tolist() == edges
        assert len({block_of[d] for d in ids if d >= 0}) == 1
        assert block_of[ids[0]] - 1 == row_blocks[row]
        segments.append(len(edges))
        seen += tokens[:real].tolist()
    assert len(seen) == len(set(seen)) == stream.tokens - packing.dropped_tokens
    assert packing.padded_tokens == packing.rows * T - len(seen)
    assert packing.max_segments == max(segments)
    if name == "best_fit":
        assert packing.dropped_tokens == 0
    else:
        assert packing.padded_tokens == 0
        assert packing.dropped_tokens < T * len(packing.block_rows)


def test_best_fit_keeps_documents_whole(tmp_path, folder):
    lengths = [3, 40, 17, 16, 1, 9, 33]
    packing = BestFitPacking(stream_of(tmp_path, numbered(lengths)), 16)
    layout = packing.layout(np.arange(packing.rows))
    for document, length in enumerate(lengths):
        pieces = sorted(layout.length[layout.document == document].tolist(), reverse=True)
        assert pieces == [16] * (length // 16) + [length % 16] * bool(length % 16)


def test_loader_with_best_fit_drops_nothing(folder, documents):
    loader = Loader(folder, 64, 4, 0, packing="best_fit")
    assert loader.dropped_tokens == {"short": 0, "long": 0}
    found: dict[str, list[list[int]]] = {"short": [], "long": []}
    step = 0
    while min(loader.epoch(step).values()) < 1:
        batch = loader.batch(step)
        for i, (name, _) in enumerate(batch.sample_ids):
            stop = int(batch.lengths[i])
            edges = [e for e in batch.cu_seqlens[i].tolist() if e < stop] + [stop]
            if batch.epochs[i] == 0:
                found[name] += [batch.tokens[i, a:b].tolist() for a, b in zip(edges, edges[1:], strict=False)]
        step += 1
    assert sorted(found["short"]) == sorted(documents["short"]["train"])
    pieces = [text[i : i + 64] for text in documents["long"]["train"] for i in range(0, len(text), 64)]
    assert sorted(found["long"]) == sorted(pieces)
    assert any(prompt_length("long", text) for text in documents["long"]["train"])


def test_unknown_packing_names_the_nearest(folder):
    with pytest.raises(DataError, match="data.packing 'bestfit'; did you mean 'best_fit'"):
        Loader(folder, 32, 8, 0, packing="bestfit")
    assert Loader(folder, 32, 8, 0, packing="best_fit").fingerprint != Loader(folder, 32, 8, 0).fingerprint


def test_padding_does_not_reach_the_models_loss(folder):
    """With other tokens in the padding, the cross-entropy and its gradients are bit-identical."""
    packing = BestFitPacking(TokenStream(open_manifest(folder), "short", "train"), 32)
    row = int(np.argmax([0 in read_row(packing, r)[0] for r in range(packing.rows)]))
    tokens, targets, starts = read_row(packing, row)
    padded = tokens == 0
    assert 0 < padded.sum() < 32
    torch.manual_seed(0)
    model = ZeroModel(ModelConfig.from_dict({"preset": "nano", "vocab_size": 300}))
    losses, gradients = [], []
    for filling in (0, 77):
        filled = torch.from_numpy(np.where(padded, filling, tokens)).long()[None]
        cu = torch.from_numpy(np.append(starts, 32).astype(np.int32))[None]
        sums = model(filled, cu_seqlens=cu, targets=torch.from_numpy(targets).long()[None]).loss_sums
        losses.append(sums["cross_entropy"].item())
        model.zero_grad()
        sums["cross_entropy"].backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert losses[0] == losses[1] > 0
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
