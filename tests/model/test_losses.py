"""Chunked cross-entropy and the loss table."""

import pytest
import torch
import torch.nn.functional as F

from model import losses
from model.losses import IGNORE_INDEX, chunked_cross_entropy, kept_rows, total_loss, weighted_rows

ON_EACH_DEVICE = pytest.mark.parametrize("rows", [kept_rows, weighted_rows])  # on a CPU, on a GPU


@ON_EACH_DEVICE
@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("kept", [0, 1, 7])
def test_value_and_gradients_equal_torch(monkeypatch, chunk, kept, rows):
    monkeypatch.setattr(losses, "kept_rows", rows)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=generator, requires_grad=True)
    weight = torch.randn(11, 5, generator=generator, requires_grad=True)
    targets = torch.randint(0, 11, (7,), generator=generator)
    targets[kept:] = IGNORE_INDEX
    loss = chunked_cross_entropy(hidden, weight, targets, chunk=chunk)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum", ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(3 * loss, (hidden, weight))
    wanted = torch.autograd.grad(3 * expected, (hidden, weight))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@ON_EACH_DEVICE
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_a_share_of_each_token_scales_its_loss_and_has_a_gradient(monkeypatch, chunk, rows):
    monkeypatch.setattr(losses, "kept_rows", rows)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=generator, requires_grad=True)
    weight = torch.randn(11, 5, generator=generator, requires_grad=True)
    share = torch.rand(7, generator=generator, requires_grad=True)
    targets = torch.randint(0, 11, (7,), generator=generator)
    targets[2] = IGNORE_INDEX
    loss = chunked_cross_entropy(hidden, weight, targets, share, chunk)
    each = F.cross_entropy(hidden @ weight.T, targets, reduction="none", ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(loss, (each * share).sum())
    found = torch.autograd.grad(3 * loss, (hidden, weight, share))
    wanted = torch.autograd.grad(3 * (each * share).sum(), (hidden, weight, share))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_bf16_stays_close_to_fp32():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 32, generator=generator), torch.randn(97, 32, generator=generator)
    targets = torch.randint(0, 97, (64,), generator=generator)
    exact = chunked_cross_entropy(hidden, weight, targets)
    rough = chunked_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=1e-2, atol=0)


def test_parts_of_a_batch_add_up_to_its_loss(build, tokens):
    """With global counts, ranks and micro-batches add up to the loss of one process."""
    model = build("loop", balance_loss_weight=0.5).train()
    targets = tokens.roll(-1, 1).clone()
    targets[0, 2:] = IGNORE_INDEX
    targets[1] = IGNORE_INDEX
    whole = model(tokens, targets=targets)
    counts = {"targets": int((targets != IGNORE_INDEX).sum()), "rows": 3}
    parts = [
        total_loss(model.config, model(tokens[i : i + 1], targets=targets[i : i + 1]).loss_sums, counts)
        for i in range(3)
    ]
    torch.testing.assert_close(sum(parts), whole.loss)
