import itertools
import os
import time
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.loading.loader import Batch, Loader
from data_pipeline.loading.packing import IGNORE_INDEX, ConcatPacking
from data_pipeline.loading.sample_order import Stage
from data_pipeline.shards.manifest import open_manifest
from data_pipeline.shards.token_stream import TokenStream

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


STAGES = [Stage(0, {"short": 1.0}), Stage(2000, {"short": 0.4, "long": 0.6}), Stage(9000, {"long": 1.0})]
VARIANTS = [
    {},
    {"packing": "best_fit", "stages": [*STAGES[:2], Stage(9000, {"short": 0.2, "long": 0.8})]},
    {"shuffle_shards": 1},
    {"packing": "best_fit", "shuffle_shards": 2},
]


def stream(loader: Loader, first: int, stop: int, prefetch: int) -> list[Batch]:
    """As the trainer reads: `prefetch` batches ahead in a thread; 0: without one."""
    if not prefetch:
        return [loader.batch(step) for step in range(first, stop)]
    with ThreadPoolExecutor(1) as reader:
        ahead = [reader.submit(loader.batch, step) for step in range(first, min(stop, first + prefetch))]
        batches = []
        for step in range(first, stop):
            if step + prefetch < stop:
                ahead.append(reader.submit(loader.batch, step + prefetch))
            batches.append(ahead.pop(0).result())
        return batches


def joined(parts: list[Batch]) -> list[object]:
    """The global batch of the ranks' shares, as bytes and lists."""
    values = []
    for field in fields(Batch):
        pieces = [getattr(part, field.name) for part in parts]
        is_array = isinstance(pieces[0], np.ndarray)
        values.append(np.concatenate(pieces).tobytes() if is_array else [*itertools.chain(*pieces)])
    return values


@pytest.mark.parametrize("options", VARIANTS)
def test_the_same_stream_on_every_layout_and_from_every_resume(folder, options):
    """Ranks x batches ahead, each in one go and resumed from several steps."""
    steps = 90
    whole = [joined([batch]) for batch in stream(Loader(folder, 32, 8, 1, **options), 0, steps, 0)]
    for world_size, prefetch in [(1, 2), (2, 0), (2, 1), (4, 2), (8, 4)]:
        for first in (0, 1, 63, 64, 89):
            ranks = [
                stream(Loader(folder, 32, 8, 1, rank, world_size, **options), first, steps, prefetch)
                for rank in range(world_size)
            ]
            found = [joined(list(parts)) for parts in zip(*ranks, strict=True)]
            assert found == whole[first:]


@pytest.mark.parametrize("options", VARIANTS)
def test_every_document_once_per_epoch(folder, documents, options):
    """The tokens of every document, by the rows that hold them, for three epochs of each source."""
    loaders = [Loader(folder, 16, 8, 1, rank, 4, **options) for rank in range(4)]
    tokens: dict[tuple[str, int], list[list[int]]] = {}
    step = 0
    while min(loaders[0].epoch(step).values()) < 3:
        for loader in loaders:
            batch = loader.batch(step)
            for (name, _), epoch, row, n in zip(
                batch.sample_ids, batch.epochs, batch.tokens, batch.lengths, strict=True
            ):
                tokens.setdefault((name, epoch), []).append(row[:n].tolist())
        step += 1
    for name, splits in documents.items():
        whole = Counter(itertools.chain(*splits["train"]))
        for epoch in range(3):
            found = Counter(itertools.chain(*itertools.chain(tokens[name, epoch])))
            assert found <= whole
            assert (whole - found).total() == loaders[0].dropped_tokens[name]
    assert bool(loaders[0].dropped_tokens["short"]) == ("packing" not in options)


def test_stages_take_effect_at_their_tokens(folder):
    loader = Loader(folder, 32, 8, 1, stages=STAGES)
    drawn = [Counter(name for name, _ in loader.batch(step).sample_ids) for step in range(60)]
    # 256 tokens per step: 2000 tokens are reached with step 8, 9000 with step 36
    assert all(counts == {"short": 8} for counts in drawn[:8])
    assert sum(drawn[8:36], Counter())["long"] == pytest.approx(0.6 * 28 * 8, abs=1)
    assert all(counts == {"long": 8} for counts in drawn[36:])
    assert loader.epoch(60)["short"] == sum(drawn, Counter())["short"] / loader.rows["short"]
    assert loader.sample_ids(20) == loader.batch(20).sample_ids


def test_a_source_in_no_stage_is_left_out(folder):
    loader = Loader(folder, 32, 8, 1, stages=[Stage(0, {"short": 2.0, "long": 0.0})])
    assert set(loader.rows) == {"short"}


def test_fingerprint_covers_stages_and_blocks_and_nothing_else(folder):
    first, other = [Stage(0, {"short": 1.0, "long": 2.0})], [Stage(0, {"short": 1.0, "long": 3.0})]
    swapped = [Stage(0, {"long": 2.0, "short": 1.0})]
    settings = [{}, {"stages": first}, {"stages": other}, {"shuffle_shards": 1}, {"shuffle_shards": 2}]
    assert len({Loader(folder, 32, 8, 0, **s).fingerprint for s in settings}) == len(settings)
    assert (
        Loader(folder, 32, 8, 0, stages=first).fingerprint
        == Loader(folder, 32, 8, 0, stages=swapped, max_damaged_rows=3).fingerprint
    )


@pytest.mark.parametrize("options", VARIANTS)
def test_first_batch_far_away_takes_under_a_second(folder, options):
    started = time.perf_counter()
    batch = Loader(folder, 32, 8, 1, 3, 4, **options).batch(10**9)
    assert time.perf_counter() - started < 1
    assert batch.tokens.shape == (2, 32)


def peak_growth(loader: Loader, steps: int) -> int:
    """Bytes that the peak of Python's and numpy's memory grows by after the first tenth of the steps."""
    tracemalloc.start()
    for step in range(steps // 10):
        loader.batch(step)
    before = tracemalloc.get_traced_memory()[1]
    for step in range(steps // 10, steps):
        loader.batch(step)
    growth = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    return growth


@pytest.mark.parametrize("options", VARIANTS[1:3])
def test_memory_stays_flat(folder, options):
    assert peak_growth(Loader(folder, 32, 2, 1, **options), 10_000) < 200_000


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_memory_stays_flat_over_a_million_batches(folder):
    """By what the process holds, as tracing would take three times as long; 8 bytes per batch would show."""
    loader = Loader(folder, 32, 2, 1, **VARIANTS[3])
    for step in range(10**6):
        loader.batch(step)
        if step == 10**5:
            before = resident_bytes()
    assert resident_bytes() - before < 4_000_000


def damage(folder: Path, source: str) -> tuple[int, int]:
    """Flips a bit in the last member of a source; (first, stop) of its tokens in the stream."""
    manifest = open_manifest(folder)
    shard = manifest.sources[source].splits["train"].shards[-1]
    members = np.load(folder / shard.index_file)
    data = bytearray((folder / shard.file).read_bytes())
    data[int(members["offset"][-1] + members["size"][-1]) - 2] ^= 1
    (folder / shard.file).write_bytes(data)
    starts = TokenStream(manifest, source, "train").document_starts
    return int(starts[-1 - int(members["documents"][-1])]), int(starts[-1])


def test_damaged_rows_are_left_out_within_the_budget(folder, copy, capsys):
    """On every layout the same rows become padding, and no other row changes."""
    first, stop = damage(copy, "long")
    # the target at a row's edge is the first token of the next row
    rows = {row for row in range(stop // 32) if row * 32 + 33 > first}
    whole = Loader(folder, 32, 8, 1)
    ranks = [Loader(copy, 32, 8, 1, rank, 4, max_damaged_rows=len(rows)) for rank in range(4)]
    met = set()
    for step in range(400):
        expected = whole.batch(step)
        parts = [loader.batch(step) for loader in ranks]
        found = [np.concatenate([getattr(p, f) for p in parts]) for f in ("tokens", "targets", "lengths")]
        for i, (name, row) in enumerate(expected.sample_ids):
            if name == "long" and row in rows:
                met.add(row)
                assert not found[0][i].any()
                assert (found[1][i] == IGNORE_INDEX).all()
                assert found[2][i] == 0
            else:
                assert np.array_equal(found[0][i], expected.tokens[i])
                assert np.array_equal(found[1][i], expected.targets[i])
    assert met == rows
    assert {key for loader in ranks for key in loader.damaged} == {("long", row) for row in rows}
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == sum(len(loader.damaged) for loader in ranks) >= len(rows)
    assert all("is left out" in line and "its checksum differs" in line for line in warnings)


@pytest.mark.parametrize("budget", [0, 1])
def test_one_damaged_row_too_many(copy, budget):
    damage(copy, "long")
    loader = Loader(copy, 32, 8, 1, max_damaged_rows=budget)
    with pytest.raises(DataError, match="its checksum differs") as error:
        [loader.batch(step) for step in range(400)]
    assert len(loader.damaged) == budget
    assert "\n" not in str(error.value)
    assert ("max_damaged_rows=1 allowed" in str(error.value)) == bool(budget)


def test_negative_settings_and_empty_sources(folder, tmp_path, make_folder):
    with pytest.raises(DataError, match="max_damaged_rows=-1 must be 0 or above"):
        Loader(folder, 32, 8, 0, max_damaged_rows=-1)
    empty = make_folder(tmp_path / "data", {"short": {"train": [], "validation": []}})
    for options in VARIANTS[::2] + [{"packing": "best_fit"}]:
        with pytest.raises(DataError, match="has 0 train tokens, less than one row"):
            Loader(empty, 1, 1, 0, **options)
