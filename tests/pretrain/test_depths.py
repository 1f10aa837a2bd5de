"""The depths of an optimizer step, and what is planned for a run whose depth changes."""

import math
from typing import Any

import pytest
import torch

from model import ModelConfig, ZeroModel
from model.counts import training_flops_per_token
from model.recurrence import sample_depth, sample_depths
from pretrain.config import StabilityConfig
from pretrain.depths import StepDepths, deepest, step_depths, trained_at
from pretrain.planning.layout import Layout
from pretrain.planning.memory import activation_bytes
from pretrain.stability import SpikeGuard

RAMP = [
    {"step": 0, "num_steps": 1, "backprop_steps": 1},
    {"step": 10, "num_steps": 6, "backprop_steps": 3},
    {"step": 20, "num_steps": 2, "backprop_steps": 2},
]
ROWS = {"depth_sampling": "poisson", "depth_per": "sequence"}


def config(**recurrence: Any) -> ModelConfig:
    section = {"placement": "block", "ranges": [[1, 1]], "num_steps": 4, **recurrence}
    return ModelConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=3, n_routed_experts=4, num_experts_per_tok=2,
        recurrence=ModelConfig.from_dict({"num_hidden_layers": 3, "recurrence": section}).recurrence,
    )  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_row_has_the_same_depth_in_every_layout(ranks):
    rows = config(**ROWS, max_steps=9)
    depths = step_depths(rows, 5, 3, ranks, 16)
    assert torch.equal(depths.rows.flatten(), sample_depths(rows, 5, 3, 16))
    per_rank = 16 // ranks
    assert depths.deepest == int(depths.rows.max()) > 1
    assert depths.mean == depths.rows.double().mean()
    for micro in (1, 2, per_rank):
        expected = [int(depths.rows[:, i : i + micro].max()) for i in range(0, per_rank, micro)]
        assert depths.all_passes(micro) == expected
        assert [depths.passes(slice(i, i + micro)) for i in range(0, per_rank, micro)] == expected
    one = step_depths(config(depth_sampling="poisson"), 5, 3, ranks, 16)
    assert (one.rows == sample_depth(config(depth_sampling="poisson"), 5, 3)).all()
    assert one.mean == one.deepest
    assert not one.per_row


def test_flops_of_a_step_are_those_of_its_rows_with_the_gradients_of_that_step():
    at = trained_at(config(depth_schedule=RAMP), 5)
    assert at.recurrence.backprop_steps == 2
    depths = StepDepths(torch.tensor([[1, 4], [4, 3]]), per_row=True)
    found = depths.mean_of(lambda n: training_flops_per_token(at, 64, n))
    each = [training_flops_per_token(config(backprop_steps=2), 64, n) for n in (1, 4, 4, 3)]
    assert found == pytest.approx(sum(each) / 4)
    assert trained_at(config(backprop_steps=2), 5) == config(backprop_steps=2)


def test_memory_is_planned_for_the_deepest_step():
    def needed(model: ModelConfig) -> int:
        return activation_bytes(model, Layout(gpus=2, ep=2, sequence_length=64))

    scheduled = deepest(config(depth_schedule=RAMP))
    assert needed(scheduled) == needed(config(num_steps=6, backprop_steps=3)) > needed(config(num_steps=2))
    assert needed(deepest(config(**ROWS, max_steps=12))) == needed(config(num_steps=12))
    assert deepest(config(backprop_steps=2)) == config(backprop_steps=2)
    halting = {"kind": "threshold", "min_steps": 3}
    assert (
        deepest(config(depth_schedule=[{"step": 0, "num_steps": 1.5}], halting=halting)).recurrence.num_steps
        == 3
    )


def test_the_spike_guard_forgets_when_the_depth_changes():
    """A loss that is higher because the loop just got deeper is no spike."""
    model = ZeroModel(config(depth_schedule=[{"step": 40, "num_steps": 1}, {"step": 41, "num_steps": 2}]))
    for follows in (True, False):
        guard, refused = SpikeGuard(StabilityConfig(window=16, max_zscore=6.0), torch.device("cpu")), []
        for step in range(50):
            model.training_step = step
            if follows and model.starts_stage:
                guard.forget()
            level = 2.0 + 0.01 * math.sin(step) + (step >= 41)
            refused.append(bool(guard.refuses(torch.tensor(level), torch.tensor(1.0 + 0.1 * math.sin(step)))))
        assert refused[41] is not follows
