"""R-KV against a literal reading of its formulas, and the compressed cache against a masked full one."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import model.attention as attention_module
import model.generate as generate_module
from model.cache import LatentCache
from model.latent_cot.rkv import cached_keys, expanded_keys, importance, joint_score, redundancy, select

WINDOW, LAMBDA = 8, 0.1
KINDS = [
    "deepseek",
    "grouped_query",
    "loop",
    "embedding_mixing",
]  # in each, one attention call reads one slot


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(v) for v in values]
    return [p / sum(powers) for p in powers]


def literal_importance(query: torch.Tensor, keys: torch.Tensor, scale: float) -> list[list[float]]:
    """query (T, H, K), keys (S, G, K) -> a list of S numbers per head; no padding, no batch."""
    (T, H, _), (S, G, _) = query.shape, keys.shape
    size, result = H // G, []
    for g in range(G):
        rows = []
        for t in range(T):
            heads = range(g * size, (g + 1) * size)
            rows.append(
                softmax([max(scale * float(query[t, h] @ keys[s, g]) for h in heads) for s in range(S)])
            )
        mean = [sum(row[s] for row in rows) / T for s in range(S)]
        result.append([max(mean[max(s - 3, 0) : s + 4]) for s in range(S)])
    return result


def literal_redundancy(keys: torch.Tensor) -> list[list[float]]:
    """keys (S, G, K) -> a list of S numbers per head."""
    S, G, _ = keys.shape
    result = []
    for g in range(G):
        key = [keys[s, g] for s in range(S)]
        cosine = [[float(a @ b / (a.norm() * b.norm())) for b in key] for a in key]
        for i in range(S):
            cosine[i][i] = 0.0
            similar = [j for j in range(S) if cosine[i][j] > 0.5]
            if similar:
                cosine[i][max(similar)] = 0.0
        result.append(softmax([sum(cosine[i][j] for i in range(S)) / S for j in range(S)]))
    return result


def repetitive_keys(S: int, G: int, seed: int = 0) -> torch.Tensor:
    """(S, G, 6), about half of which nearly repeat another."""
    keys = random(S, G, 6, seed=seed)
    source = torch.randint(0, S, (S, G), generator=torch.Generator().manual_seed(seed))
    copies = keys.gather(0, source[..., None].expand(-1, -1, 6)) + 0.2 * random(S, G, 6, seed=seed + 1)
    return torch.where(torch.rand(S, G, 1, generator=torch.Generator().manual_seed(seed)) < 0.5, copies, keys)


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 3), (4, 1)])
def test_scores_equal_the_literal_formulas_however_the_batch_is_padded(heads, groups):
    lengths, places, queries = [11, 4, 1], 13, [8, 3, 5]
    rows = [
        (random(t, heads, 6, seed=n), repetitive_keys(n, groups, n))
        for t, n in zip(queries, lengths, strict=True)
    ]
    keys, mask = random(3, places, groups, 6, seed=9), torch.zeros(3, places, dtype=torch.bool)
    query, query_mask = random(3, 8, heads, 6, seed=8), torch.zeros(3, 8, dtype=torch.bool)
    for row, (q, k) in enumerate(rows):
        keys[row, places - len(k) :], mask[row, places - len(k) :] = k, True
        query[row, : len(q)], query_mask[row, : len(q)] = q, True
    found = importance(query, keys, mask, query_mask, 0.4), redundancy(keys, mask)
    similar = 0
    for row, (q, k) in enumerate(rows):
        expected = literal_importance(q, k, 0.4), literal_redundancy(k)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(
                ours[row, :, places - len(k) :], torch.tensor(theirs), rtol=0, atol=1e-6
            )
        unit = F.normalize(k, dim=-1)
        similar += int((torch.einsum("sgk,tgk->gst", unit, unit) > 0.5).sum()) - k.shape[0] * groups
    assert similar > 10  # so that the latest neighbour is indeed zeroed


def test_of_repeated_keys_the_latest_copy_stays():
    keys = torch.eye(6)[:, None].clone()
    keys[[0, 2, 5]] = keys[0].clone()
    mask = torch.ones(1, 6, dtype=torch.bool)
    kept = select(torch.zeros(1, 1, 6), keys[None], mask, 4)
    assert kept.tolist() == [[[1, 3, 4, 5]]]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_selection_is_the_best_of_all_subsets_in_temporal_order(seed, shared):
    S, G, budget = 8, 2, 3
    keys, weight = repetitive_keys(S, G, seed), random(G, S, seed=seed).softmax(-1)
    score = LAMBDA * weight - (1 - LAMBDA) * torch.tensor(literal_redundancy(keys))
    score = score.mean(0, keepdim=True) if shared else score
    mask = torch.ones(1, S, dtype=torch.bool)
    kept = select(weight[None], keys[None], mask, budget, shared=shared)
    for row, found in zip(score, kept[0].tolist(), strict=True):
        best = max(itertools.combinations(range(S), budget), key=lambda places: float(sum(row[list(places)])))
        assert found == list(best)  # combinations are in ascending order


@pytest.mark.parametrize("policy", ["rkv", "random", "uniform"])
def test_padding_batch_order_and_batch_size_change_no_selection(policy):
    lengths, budget = [9, 3, 20], 5
    keys = [repetitive_keys(n, 2, n) for n in lengths]
    weight = [random(2, n, seed=n).softmax(-1) for n in lengths]
    alone = [
        select(w[None], k[None], torch.ones(1, len(k), dtype=torch.bool), budget, policy=policy, seed=4)[0]
        for w, k in zip(weight, keys, strict=True)
    ]
    for order in ([0, 1, 2], [2, 0, 1]):
        for left in (True, False):
            pads = [(23 - lengths[i], 0) if left else (0, 23 - lengths[i]) for i in order]
            batch = torch.stack(
                [F.pad(keys[i], (0, 0, 0, 0, *p), value=3.0) for i, p in zip(order, pads, strict=True)]
            )
            weights = torch.stack([F.pad(weight[i], p, value=9.0) for i, p in zip(order, pads, strict=True)])
            mask = torch.stack(
                [F.pad(torch.ones(lengths[i]), p) for i, p in zip(order, pads, strict=True)]
            ).bool()
            kept = select(weights, batch, mask, budget, policy=policy, seed=4)
            assert kept.shape == (3, 2, budget)
            for row, i in enumerate(order):
                n = min(lengths[i], budget)
                assert torch.equal(kept[row, :, :n] - pads[row][0], alone[i][:, :n])
                real = mask[row].expand(2, -1).gather(1, kept[row])
                assert real[:, :n].all()
                assert not real[:, n:].any()


def test_uniform_is_even_and_random_follows_its_seed():
    mask = torch.ones(1, 12, dtype=torch.bool)
    keys, weight = random(1, 12, 2, 6), torch.zeros(1, 2, 12)
    assert select(weight, keys, mask, 4, policy="uniform").tolist() == [[[2, 5, 8, 11]] * 2]
    draws = [select(weight, keys, mask, 4, policy="random", seed=s) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    chosen = torch.cat([select(weight, keys, mask, 3, policy="random", seed=s).flatten() for s in range(600)])
    share = chosen.bincount(minlength=12) / 1200  # 3 of 12, by 600 seeds and 2 heads
    assert (share - 3 / 12).abs().max() < 4 * (0.25 * 0.75 / 1200) ** 0.5


def test_learned_positions_are_not_taken_back(build, tokens):
    model, cache = build("gpt2"), LatentCache()
    model(tokens, cache=cache)
    found = expanded_keys(model, 1, cache._slots[1, 0], torch.arange(17)[None])
    for ours, theirs in zip(found, cached_keys(model, 1, cache._slots[1, 0]), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("variant", [*KINDS, "plain", "yarn"])
def test_expanded_keys_are_those_of_position_zero(build, tokens, variant):
    model, early, late = build(variant), LatentCache(), LatentCache()
    late_at = torch.arange(30, 47)[None].expand(3, -1)
    model(tokens, cache=early, position_ids=torch.zeros_like(tokens))
    model(tokens, cache=late, position_ids=late_at)
    first = (0, 0)  # later layers see the result of attention to rotated keys
    held, expected = late._slots[first][:, :17], cached_keys(model, 0, early._slots[first][:, :17])
    if variant == "yarn":  # its rotation also scales at position 0
        expected = expanded_keys(model, 0, early._slots[first][:, :17], torch.zeros_like(tokens))
    for ours, theirs in zip(expanded_keys(model, 0, held, late_at), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "reads"),
    [
        ({}, [1, 1, 1]),
        ({"cache": "parallel"}, [3, 2, 1]),  # step n reads its own keys and the earlier steps'
        ({"cache": "first"}, [3]),
        ({"virtual_layers": 2}, [1, 2]),
    ],
)
def test_every_slot_collects_the_queries_that_read_it(build, tokens, options, reads):
    loop = {"placement": "block", "ranges": [[1, 1]], "num_steps": 3, **options}
    cache = LatentCache()
    cache.queries = {}
    build("loop", recurrence=loop)(tokens, cache=cache)
    counts = {slot: len(queries) for slot, queries in cache.queries.items()}
    assert counts == {(0, 0): 1, (2, 0): 1} | {(1, n): count for n, count in enumerate(reads)}
    assert set(counts) == set(cache._slots)
    assert {tuple(q.shape) for queries in cache.queries.values() for q in queries} == {(3, 17, 3, 10)}


class MaskedReplay:
    """Reads one row's tokens one by one over a full cache; attention sees what R-KV would have kept.

    Everything is computed for one row without padding, from what the attention function is given.
    """

    def __init__(
        self, model, prompt: torch.Tensor, budget: int, buffer: int, lambda_: float, window: int, monkeypatch
    ) -> None:
        monkeypatch.setattr(attention_module, "attend", self.attend)
        self.lambda_, self.window = lambda_, window
        self.model, self.first, self.budget, self.limit = model, len(prompt), budget, budget + buffer
        self.cache, self.cuts = LatentCache(), 0
        self.kept: dict[int, list[list[int]]] = {}  # by call and head, the generated tokens' indices
        self.queries: dict[int, list[torch.Tensor]] = {}
        self.keys: dict[int, torch.Tensor] = {}
        self.prefill = True
        self.logits = [self._read(prompt)]
        self.prefill = False

    def read(self, token: torch.Tensor) -> torch.Tensor:
        """Logits (V,) after one more token (1,)."""
        logits = self._read(token)
        if len(self.kept[0][0]) == self.limit:
            self._cut()
        return logits

    def _read(self, tokens: torch.Tensor) -> torch.Tensor:
        self.call = 0
        return self.model(tokens[None], cache=self.cache).logits[0, -1]

    def attend(self, query, key, value, context, scale):
        call, self.call, self.scale = self.call, self.call + 1, scale
        (T, H), (S, G) = query.shape[1:3], key.shape[1:3]
        allowed = torch.ones(G, T, S, dtype=torch.bool).tril(S - T)
        if self.prefill:
            self.kept[call], self.queries[call] = [[] for _ in range(G)], []
        else:
            self.queries[call].append(query[0, 0])
            self.keys[call] = key[0]
            allowed[:, :, self.first :] = False
            for head, places in enumerate(self.kept[call]):
                places.append(S - 1)
                allowed[head, :, places] = True
        out = torch.empty(1, T, H, value.shape[-1])
        for h in range(H):
            g = h * G // H
            weights = (scale * query[0, :, h] @ key[0, :, g].T).masked_fill(~allowed[g], -math.inf)
            out[0, :, h] = weights.softmax(-1) @ value[0, :, g]
        return out

    def _cut(self) -> None:
        self.cuts += 1
        share, window = self.lambda_, self.window
        for call, heads in self.kept.items():
            scores = []
            for g, places in enumerate(heads):
                size = self.queries[call][0].shape[0] // len(heads)
                query = torch.stack(self.queries[call][-window:])[:, g * size : (g + 1) * size]
                keys = self.keys[call][places, g : g + 1]
                important = literal_importance(query, keys[:-window], self.scale)[0]
                redundant = literal_redundancy(keys)[0][:-window]
                scores.append(
                    [share * i - (1 - share) * r for i, r in zip(important, redundant, strict=True)]
                )
            if self.model.config.use_mla:
                scores = [[sum(s) / len(s) for s in zip(*scores, strict=True)]] * len(heads)
            for g, (score, places) in enumerate(zip(scores, heads, strict=True)):
                ranked = sorted(range(len(score)), key=lambda s: -score[s])[: self.budget - window]
                heads[g] = [places[s] for s in sorted(ranked)] + places[-window:]


@pytest.mark.parametrize(
    ("variant", "score"),
    [
        *((kind, {}) for kind in KINDS),
        ("deepseek", {"kv_lambda": 0.7, "kv_window": 3}),
        ("grouped_query", {"kv_lambda": 1.0, "kv_window": 9}),
        ("grouped_query", {"kv_lambda": 0.0, "kv_window": 1}),
    ],
)
def test_a_compressed_cache_equals_masking_a_whole_one(build, monkeypatch, variant, score):
    model, lengths, budget, buffer, new = build(variant), [6, 3], 10, 5, 22
    lambda_, window = score.get("kv_lambda", LAMBDA), score.get("kv_window", WINDOW)
    prompts = [torch.randint(1, 61, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    batch = torch.stack([F.pad(p, (6 - len(p), 0)) for p in prompts])
    mask = torch.stack([F.pad(torch.ones_like(p), (6 - len(p), 0)) for p in prompts])
    seen: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, out: seen.append(out[:, -1]))
    options = {"attention_mask": mask, "kv_budget": budget, "kv_buffer": buffer, **score}
    written = model.generate(batch, new, **options)
    whole = model.generate(batch, new, attention_mask=mask)
    hook.remove()
    compressed, uncompressed = torch.stack(seen[:new]), torch.stack(seen[new:])
    assert torch.equal(model.generate(batch, new, **options), written)
    differ = (compressed - uncompressed).abs().amax((1, 2)) > 1e-3
    assert torch.equal(written[:, : 6 + 15], whole[:, : 6 + 15])
    assert not differ[: budget + buffer + 1].any()
    assert differ[budget + buffer + 1]

    monkeypatch.setattr(
        type(model.model.layers[0].self_attn), "_absorbing_is_cheaper", lambda *_: False, False
    )
    with torch.no_grad():
        for row, prompt in enumerate(prompts):
            replay = MaskedReplay(model, prompt, budget, buffer, lambda_, window, monkeypatch)
            logits = replay.logits + [replay.read(token[None]) for token in written[row, 6:-1]]
            assert replay.cuts == 2
            torch.testing.assert_close(compressed[:, row], torch.stack(logits), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("variant", "overrides"),
    [
        *((kind, {}) for kind in KINDS),
        *(
            ("loop", {"recurrence": {"placement": "block", "ranges": [[1, 1]], "num_steps": 3, **cache}})
            for cache in ({"cache": "parallel"}, {"cache": "first"}, {"cache": "ema"}, {"virtual_layers": 2})
        ),
        ("deepseek", {"recurrence": {"placement": "kv", "num_steps": 2}}),
    ],
)
def test_a_budget_never_exceeded_changes_nothing_and_a_small_one_saves_memory(
    build, tokens, monkeypatch, variant, overrides
):
    model, caches, seen = build(variant, **overrides), [], []

    def remembered() -> LatentCache:
        caches.append(LatentCache())
        return caches[-1]

    monkeypatch.setattr(generate_module, "LatentCache", remembered)
    model.lm_head.register_forward_hook(lambda module, inputs, out: seen.append(out))
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    runs = [
        model.generate(tokens, 18, attention_mask=padding, **options)
        for padding in (None, mask)
        for options in ({}, {"kv_budget": 18, "kv_buffer": 1}, {"kv_budget": 9, "kv_buffer": 4})
    ]
    logits = torch.stack(seen).unflatten(0, (6, 18))
    slots = caches[0].numel() // caches[0].length
    for free, roomy, tight in ((0, 1, 2), (3, 4, 5)):
        assert torch.equal(logits[free], logits[roomy])
        assert torch.equal(runs[free], runs[roomy])
        assert caches[roomy].length == caches[free].length == 17 + 17
        # Cut from 13 held tokens to 9, and again 4 tokens later, at the 17th read.
        assert caches[tight].length == 17 + 9
        assert caches[tight].numel() == slots * (17 + 9)
        assert logits[tight].isfinite().all()


def test_rows_that_ended_change_nothing_for_the_others(build, tokens):
    model, options = build("grouped_query"), {"kv_budget": 9, "kv_buffer": 3}
    free = model.generate(tokens, 30, **options)
    ends = torch.tensor([2, 14, 99])
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    ended = model.generate(
        tokens, 30, attention_mask=mask, stopping=lambda new: new.shape[1] >= ends, **options
    )
    assert torch.equal(ended[1:, : 17 + 14], free[1:, : 17 + 14])
    assert torch.equal(ended[2], free[2])
    assert not ended[0, 17 + 2 :].any()


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("deepseek", {"kv_budget": 8}, "kv_budget=8 and kv_buffer=128: the budget must be at least 9"),
        ("deepseek", {"kv_budget": 9, "kv_buffer": 0}, "kv_buffer=0: .* the buffer at least 1"),
        ("deepseek", {"kv_budget": 9, "kv_window": 9}, "at least 10, since the last kv_window=9 tokens"),
        ("deepseek", {"kv_budget": 9, "kv_window": 0}, "kv_window=0 must be at least 1"),
        ("deepseek", {"kv_budget": 9, "kv_lambda": 1.1}, "kv_lambda=1.1 must lie in 0 <= kv_lambda <= 1"),
        ("deepseek", {"kv_budget": 9, "kv_lambda": math.nan}, "kv_lambda=nan must lie in"),
        ("wide_mixing", {"kv_budget": 9}, "with embedding_mixing=10 needs more of every token"),
        ("pause", {"kv_budget": 9}, "with num_pause_tokens=2 needs"),
        ("memory", {"kv_budget": 9}, "with num_memory_tokens=2 needs"),
    ],
)
def test_impossible_budgets_and_models_are_refused(build, tokens, variant, options, message):
    model = build("embedding_mixing", embedding_mixing=10) if variant == "wide_mixing" else build(variant)
    with pytest.raises(ValueError, match=message):
        model.generate(tokens, 4, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"policy": "oldest"}, "policy=oldest is unknown"), ({"budget": 0}, "budget=0 candidates")],
)
def test_impossible_selections_are_refused(options, message):
    keys, mask = random(1, 4, 1, 6), torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        select(torch.zeros(1, 1, 4), keys, mask, **{"budget": 2, **options})


def test_joint_score_weighs_both():
    one, two = torch.tensor([0.5]), torch.tensor([0.25])
    assert joint_score(one, two, 0.1).item() == pytest.approx(0.1 * 0.5 - 0.9 * 0.25)
