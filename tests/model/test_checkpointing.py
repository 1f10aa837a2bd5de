"""Activation checkpointing: the same loss and gradients, less memory, one choice per router."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

STARTS = torch.tensor([[0, 5, 6, 17], [0, 17, 17, 17], [0, 1, 16, 17]], dtype=torch.int32)


class CountOperations(TorchDispatchMode):
    """Counts the operations that are actually computed."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def train(build, variant: str, tokens, policy: str):
    model = build(variant, execution={"checkpointing": policy}).train()
    kept = 0

    def pack(tensor):
        nonlocal kept
        kept += tensor.untyped_storage().nbytes()
        return tensor

    with CountOperations() as operations:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(tokens, targets=tokens, cu_seqlens=STARTS).loss
        loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    loads = [layer.load for layer in model.moe_layers()]
    return loss.detach(), gradients, loads, operations.counts, kept


@pytest.mark.parametrize("policy", ["block", "selective"])
@pytest.mark.parametrize(
    "name",
    ["deepseek", "groups", "plain", "gpt2", "grouped_query", "normed_without_scales", "loop", "multi_token"],
)
def test_policies_change_no_number(build, tokens, policy, name):
    loss, gradients, loads, operations, _ = train(build, name, tokens, "none")
    loss_c, gradients_c, loads_c, operations_c, _ = train(build, name, tokens, policy)
    assert torch.equal(loss, loss_c)
    for parameter, gradient in gradients.items():
        assert torch.equal(gradients_c[parameter], gradient), parameter
    for load, load_c in zip(loads, loads_c, strict=True):
        assert torch.equal(load, load_c)  # counted once, though the layer ran twice
    # The choice of experts is kept, not repeated.
    assert operations_c["aten.topk.default"] == operations["aten.topk.default"]
    assert operations_c["aten.sigmoid.default"] >= operations["aten.sigmoid.default"]
    products, products_c = operations["aten.mm.default"], operations_c["aten.mm.default"]
    assert products_c > products if policy == "block" else products_c < 1.1 * products


@pytest.mark.parametrize(
    "recurrence",
    [
        {
            "placement": "block",
            "ranges": [[0, 1]],
            "num_steps": 3,
            "cache": "ema",
            "halting": {"kind": "act"},
        },
        {"placement": "block", "ranges": [[0, 0], [2, 2]], "num_steps": 3, "backprop_steps": 2},
        {"placement": "kv", "num_steps": 3, "position_mixing": 2, "halting": {"kind": "ponder"}},
        {"placement": "post_attention", "num_steps": 3, "query_conditioned": True},
    ],
)
@pytest.mark.parametrize("policy", ["block", "iteration"])
def test_policies_change_no_number_of_a_loop(build, tokens, recurrence, policy):
    def found(policy):
        model = build("deepseek", execution={"checkpointing": policy}, recurrence=recurrence).train()
        kept = 0

        def pack(tensor):
            nonlocal kept
            kept += tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(tokens, targets=tokens, cu_seqlens=STARTS).loss
        loss.backward()
        return loss.detach(), [p.grad for p in model.parameters()], [m.load for m in model.moe_layers()], kept

    (loss, grads, loads, kept), (loss_c, grads_c, loads_c, kept_c) = found("none"), found(policy)
    assert torch.equal(loss, loss_c)
    torch.testing.assert_close(grads_c, grads)
    assert all(torch.equal(a, b) for a, b in zip(loads, loads_c, strict=True))
    assert kept_c < kept


def test_the_policies_keep_less(build, tokens):
    kept = {p: train(build, "deepseek", tokens, p)[4] for p in ("none", "block", "selective")}
    assert kept["block"] < 0.5 * kept["none"]
    assert kept["selective"] < kept["none"]
