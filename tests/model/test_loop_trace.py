"""Halting, its loss terms and merged keys against their definitions, by brute force."""

import math

import pytest
import torch

from model import ModelConfig, ZeroModel
from model.cache import kept_keys, slot_of
from model.config.recurrence import HaltingConfig, RecurrenceConfig
from model.context import segments
from model.halting import document_mean
from model.loop_trace import hoyer_square, loop_trace

from .conftest import BLOCK, SMALL

P = torch.tensor([[[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]], [[0.0, 0.6, 0.4], [0.1, 0.2, 0.7]]])  # (B, T, N)
RAN = torch.tensor([[[1, 1, 1], [1, 0, 0]], [[1, 1, 1], [1, 1, 1]]]).bool()
STATES = list(torch.randn(4, 2, 2, 5, generator=torch.Generator().manual_seed(0)).unbind())


def trace(mask: torch.Tensor | None = None, **options):
    config = HaltingConfig(**options)
    return loop_trace(config, list(P.unbind(-1)), list(RAN.unbind(-1)), STATES, STATES[-1], None, mask)


def brute(values: list[list[float]]) -> float:
    """Mean over each row's tokens, summed over the rows."""
    return sum(sum(row) / len(row) for row in values)


def test_act_costs_steps_and_remainder():
    found = trace(kind="act")
    expected = [[3 + 0.5, 1 + 1.0], [3 + 0.4, 3 + 0.7]]
    torch.testing.assert_close(found.ponder_cost, torch.tensor(expected))
    assert found.terms[0].item() == pytest.approx(brute(expected))
    assert found.num_iterations.tolist() == [[3, 1], [3, 3]]


def test_ponder_is_the_divergence_from_a_truncated_geometric_prior():
    prior = [0.3 * 0.7**n for n in range(3)]
    prior = [g / sum(prior) for g in prior]
    rows = [
        [sum(p * math.log(p / g) for p, g in zip(token, prior, strict=True) if p > 0) for token in row]
        for row in P.tolist()
    ]
    assert trace(kind="ponder", ponder_prior=0.3).terms[0].item() == pytest.approx(brute(rows), rel=1e-5)


def test_entropy_is_minus_the_entropy():
    rows = [[sum(p * math.log(p) for p in token if p > 0) for token in row] for row in P.tolist()]
    assert trace(kind="entropy").terms[0].item() == pytest.approx(brute(rows), rel=1e-5)


def test_stability_counts_after_halting_only():
    rows = []
    for b in range(2):
        row = []
        for t in range(2):
            halted, total = 0.0, 0.0
            for n in range(3):
                before, after = STATES[n][b, t], STATES[n + 1][b, t]
                total += halted * float((after - before).norm() / before.norm()) ** 2
                halted += float(P[b, t, n])
            row.append(total)
        rows.append(row)
    found = trace(kind="ponder", stability_weight=1.0).terms[1]
    assert found.item() == pytest.approx(brute(rows), rel=1e-5)


def test_residuals_are_means_over_the_real_tokens_that_ran():
    mask = torch.tensor([[True, True], [False, True]])
    change = [(b - a).norm(dim=-1) / a.norm(dim=-1) for a, b in zip(STATES, STATES[1:], strict=False)]
    first = (change[0][0, 0] + change[0][0, 1] + change[0][1, 1]) / 3
    second = (change[1][0, 0] + change[1][1, 1]) / 2
    torch.testing.assert_close(trace(mask).residuals[:2], torch.stack((first, second)))


def test_padding_is_left_out_of_the_terms():
    mask = torch.tensor([[True, False], [True, True]])
    full = trace(kind="act").ponder_cost
    expected = full[0, 0] + full[1].mean()
    torch.testing.assert_close(trace(mask, kind="act").terms[0], expected)


def test_hoyer_square_spans_zero_to_one():
    one = torch.zeros(7)
    one[3] = -2.0
    assert hoyer_square(one).item() == pytest.approx(0.0, abs=1e-6)
    assert hoyer_square(torch.full((7,), -3.0)).item() == pytest.approx(1.0)
    x = torch.randn(100, 7, generator=torch.Generator().manual_seed(0))
    assert ((hoyer_square(x) >= 0) & (hoyer_square(x) <= 1)).all()


def test_information_is_high_for_equal_states_and_none_for_unrelated_ones():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1, 40, 64, generator=generator).unbind()
    one = torch.ones(1, 40)

    def lost(before, after, segment=None):
        config = HaltingConfig(information_weight=1.0)
        return loop_trace(config, [one], [one.bool()], [before, after], after, segment, None).terms[3].item()

    assert lost(a, a) == pytest.approx(-math.log(40), abs=0.05)  # the state identifies the position
    assert lost(a, b) > -0.1
    halves = torch.arange(40)[None] // 20
    assert lost(a, a, halves) == pytest.approx(-math.log(20), abs=0.05)


@pytest.mark.parametrize("starts", [None, [[0, 3, 4, 9]], [[0, 9, 9, 9]]])
def test_document_mean_equals_a_loop_over_tokens(starts):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 9, generator=generator)
    real = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 1, 1]]).bool()  # a hole, as speculative decoding leaves one
    if starts is not None:
        real[:] = True
    segment = segments(real, None if starts is None else torch.tensor(starts))
    found = document_mean(values, segment)
    for t in range(9):
        if real[0, t]:
            mine = [values[0, j] for j in range(t + 1) if segment[0, j] == segment[0, t]]
            torch.testing.assert_close(found[0, t], torch.stack(mine).mean())
    torch.testing.assert_close(document_mean(values, None)[0, 8], values.mean())


def test_merges_of_keys_equal_their_definitions():
    keys = torch.randn(4, 1, 2, 3, generator=torch.Generator().manual_seed(0)).unbind()
    running = torch.tensor([[True, False]])  # from step 2 on the second token has halted

    def merged(cache: str, **options):
        config, kept = RecurrenceConfig(placement="block", cache=cache, **options), None
        for step, new in enumerate(keys):
            kept = kept_keys(config, kept, new, step, None if step < 2 else running)
        return kept

    def tokens(first, second):  # (1, 2, 3)
        return torch.stack((first[0, 0], second[0, 1]))[None]

    a, b, c, d = keys
    expected = {
        "per_step": tokens(d, b),
        "last": tokens(d, b),
        "first": a,
        "average": tokens((a + b + c + d) / 4, (a + b) / 2),
    }
    for cache, value in expected.items():
        torch.testing.assert_close(merged(cache)[0], value)
        assert len(merged(cache)) == 1
    ema_2 = 0.6 * a + 0.4 * b
    ema_4 = 0.6 * (0.6 * ema_2 + 0.4 * c) + 0.4 * d
    torch.testing.assert_close(merged("ema", ema_decay=0.6)[0], tokens(ema_4, ema_2))
    found = merged("parallel")
    for part, value in zip(found, (a, b, tokens(c, b), tokens(d, b)), strict=True):
        torch.testing.assert_close(part, value)
    found = merged("parallel", virtual_layers=1, num_steps=4)
    assert len(found) == 1
    torch.testing.assert_close(found[0], tokens(d, b))


def test_slots_of_the_cache():
    def slots(**options):
        return [slot_of(RecurrenceConfig(placement="block", num_steps=4, **options), n) for n in range(4)]

    assert slots() == [0, 1, 2, 3]
    assert slots(virtual_layers=2) == [0, 1, 1, 1]
    assert slots(cache="parallel", virtual_layers=3) == [0, 1, 2, 2]
    assert slots(cache="average") == [0, 0, 0, 0]


@pytest.mark.parametrize("cut", [1, 2, 3, 9])
def test_truncated_back_propagation_equals_detaching_the_state_by_hand(tokens, cut):
    section = {**BLOCK, "num_steps": 3, "injection": "gate"}
    whole = ZeroModel(ModelConfig.from_dict({**SMALL, "recurrence": section})).train()
    model = ZeroModel(
        ModelConfig.from_dict({**SMALL, "recurrence": {**section, "backprop_steps": cut}})
    ).train()
    loss, expected = (m(tokens, targets=tokens).loss for m in (model, whole))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    unit, seen = whole.model.recurrence[0], []
    original = unit._advance

    def advance(state, initial, core, step, own, running, kept):
        seen.append(step)
        new, out = original(state, initial, core, step, own, running, kept)
        return (new.detach() if step < 3 - cut else new), out

    unit._advance = advance
    whole(tokens, targets=tokens).loss.backward()
    assert seen == [0, 1, 2]
    for (name, a), b in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
