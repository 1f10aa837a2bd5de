import itertools

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.loader import Loader
from data_pipeline.packing import IGNORE_INDEX, ConcatPacking
from data_pipeline.shards import open_manifest
from data_pipeline.token_stream import TokenStream

from .conftest import prompt_length, read_row


def brute_force_rows(
    source: str, texts: list[list[int]], length: int
) -> list[tuple[list[int], list[int], list[int]]]:
    """(tokens, targets, segment starts) of every row, token by token."""
    stream = [(token, d, i) for d, text in enumerate(texts) for i, token in enumerate(text)]
    rows = []
    for r in range(len(stream) // length):
        part = stream[r * length : (r + 1) * length]
        targets = []
        for _, d, i in part:
            predicted = prompt_length(source, texts[d]) <= i + 1 < len(texts[d])
            targets.append(texts[d][i + 1] if predicted else IGNORE_INDEX)
        starts = [0] + [k for k in range(1, length) if part[k][1] != part[k - 1][1]]
        rows.append(([token for token, _, _ in part], targets, starts))
    return rows


@pytest.mark.parametrize("length", [1, 2, 7, 64, 257])
@pytest.mark.parametrize("source", ["short", "long"])
def test_packing_equals_brute_force_on_every_row(folder, documents, source, length):
    packing = ConcatPacking(TokenStream(open_manifest(folder), source, "train"), length)
    expected = brute_force_rows(source, documents[source]["train"], length)
    assert packing.rows == len(expected)
    total = sum(map(len, documents[source]["train"]))
    assert packing.rows * length + packing.dropped_tokens == total
    assert packing.max_segments == max(len(starts) for _, _, starts in expected)
    for r, (tokens, targets, starts) in enumerate(expected):
        row = read_row(packing, r)
        assert [part.tolist() for part in row] == [tokens, targets, starts], r
        assert {part.dtype for part in row} == {np.dtype(np.int32)}


def test_row_that_ends_with_the_corpus(tmp_path, make_folder):
    """The last row has no token after it; a document may end exactly at an edge."""
    texts = [[2, 9, 9, 3], [2, 8, 8, 3], [2, 7, 7, 7, 7, 7, 7, 3]]
    folder = make_folder(tmp_path / "data", {"short": {"train": texts, "validation": texts}})
    packing = ConcatPacking(TokenStream(open_manifest(folder), "short", "train"), 4)
    rows = [[part.tolist() for part in read_row(packing, r)] for r in range(packing.rows)]
    assert packing.dropped_tokens == 0
    assert rows == [
        [[2, 9, 9, 3], [9, 9, 3, -100], [0]],
        [[2, 8, 8, 3], [8, 8, 3, -100], [0]],
        [[2, 7, 7, 7], [7, 7, 7, 7], [0]],
        [[7, 7, 7, 3], [7, 7, 3, -100], [0]],
    ]


def test_batches_hold_the_rows_they_name(folder, documents):
    loader = Loader(folder, 32, 12, seed=5)
    expected = {name: brute_force_rows(name, splits["train"], 32) for name, splits in documents.items()}
    for step in (0, 1, 17, 10**9):
        batch = loader.batch(step)
        assert batch.tokens.shape == batch.targets.shape == (12, 32)
        assert {a.dtype for a in (batch.tokens, batch.targets, batch.cu_seqlens)} == {np.dtype(np.int32)}
        for i, (name, row) in enumerate(batch.sample_ids):
            tokens, targets, starts = expected[name][row]
            assert batch.tokens[i].tolist() == tokens
            assert batch.targets[i].tolist() == targets
            padding = [32] * (batch.cu_seqlens.shape[1] - len(starts))
            assert padding
            assert batch.cu_seqlens[i].tolist() == starts + padding
    longest = max(len(starts) for rows in expected.values() for _, _, starts in rows)
    assert batch.cu_seqlens.shape == (12, longest + 1)


def test_global_batches_are_the_same_for_every_world_size(folder):
    whole = Loader(folder, 32, 8, seed=1)
    for world_size in (1, 2, 4, 8):
        ranks = [Loader(folder, 32, 8, 1, rank, world_size) for rank in range(world_size)]
        assert {loader.fingerprint for loader in ranks} == {whole.fingerprint}
        for step in (0, 3, 1000):
            parts = [loader.batch(step) for loader in ranks]
            for field in ("tokens", "targets", "cu_seqlens"):
                joined = np.concatenate([getattr(part, field) for part in parts])
                assert np.array_equal(joined, getattr(whole.batch(step), field))
            assert list(itertools.chain(*(part.sample_ids for part in parts))) == whole.batch(step).sample_ids


def test_steps_do_not_depend_on_the_order_of_calls(folder):
    forward, backward = Loader(folder, 32, 4, seed=2), Loader(folder, 32, 4, seed=2)
    a = [forward.batch(step).tokens for step in range(6)]
    b = [backward.batch(step).tokens for step in reversed(range(6))][::-1]
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_row_exactly_once_per_epoch_in_the_mixture_asked_for(folder, split):
    loader = Loader(folder, 16, 4, seed=0, split=split)
    seen: dict[str, list[int]] = {"short": [], "long": []}
    steps = 3 * max(loader.rows.values())
    for step in range(steps):
        for name, row in loader.batch(step).sample_ids:
            seen[name].append(row)
    assert len(seen["short"]) == pytest.approx(0.75 * 4 * steps, abs=1)
    for name, rows in loader.rows.items():
        assert len(seen[name]) == pytest.approx(rows * loader.epoch(steps)[name])
        assert len(seen[name]) > 2 * rows
        epochs = [seen[name][i : i + rows] for i in range(0, len(seen[name]) - rows + 1, rows)]
        assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
        assert rows < 3 or epochs[0] != epochs[1]


def test_seed_and_length_change_order_and_fingerprint(folder, copy):
    loaders = [
        Loader(folder, 32, 8, 0),
        Loader(folder, 32, 8, 1),
        Loader(folder, 16, 8, 0),
        Loader(folder, 32, 8, 0, split="validation"),
    ]
    assert len({loader.fingerprint for loader in loaders}) == 4
    assert loaders[0].batch(0).sample_ids != loaders[1].batch(0).sample_ids
    assert Loader(copy, 32, 4, 0).fingerprint == loaders[0].fingerprint  # not of path or batch size


def test_facts_for_the_trainer(folder, documents):
    loader = Loader(folder, 32, 8, 0)
    assert loader.tokenizer_path == folder / "tokenizer.model"
    assert loader.vocab_size == open_manifest(folder).vocab_size
    assert loader.epoch(0) == {"short": 0.0, "long": 0.0}
    for name, splits in documents.items():
        tokens = sum(map(len, splits["train"]))
        assert (loader.rows[name], loader.dropped_tokens[name]) == divmod(tokens, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"global_batch_size": 6, "world_size": 4},
            "global_batch_size 6 .* 4 ranks: make it a multiple of 4",
        ),
        ({"sequence_length": 10**6}, r"has \d+ train tokens, less than one row of sequence_length 1000000"),
        ({"split": "vaildation"}, "did you mean 'validation'"),
        ({"sequence_length": 0}, "sequence_length 0"),
        ({"global_batch_size": 0}, "global_batch_size 0"),
    ],
)
def test_user_mistakes_are_one_line(folder, arguments, message):
    with pytest.raises(DataError, match=message) as error:
        Loader(folder, **{"sequence_length": 32, "global_batch_size": 8, "seed": 0, **arguments})
    assert "\n" not in str(error.value)


def test_negative_step_is_refused(folder):
    with pytest.raises(DataError, match="-1"):
        Loader(folder, 32, 8, 0).batch(-1)
