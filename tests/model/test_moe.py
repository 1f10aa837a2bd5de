"""The mixture of experts against a literal loop over tokens."""

import pytest
import torch

from model import ModelConfig
from model import moe as moe_module
from model.backends.experts import expert_products
from model.config.execution import ExecutionConfig
from model.layers import DENSE, FeedForward
from model.moe import MoE

from .conftest import SMALL


def make_moe(experts: str = "auto", **overrides) -> MoE:
    config = ModelConfig.from_dict({**SMALL, "n_routed_experts": 8, **overrides})
    torch.manual_seed(0)
    moe = MoE(config, ExecutionConfig(experts=experts))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    moe.gate.e_score_correction_bias.copy_(0.2 * torch.randn(8))
    return moe


def literal_moe(moe: MoE, x: torch.Tensor) -> torch.Tensor:
    """DeepSeek-V3 eq. 12-16 with group-limited routing, for tokens x (N, D)."""
    c, out = moe.config, []
    for u in x:
        scores = torch.sigmoid(moe.gate.weight @ u)
        biased = (scores + moe.gate.e_score_correction_bias).tolist()
        size = c.n_routed_experts // c.n_group
        groups = [biased[g * size : (g + 1) * size] for g in range(c.n_group)]
        ranked = sorted(range(c.n_group), key=lambda g: -sum(sorted(groups[g])[-2:]))
        allowed = [e for g in ranked[: c.topk_group] for e in range(g * size, (g + 1) * size)]
        chosen = sorted(allowed, key=lambda e: -biased[e])[: c.num_experts_per_tok]
        total = sum(scores[e] for e in chosen) if c.norm_topk_prob else 1.0
        y = torch.zeros_like(u)
        if c.n_shared_experts and c.hidden_act == "relu2":
            up, down = moe.shared_experts.up_proj.weight, moe.shared_experts.down_proj.weight
            y = down @ (up @ u).clamp(min=0) ** 2
        elif c.n_shared_experts:
            y = moe.shared_experts(u)
        for e in chosen:
            if c.hidden_act == "relu2":
                hidden = (moe.experts.w1[e] @ u).clamp(min=0) ** 2
            else:
                hidden = torch.nn.functional.silu(moe.experts.w1[e] @ u) * (moe.experts.w3[e] @ u)
            y = y + c.routed_scaling_factor * scores[e] / total * (moe.experts.w2[e] @ hidden)
        out.append(y)
    return torch.stack(out)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
        {"norm_topk_prob": False, "routed_scaling_factor": 2.5, "n_shared_experts": 2},
        {"n_shared_experts": 0, "num_experts_per_tok": 8},
        {"num_experts_per_tok": 1},
        {"hidden_act": "relu2"},
        {"hidden_act": "relu2", "moe_intermediate_size": 8, "num_experts_per_tok": 1},  # by grouped products
        {"hidden_act": "relu2", "n_shared_experts": 0},
    ],
)
@pytest.mark.parametrize("shape", [(2, 7), (1, 1)])
@pytest.mark.parametrize("as_on", ["cpu", "gpu"])
def test_output_and_gradients_equal_the_loop_over_tokens(monkeypatch, overrides, shape, as_on):
    monkeypatch.setattr(moe_module, "folds_weights", lambda x: as_on == "gpu")
    moe = make_moe("auto" if as_on == "cpu" else "padded", **overrides)
    x = torch.randn(*shape, 24, generator=torch.Generator().manual_seed(1), requires_grad=True)
    out, _ = moe(x)
    expected = literal_moe(moe, x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    parameters = [x, *moe.parameters()]
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    found = torch.autograd.grad((out * weights).sum(), parameters)
    wanted = torch.autograd.grad((expected * weights).sum(), parameters, materialize_grads=True)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [9, 12])  # in a loop, by grouped products
@torch.no_grad()
def test_squared_relu_experts_decode_and_round_alike(width):
    """few_rows takes another way round without gradients."""
    moe, x = make_moe(hidden_act="relu2", moe_intermediate_size=width), torch.randn(3, 5, 24)
    expected = literal_moe(moe, x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(moe(x)[0], expected, rtol=0, atol=1e-5)
    for row in x.flatten(0, 1):
        torch.testing.assert_close(moe(row.view(1, 1, -1))[0].view(-1), literal_moe(moe, row[None])[0])
    half = moe.bfloat16()
    half.gate.e_score_correction_bias = half.gate.e_score_correction_bias.float()
    assert ((half(x.bfloat16())[0] - expected).norm(dim=-1) / expected.norm(dim=-1)).median() < 0.05


def test_squared_relu_gradients_equal_finite_differences():
    """Of the function itself: experts with many rows, one and none, and the dense layer."""
    generator = torch.Generator().manual_seed(0)
    x, w1, w2 = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((6, 4), (3, 5, 4), (3, 4, 5))
    )
    products = expert_products("loop", torch.tensor([5, 0, 1]))
    assert torch.autograd.gradcheck(
        lambda x, up, down: FeedForward.apply(x, up, None, down, None, products, torch.float64), (x, w1, w2)
    )
    dense = (x, w1[0].detach().requires_grad_(), w2[0].detach().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda x, up, down: FeedForward.apply(x, up, None, down, None, DENSE, torch.float64), dense
    )


@pytest.mark.parametrize("gated", [True, False])
def test_gradients_of_weighted_experts_equal_finite_differences(gated):
    generator = torch.Generator().manual_seed(0)
    x, p, w1, w2, w3 = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((6, 4), (6,), (3, 5, 4), (3, 4, 5), (3, 5, 4))
    )
    products, inputs = expert_products("padded", torch.tensor([5, 0, 1])), (x, p, w1, w2)
    assert torch.autograd.gradcheck(
        lambda x, p, w1, w2, w3=None: FeedForward.apply(x, w1, w3, w2, p, products, torch.float64),
        (*inputs, w3) if gated else inputs,
    )


def test_squared_relu_keeps_its_input_and_one_product():
    x, w1, w2 = torch.randn(64, 8), torch.randn(32, 8), torch.randn(8, 32)
    x, w1, w2 = (t.requires_grad_() for t in (x, w1, w2))
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        FeedForward.apply(x, w1, None, w2, None, DENSE, torch.float32)
    assert sorted(kept) == sorted([x.shape, (64, 32), w1.shape, w2.shape])


def test_all_tokens_on_one_expert_and_the_others_empty():
    moe = make_moe(num_experts_per_tok=1).train()
    moe.gate.e_score_correction_bias.copy_(torch.tensor([0.0, 0, 0, 9, 0, 0, 0, 0]))
    x = torch.randn(2, 5, 24)
    out, statistics = moe(x)
    out.pow(2).sum().backward()
    assert statistics.load.tolist() == [0, 0, 0, 10, 0, 0, 0, 0]
    assert moe.experts.w1.grad[3].abs().sum() > 0
    assert moe.experts.w1.grad[[0, 1, 2, 4, 5, 6, 7]].abs().sum() == 0


def test_load_counts_real_tokens_only():
    moe, x = make_moe(), torch.randn(2, 6, 24)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    assert moe(x, mask)[1].load.sum() == 9 * 2


def test_balance_loss_follows_its_equation():
    moe, x = make_moe(num_experts_per_tok=3), torch.randn(2, 6, 24)
    lengths = [4, 6]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    _, statistics = moe(x, mask)
    expected = 0.0
    for row, length in zip(x, lengths, strict=True):
        scores = torch.sigmoid(row[:length] @ moe.gate.weight.T)
        chosen = (scores + moe.gate.e_score_correction_bias).topk(3).indices
        for e in range(8):
            f = 8 / (3 * length) * sum(e in chosen[t] for t in range(length))
            p = sum(scores[t, e] / scores[t].sum() for t in range(length)) / length
            expected += f * p
    assert abs(float(statistics.balance.detach()) - float(expected.detach())) < 1e-5


def test_bias_moves_towards_underloaded_experts_and_stays_centred():
    moe = make_moe(router_bias_update_rate=0.01)
    moe.gate.e_score_correction_bias.zero_()
    moe.update_bias(torch.tensor([10, 0, 4, 4, 4, 4, 4, 2]))  # mean 4
    expected = 0.01 * torch.tensor([-1.0, 1, 0, 0, 0, 0, 0, 1])
    torch.testing.assert_close(moe.gate.e_score_correction_bias, expected - expected.mean())


def test_the_bias_balances_a_skewed_router():
    moe = make_moe(router_bias_update_rate=0.02).train()
    moe.gate.e_score_correction_bias.copy_(torch.linspace(-1, 1, 8))
    x = torch.randn(4, 64, 24, generator=torch.Generator().manual_seed(0))
    spreads = []
    for _ in range(120):
        load = moe(x)[1].load
        spreads.append(float(load.max() / load.float().mean()))
        moe.update_bias(load)
    assert spreads[0] > 3
    assert spreads[-1] < 1.3
