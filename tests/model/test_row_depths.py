"""Depth as a function of the optimizer step, and a depth for each row."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from model import ModelConfig, ZeroModel
from model.cache import LatentCache
from model.config.execution import ExecutionConfig
from model.losses import IGNORE_INDEX
from model.recurrence import sample_depth, sample_depths

from .conftest import BLOCK, SMALL
from .loops import EVERY

POISSON = {"depth_sampling": "poisson", "depth_per": "sequence"}
FIXED = {name: section for name, section in EVERY.items() if "-fixed-" in name and "parallel" not in name}
LOOPS: dict[str, dict[str, Any]] = {
    **FIXED,
    "retrofit": {**BLOCK, "update": "retrofit", "injection": "none", "iteration_embedding": True},
    "threshold": {**BLOCK, "cache": "average", "halting": {"kind": "threshold"}},
    "two ranges": {"placement": "block", "ranges": [[0, 0], [2, 2]], "num_steps": 3, "cache": "first"},
}
TOKENS = torch.randint(1, 61, (4, 17), generator=torch.Generator().manual_seed(1))
STARTS = torch.tensor([[0, 5, 6, 17], [0, 17, 17, 17], [0, 1, 11, 17], [0, 16, 17, 17]], dtype=torch.int32)
DEPTHS = torch.tensor([3, 1, 5, 2])


def make(section: dict[str, Any], execution: ExecutionConfig | None = None) -> ZeroModel:
    recurrence = {**section, **POISSON}
    recurrence["halting"] = {
        **section.get("halting", {}),
        "sparsity_weight": 0.1,
        "information_weight": 0.1,
    }
    model = ZeroModel(
        ModelConfig.from_dict({**SMALL, "router_z_loss_weight": 0.01, "recurrence": recurrence}),
        execution=execution,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.3, generator=generator)
    return model.train()


def inputs(rows: slice) -> dict[str, Any]:
    """Packed documents; the last one of row 2 is padding."""
    targets, mask = TOKENS.roll(-1, 1), torch.ones_like(TOKENS).bool()
    targets[:, -1] = targets[2, 10:] = IGNORE_INDEX
    mask[2, 11:] = False
    return {
        "tokens": TOKENS[rows],
        "targets": targets[rows],
        "cu_seqlens": STARTS[rows],
        "attention_mask": mask[rows],
    }


def gradients(model: ZeroModel, losses: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    sum(torch.stack(list(sums.values())).sum() for sums in losses).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("name", "cut", "checkpointing"),
    [
        *((name, None, "none") for name in LOOPS),
        ("block-fixed-token-ema", 2, "none"),
        ("kv-fixed-token-per_step", 1, "none"),
        ("retrofit", 2, "iteration"),
        ("two ranges", 2, "block"),
    ],
)
def test_a_row_with_its_depth_trains_as_it_does_alone(name, cut, checkpointing):
    model = make({**LOOPS[name], "backprop_steps": cut}, ExecutionConfig(checkpointing=checkpointing))
    together = model(**inputs(slice(0, 4)), num_steps=6, depths=DEPTHS)  # other ranks have a deeper row
    loads = [layer.load.clone() for layer in model.moe_layers()]
    found = gradients(model, [together.loss_sums])
    for layer in model.moe_layers():
        layer.load.zero_()
    alone = [model(**inputs(slice(i, i + 1)), num_steps=int(n)) for i, n in enumerate(DEPTHS)]
    for term, value in together.loss_sums.items():
        expected = sum(row.loss_sums[term] for row in alone)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5, msg=term)
    expected = gradients(model, [row.loss_sums for row in alone])
    assert found.keys() == expected.keys() == {name for name, _ in model.named_parameters()}
    for parameter, gradient in found.items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-4, atol=1e-4, msg=parameter)
    for layer, load in zip(model.moe_layers(), loads, strict=True):
        assert torch.equal(load, layer.load)  # counts no step that a row does not take
    for i, row in enumerate(alone):
        n = int(DEPTHS[i])
        assert (together.num_iterations[:, i] == n).all()
        torch.testing.assert_close(together.halt_probs[:, i, :, :n], row.halt_probs[:, 0])
        assert not together.halt_probs[:, i, :, n:].any()
    ran = torch.zeros(6)
    moved = torch.zeros(len(together.residuals), 6)
    for row, n in zip(alone, DEPTHS.tolist(), strict=True):
        real = 11 if n == 5 else 17
        ran[:n] += real
        moved[:, :n] += real * row.residuals
    torch.testing.assert_close(together.residuals, moved / ran.clamp(min=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["block-fixed-token-per_step", "post_attention-fixed-token-per_step", "retrofit"]
)
def test_a_row_with_its_depth_predicts_what_it_does_alone(name):
    model = make(LOOPS[name]).eval()
    together = model(TOKENS, num_steps=5, depths=DEPTHS).logits
    for row, depth in enumerate(DEPTHS.tolist()):
        alone = model(TOKENS[row : row + 1], num_steps=depth).logits[0]
        torch.testing.assert_close(together[row], alone, rtol=0, atol=3e-5)


def test_depths_that_rows_cannot_have_are_refused():
    threshold = make(LOOPS["threshold"]).eval()
    with pytest.raises(ValueError, match="depths of 4 rows: halting.kind=threshold decides when"):
        threshold(TOKENS, depths=DEPTHS)
    with pytest.raises(ValueError, match="a cache holds equally many steps of every row"):
        make(BLOCK)(TOKENS, depths=DEPTHS, cache=LatentCache())
    with pytest.raises(ValueError, match="placement=none has no loop"):
        ZeroModel(ModelConfig.from_dict(SMALL))(TOKENS, depths=DEPTHS)


def config(**options: Any) -> ModelConfig:
    return ModelConfig.from_dict({**SMALL, "recurrence": {**BLOCK, **options}})


RAMP = [
    {"step": 10, "num_steps": 1},
    {
        "step": 16,
        "num_steps": 4,
    },
]


def test_a_schedule_moves_the_depth_from_point_to_point():
    fixed = config(depth_schedule=RAMP)
    assert [sample_depth(fixed, 0, step) for step in range(8, 19)] == [1, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4]
    assert fixed.recurrence.num_steps == 3  # inference
    assert [step for step in range(30) if fixed.recurrence.changes_at(step)] == [11, 13, 15]
    cut = [{**point, "backprop_steps": n} for point, n in zip(RAMP, (1, 2), strict=True)]
    growing = config(depth_schedule=cut).recurrence
    assert [growing.backprop_at(step) for step in (0, 12, 13, 99)] == [1, 1, 2, 2]
    assert config(depth_schedule=RAMP, backprop_steps=3).recurrence.backprop_at(99) == 3
    assert config(depth_schedule=RAMP).recurrence.backprop_at(5) is None


def test_a_schedule_moves_the_mean_of_drawn_depths():
    drawn = config(depth_schedule=[{"step": 0, "num_steps": 1.0}, {"step": 8000, "num_steps": 9.0}],
                   depth_sampling="poisson", max_steps=60)  # fmt: skip
    assert [sample_depth(drawn, 3, step) for step in (0, 1)] == [1, 1]
    for middle in (2000, 4000, 7000):
        depths = [sample_depth(drawn, 3, step) for step in range(middle - 500, middle + 500)]
        mean = 1 + middle / 1000
        assert abs(sum(depths) / 1000 - mean) < 4 * math.sqrt(mean + 0.3 * mean**2) / math.sqrt(1000)
    constant = config(depth_sampling="poisson", num_steps=5)
    flat = config(depth_sampling="poisson", depth_schedule=[{"step": 0, "num_steps": 5}])
    assert [sample_depth(flat, 1, step) for step in range(50)] == [
        sample_depth(constant, 1, step) for step in range(50)
    ]
    assert not drawn.recurrence.changes_at(500)
    jump = config(
        depth_sampling="poisson", depth_schedule=[{"step": 4, "num_steps": 1}, {"step": 5, "num_steps": 4}]
    )
    assert [step for step in range(9) if jump.recurrence.changes_at(step)] == [5]


def test_depths_of_rows_are_functions_of_seed_step_and_row_with_the_step_draws_distribution():
    drawn = config(**POISSON, num_steps=8, max_steps=20)
    rows = sample_depths(drawn, 0, 7, 4000)
    for count in (1, 5, 1000):  # the same rows of a smaller global batch
        assert torch.equal(sample_depths(drawn, 0, 7, count), rows[:count])
    assert not torch.equal(sample_depths(drawn, 0, 8, 100), rows[:100])
    assert not torch.equal(sample_depths(drawn, 1, 7, 100), rows[:100])
    steps = torch.tensor([sample_depth(drawn, 0, step) for step in range(4000)])
    assert rows.min() >= 1
    assert rows.max() <= 20
    for least in range(1, 21):  # two samples of one distribution: four standard errors apart at most
        a, b = (rows >= least).double().mean(), (steps >= least).double().mean()
        assert abs(a - b) < 4 * math.sqrt(0.5 / 4000), least
    one = config(**POISSON, depth_schedule=[{"step": 0, "num_steps": 1}])
    assert sample_depths(one, 0, 0, 5).tolist() == [1] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth_schedule": []}, r"depth_schedule=\[\] has no point"),
        ({"depth_schedule": RAMP[::-1]}, "step 10 follows 16; sort the points"),
        ({"depth_schedule": [RAMP[0], RAMP[0]]}, "step 10 follows 10"),
        ({"depth_schedule": RAMP, "max_steps": 3}, "at step 16: num_steps=4 exceeds max_steps=3; raise it"),
        (
            {"depth_schedule": [{"step": 0, "num_steps": 0.5}]},
            r"depth_schedule\[0\].num_steps=0.5 must be at least 1",
        ),
        (
            {"depth_schedule": [{"step": -1, "num_steps": 1}]},
            r"depth_schedule\[0\].step=-1 must be at least 0",
        ),
        ({"depth_schedule": [{"steps": 1, "num_steps": 1}]}, "did you mean 'step'"),
        (
            {"depth_schedule": [{"step": 0, "num_steps": 2, "backprop_steps": 3}]},
            "backprop_steps=3 exceeds num_steps=2",
        ),
        (
            {"depth_schedule": [{**RAMP[0], "backprop_steps": 1}, RAMP[1]]},
            "1 of 2 points have backprop_steps",
        ),
        (
            {"depth_schedule": [{**RAMP[0], "backprop_steps": 1}], "backprop_steps": 1},
            "backprop_steps=1 and that of .* exclude each other",
        ),
        (
            {"depth_schedule": [{**RAMP[0], "backprop_steps": 1}], "halting": {"kind": "act"}},
            "backprop_steps=1 cuts the gradient that halting.kind=act learns from",
        ),
        ({"placement": "none", "ranges": None, "depth_schedule": RAMP}, "needs a loop, but placement=none"),
        ({"depth_per": "sequence"}, "depth_per=sequence does not go with depth_sampling=fixed"),
        ({"depth_per": "row"}, "depth_per='row' is unknown; choose one of step, sequence"),
        ({**POISSON, "halting": {"kind": "act"}}, "does not go with halting.kind=act, which learns"),
        ({**POISSON, "cache": "parallel"}, "does not go with cache=parallel"),
        ({**POISSON, "placement": "none", "ranges": None}, "does not go with placement=none"),
    ],
)
def test_impossible_depths_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        config(**options)
    assert "\n" not in str(error.value)


def test_a_model_in_training_follows_the_schedules_back_propagation():
    cut = [{**RAMP[0], "backprop_steps": 1}, {"step": 11, "num_steps": 3, "backprop_steps": 3}]
    scheduled, seen = make({**BLOCK, "depth_schedule": cut}), {}
    for step in (0, 20):
        scheduled.training_step = step
        seen[step] = gradients(scheduled, [scheduled(**inputs(slice(0, 2)), num_steps=3).loss_sums])
    for step, kept in ((0, 1), (20, 3)):
        plain = make({**BLOCK, "backprop_steps": kept})
        expected = gradients(plain, [plain(**inputs(slice(0, 2)), num_steps=3).loss_sums])
        assert all(torch.equal(seen[step][name], value) for name, value in expected.items())
    assert dataclasses.asdict(ModelConfig.from_dict(scheduled.config.to_dict())) == scheduled.config.to_dict()
