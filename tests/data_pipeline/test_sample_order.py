import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.loading.sample_order import (
    MIXTURE_PERIOD,
    Order,
    Stage,
    key_of,
    mixture_table,
    permute,
    stage_starts,
)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_permute_is_a_permutation(size):
    for key in (0, 1, 2**64 - 1, key_of("x", size)):
        assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_permute_is_the_same_for_scalars_shapes_and_arrays():
    whole = permute(np.arange(1000), 1000, 7)
    assert [int(permute(i, 1000, 7)) for i in range(1000)] == whole.tolist()
    assert np.array_equal(permute(np.arange(1000).reshape(10, 100), 1000, 7), whole.reshape(10, 100))
    assert permute(np.zeros(0, dtype=np.int64), 5, 7).shape == (0,)


def test_permute_does_not_change_between_versions():
    """An old run must be resumable: these numbers may never change."""
    assert permute(np.arange(10), 10, 42).tolist() == [6, 1, 2, 8, 9, 4, 7, 5, 0, 3]
    assert int(permute(10**12 - 1, 10**12, 42)) == 634953924963


def reference(index: int, size: int, key: int) -> int:
    """The Feistel network in Python's own integers, one index at a time."""
    half = max(1, -(-(size - 1).bit_length() // 2))
    while True:
        left, right = index >> half, index % 2**half
        for number in range(1, 7):
            x = (right * 0xD1342543DE82EF95 + key + number * 0x9E3779B97F4A7C15) % 2**64
            x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
            left, right = right, left ^ (x ^ x >> 31) % 2**half
        index = left << half | right
        if index < size:
            return index


@pytest.mark.parametrize("size", [1, 2, 5, 64, 65, 10**6, 10**12, 2**62])
def test_permute_equals_the_reference(size):
    indices = np.unique(np.random.default_rng(0).integers(0, size, 50))
    for key in (0, 42, 2**64 - 1):
        assert permute(indices, size, key).tolist() == [reference(i, size, key) for i in indices.tolist()]


def test_permute_mixes_and_depends_on_the_key():
    size = 10_000
    a, b = permute(np.arange(size), size, 1), permute(np.arange(size), size, 2)
    assert np.mean(a == b) < 0.002
    assert abs(np.corrcoef(np.arange(size), a)[0, 1]) < 0.04
    # neighbours land anywhere: the mean distance of two random positions is a third of the size
    assert np.mean(np.abs(np.diff(a))) == pytest.approx(size / 3, rel=0.05)


def test_permute_refuses_an_index_outside():
    with pytest.raises(AssertionError):
        permute(5, 5, 0)
    with pytest.raises(AssertionError):
        permute(-1, 5, 0)


@pytest.mark.parametrize(
    "weights", [[1], [1, 1], [0.5, 0.15, 0.25, 0.1], [1000, 1], [1, 2, 3, 4, 5, 6, 7], [0.1] * 13]
)
def test_mixture_follows_the_weights_at_every_prefix(weights):
    table = mixture_table({str(i): w for i, w in enumerate(weights)})
    shares = np.array(weights) / sum(weights)
    one_hot = table[:, None] == np.arange(len(weights))
    counts = one_hot.sum(axis=0)
    assert counts.sum() == len(table) == MIXTURE_PERIOD
    assert np.all(np.abs(counts - shares * MIXTURE_PERIOD) < 1)
    ahead = np.cumsum(one_hot, axis=0) - np.arange(1, MIXTURE_PERIOD + 1)[:, None] * counts / MIXTURE_PERIOD
    assert ahead.max() < 1
    assert ahead.min() > -len(weights) / 2 - 1


def test_mixture_refuses_a_weight_that_is_never_drawn():
    with pytest.raises(DataError, match="'tiny' has weight 1e-06"):
        mixture_table({"big": 1.0, "tiny": 1e-6})


def order_of(weights: dict[str, float], rows: dict[str, int], seed: int) -> Order:
    """One stage, one block a source."""
    return Order([(0, weights)], {name: np.array([n]) for name, n in rows.items()}, seed)


def test_locate_against_counting_one_by_one():
    weights, rows = {"a": 0.6, "b": 0.3, "c": 0.1}, {"a": 70, "b": 1, "c": 13}
    order = order_of(weights, rows, seed=3)
    sources, epochs, located = order.locate(np.arange(10_000))
    table = mixture_table(weights)
    drawn = dict.fromkeys(weights, 0)
    for counter in range(10_000):
        name = list(weights)[table[counter % len(table)]]
        epoch, position = divmod(drawn[name], rows[name])
        assert order.names[sources[counter]] == name
        assert epochs[counter] == epoch
        if counter % 97 == 0:
            assert order.drawn(counter) == drawn
            assert located[counter] == int(permute(position, rows[name], key_of(3, name, epoch)))
        drawn[name] += 1


def test_every_row_once_per_epoch_and_another_order_each_time():
    order = order_of({"a": 0.7, "b": 0.3}, {"a": 70, "b": 11}, seed=0)
    sources, epochs, rows = order.locate(np.arange(3000))
    orders = []
    for number, size in ((0, 70), (1, 11)):
        for epoch in range(int(epochs[sources == number].max())):
            seen = rows[(sources == number) & (epochs == epoch)]
            assert sorted(seen.tolist()) == list(range(size))
            orders.append(seen.tolist())
    assert len({tuple(x) for x in orders}) == len(orders)


def test_locate_far_away_costs_the_same():
    order = order_of({"a": 0.7, "b": 0.3}, {"a": 70, "b": 11}, seed=0)
    far = 10**12 + np.arange(5)
    sources, epochs, rows = order.locate(far)
    assert order.names == ("a", "b")
    for counter, source, epoch in zip(far.tolist(), sources.tolist(), epochs.tolist(), strict=True):
        assert epoch == order.drawn(counter)["ab"[source]] // (70, 11)[source]
    assert np.all((rows >= 0) & (rows < np.array([70, 11])[sources]))


def test_permute_with_a_size_and_a_key_for_each():
    sizes = np.repeat([1, 5, 64, 1000], 25)
    keys = np.tile(np.array([0, 7, 2**64 - 1, 3, 9], dtype=np.uint64), 20)
    index = np.arange(100) % sizes
    expected = [
        int(permute(i, n, k)) for i, n, k in zip(index.tolist(), sizes.tolist(), keys.tolist(), strict=True)
    ]
    assert permute(index, sizes, keys).tolist() == expected


def test_stages_against_counting_one_by_one():
    """Weights that change, a source that comes late, one that goes: epochs go on where they were."""
    stages = [(0, {"a": 0.5, "b": 0.5}), (1000, {"a": 0.2, "c": 0.8}), (6007, {"b": 1.0, "a": 0.0})]
    blocks = {"a": np.array([70]), "b": np.array([11]), "c": np.array([5, 0, 8])}
    order = Order(stages, blocks, seed=3)
    sources, epochs, rows = order.locate(np.arange(9000))
    drawn = dict.fromkeys("abc", 0)
    tables = [mixture_table({name: w for name, w in weights.items() if w}) for _, weights in stages]
    for counter in range(9000):
        stage = sum(counter >= start for start, _ in stages) - 1
        start, weights = stages[stage]
        names = [name for name in "abc" if weights.get(name)]
        table = mixture_table({name: weights[name] for name in names}) if counter == start else tables[stage]
        tables[stage] = table
        name = names[table[(counter - start) % len(table)]]
        if counter % 501 == 0:
            assert order.drawn(counter) == drawn
        assert order.names[sources[counter]] == name
        assert epochs[counter] == drawn[name] // int(blocks[name].sum())
        drawn[name] += 1
    for number, name in enumerate("abc"):
        size = int(blocks[name].sum())
        seen = rows[sources == number]
        assert len(seen) == drawn[name] > 2 * size
        for epoch in range(len(seen) // size):
            assert sorted(seen[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))
    shuffled = np.random.default_rng(0).permutation(9000)[:500]
    assert np.array_equal(order.locate(shuffled)[2], rows[shuffled])


@pytest.mark.parametrize("sizes", [[3], [1, 1, 1, 1], [4, 0, 7, 2, 9], [0, 5]])
def test_blocks_one_after_another_in_another_order_each_epoch(sizes):
    order = Order([(0, {"a": 1.0})], {"a": np.array(sizes)}, seed=1)
    total, edges = sum(sizes), np.cumsum([0, *sizes])
    epochs = order.locate(np.arange(20 * total))[2].reshape(20, total)
    block_orders, row_orders = set(), set()
    for number, epoch in enumerate(epochs):
        assert sorted(epoch.tolist()) == list(range(total))
        blocks = np.searchsorted(edges, epoch, side="right") - 1
        changes = np.flatnonzero(np.diff(blocks, prepend=-1))
        assert len(changes) == sum(size > 0 for size in sizes)  # each block in one go
        block_orders.add(tuple(blocks[changes].tolist()))
        row_orders.add(tuple(epoch.tolist()))
        following = [*blocks[changes].tolist(), None]
        for i, change in enumerate(changes.tolist()):
            found = order.following_blocks(number * total + change)["a"]
            after = order.locate(np.array([(number + 1) * total]))[2][0]
            expected = (
                following[i + 1] if i + 1 < len(changes) else np.searchsorted(edges, after, "right") - 1
            )
            assert found == expected
    assert len(row_orders) > 1
    assert len(block_orders) > 1 or len(changes) == 1


def test_stage_starts_are_whole_batches():
    stages = [Stage(0, {"a": 1}), Stage(1, {"b": 1}), Stage(641, {"a": 1}), Stage(1280, {"b": 2})]
    starts = stage_starts(stages, ["a", "b"], batch_tokens=320, batch_rows=5)
    assert [first for first, _ in starts] == [0, 5, 15, 20]
    assert stage_starts([], ["a"], 320, 5) == []


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([Stage(5, {"a": 1})], r"stages\[0\] starts at tokens=5: the first stage starts at 0"),
        ([Stage(0, {"a": 1}), Stage(0, {"a": 1})], r"stages\[1\] with tokens=0 .* raise tokens"),
        ([Stage(0, {"a": 1}), Stage(5, {"a": 1}), Stage(9, {"a": 1})], r"stages\[2\] with tokens=9"),
        ([Stage(0, {"alpha": 1})], "unknown source 'alpha'"),
        ([Stage(0, {"a": -1.0})], "a=-1.0 must be"),
        ([Stage(0, {"a": float("nan")})], "a=nan is not a finite number"),
        ([Stage(0, {"a": 0.0})], "no source has a weight above 0"),
        ([Stage(0, {})], "no source has a weight above 0"),
    ],
)
def test_wrong_stages_are_one_line(stages, message):
    with pytest.raises(DataError, match=message) as error:
        stage_starts(stages, ["a", "b"], batch_tokens=320, batch_rows=5)
    assert "\n" not in str(error.value)
