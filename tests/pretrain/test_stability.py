"""Which steps are skipped: compared with a plain robust z-score, and in a real run."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loading.loader import Loader
from pretrain.config import StabilityConfig
from pretrain.stability import SpikeGuard

finite = st.floats(0.125, 1000, width=32)


def judged(guard: SpikeGuard, loss: float, norm: float) -> bool:
    return bool(guard.refuses(torch.tensor(loss, dtype=torch.float64), torch.tensor(norm)))


def lower_median(values: list[float]) -> float:
    return statistics.median_low(values)


def is_spike(values: list[float], history: list[list[float]], limit: float) -> bool:
    for value, past in zip(values, history, strict=True):
        middle = lower_median(past)
        spread = 1.4826 * lower_median([abs(x - middle) for x in past])
        if spread > 0 and (value - middle) / spread > limit:
            return True
    return False


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.tuples(finite, finite), min_size=5, max_size=60), limit=st.sampled_from([1.5, 4.0]))
def test_spikes_match_a_plain_robust_zscore(steps, limit):
    guard = SpikeGuard(StabilityConfig(max_zscore=limit, window=8), torch.device("cpu"))
    seen: list[list[float]] = []
    for loss, norm in steps:
        values = [torch.tensor(loss).item(), torch.tensor(norm).log().item()]
        history = [[row[k] for row in seen[-8:]] for k in (0, 1)]
        expected = len(history[0]) >= 4 and is_spike(values, history, limit)
        assert judged(guard, loss, norm) == expected
        seen.append(values)


def test_a_step_that_is_not_comparable_is_no_spike_and_not_remembered():
    guard = SpikeGuard(StabilityConfig(max_zscore=1.0, window=8), torch.device("cpu"))
    for number in range(8):
        judged(guard, 1 + number / 8, 1 + number / 8)
    before = guard.history.clone()
    values = torch.tensor(100.0), torch.tensor(100.0)
    assert not guard.refuses(*values, comparable=torch.tensor(False))
    assert guard.history.equal(before)
    assert guard.refuses(*values, comparable=torch.tensor(True))
    assert guard.refuses(torch.tensor(math.nan), torch.tensor(1.0), comparable=torch.tensor(False))


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)]
)
def test_non_finite_steps_are_refused_and_not_remembered(loss, norm):
    guard = SpikeGuard(StabilityConfig(max_zscore=None), torch.device("cpu"))
    assert not judged(guard, 1.0, 0.0)
    before = guard.history.clone()
    assert judged(guard, loss, norm)
    torch.testing.assert_close(guard.history, before, equal_nan=True)


def test_a_falling_loss_or_a_short_history_is_not_a_spike():
    guard = SpikeGuard(StabilityConfig(max_zscore=3.0, window=8), torch.device("cpu"))
    assert not any(judged(guard, loss, 1.0 / (1 + loss)) for loss in (9.0, 900.0, 1.0, 2.0))
    steady = [judged(guard, 5.0 - 0.01 * k + 0.001 * (k % 3), 1.0 + 0.01 * (k % 5)) for k in range(20)]
    assert not any(steady)
    assert not judged(guard, 0.1, 0.1)
    assert judged(guard, 500.0, 1.0)
    assert judged(guard, 4.9, 50.0)


def test_a_new_level_is_not_a_spike_after_half_a_window():
    """Seen in a run whose gradient norm rose from 0.25 to 20 and stayed there: not a matter of batches."""
    guard = SpikeGuard(StabilityConfig(max_zscore=10.0, window=16), torch.device("cpu"))
    wobble = [1 + 0.01 * (k % 5) for k in range(40)]
    assert not any(judged(guard, w, 0.25 * w) for w in wobble)
    refused = [judged(guard, 1.05 * w, 20 * w) for w in wobble]
    assert refused == [True] * 9 + [False] * 31
    assert judged(guard, 1.05, 2000.0)


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_skips_counts_and_resumes_bit_exactly(train, data_folder, tmp_path):
    # Hardly any learning: losses go up and down with the batches.
    steady = ("optimizer.lr=1e-6", "optimizer.min_lr=1e-7", "ep_size=1")
    options = ("stability.max_zscore=1", "stability.window=8", "save_every=9", *steady)
    through, resumed = tmp_path / "through", tmp_path / "resumed"
    output = train(through, "max_steps=18", *options, ranks=1).stdout
    train(resumed, "max_steps=9", "optimizer.decay_steps=18", *options, ranks=1)
    train(resumed, "max_steps=18", *options, ranks=1)
    timed = {"tokens_per_second", "seconds", "data_wait_fraction", "memory_bytes", "save_seconds"}
    plain = [{k: v for k, v in line.items() if k not in timed} for line in metrics(through)]
    assert plain == [{k: v for k, v in line.items() if k not in timed} for line in metrics(resumed)]
    skipped = [line for line in plain if "skipped" in line]
    assert 0 < len(skipped) < 14
    assert all(line["step"] > 4 for line in skipped)  # half a window
    assert output.count("SKIPPED: z-score of loss is ") == len(skipped)
    loader = Loader(data_folder, 64, 8, seed=0)
    for line in skipped:
        assert list(map(tuple, line["sample_ids"])) == loader.sample_ids(line["step"] - 1)
        assert loader.batch(line["step"] - 1).sample_ids == loader.sample_ids(line["step"] - 1)


def test_a_run_that_skips_too_much_ends_with_one_line(train, tmp_path):
    run = tmp_path / "run"
    never = ("stability.max_skipped=3", "stability.max_zscore=null")  # except non-finite steps
    result = train(run, "max_steps=40", "optimizer.lr=100", "optimizer.weight_decay=100", *never, check=False)
    assert result.returncode
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error: ") == 1
    *last, newest = metrics(run)[-4:]  # the step that ran while the last of the three was reported
    assert "skipped" in newest
    message = f"error: step {last[-1]['step']} was skipped, the last of 3 in a row ({last[-1]['skipped']})"
    assert message in result.stderr
    assert all(None in (line["loss"], line["grad_norm"]) and "sample_ids" in line for line in last)
    assert not (run / "checkpoints").exists()
