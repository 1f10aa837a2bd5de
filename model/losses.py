"""Every term of the training loss, named and weighted in one table; and the chunked cross-entropy.

Shapes: N tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.config.model import ModelConfig
from model.layers import at_least_fp32, linear

IGNORE_INDEX = -100  # a position without a target
_Rows = tuple[Tensor, Tensor, Tensor, Tensor | None]  # hidden (N, D), weight (V, D), targets and share (N,)


@dataclass(frozen=True)
class LossTerm:
    """A term is a SUM over what it counts, divided by the count of the whole global batch."""

    name: str
    weight: Callable[[ModelConfig], float]
    counted_in: str  # "targets", "rows", or for traced documents "trace_targets", "documents"
    applies: Callable[[ModelConfig], bool] = lambda config: True


def _distilled(name: str, counted_in: str) -> LossTerm:
    """A term of latent chain of thought, see latent_cot/targets.py: config.distillation's `{name}_weight`."""

    def weight(config: ModelConfig) -> float:
        return 0.0 if config.distillation is None else getattr(config.distillation, f"{name}_weight")

    return LossTerm(
        name, weight, counted_in, lambda config: config.distillation is not None and weight(config) > 0
    )


LOSS_TABLE = (
    # For a student of latent chain of thought (distill/student.py): of what it predicts after its thoughts.
    LossTerm("cross_entropy", lambda c: 1.0, "targets"),
    LossTerm("balance", lambda c: c.balance_loss_weight, "rows", lambda c: c.has_experts),
    LossTerm("router_z", lambda c: c.router_z_loss_weight, "rows", lambda c: c.has_experts),
    # The modules' mean; each is divided by all targets, as in DeepSeek-V3 eq. 24 and 25.
    LossTerm("mtp", lambda c: c.mtp_loss_weight, "targets", lambda c: c.num_nextn_predict_layers > 0),
    # From the loops, see loop_trace.py: means over a row's tokens and over the loops.
    LossTerm("ponder", lambda c: c.recurrence.halting.ponder_scale, "rows", lambda c: c.learns_to_halt),
    LossTerm(
        "stability",
        lambda c: c.recurrence.halting.stability_weight,
        "rows",
        lambda c: c.learns_to_halt and c.recurrence.halting.stability_weight > 0,
    ),
    LossTerm(
        "sparsity",
        lambda c: c.recurrence.halting.sparsity_weight,
        "rows",
        lambda c: c.recurrence.placement != "none" and c.recurrence.halting.sparsity_weight > 0,
    ),
    LossTerm(
        "information",
        lambda c: c.recurrence.halting.information_weight,
        "rows",
        lambda c: c.recurrence.placement != "none" and c.recurrence.halting.information_weight > 0,
    ),
    _distilled("teacher", "trace_targets"),
    _distilled("hidden", "documents"),
    _distilled("kv", "documents"),
    _distilled("latent", "documents"),
)


def loss_terms(config: ModelConfig) -> list[LossTerm]:
    """The terms that a model has."""
    return [term for term in LOSS_TABLE if term.applies(config)]


def plain_loss_terms(config: ModelConfig) -> list[LossTerm]:
    """The terms that one pass over tokens forms by itself, without a teacher."""
    return [term for term in loss_terms(config) if term.counted_in in ("targets", "rows")]


def total_loss(config: ModelConfig, sums: dict[str, Tensor], counts: Mapping[str, int | Tensor]) -> Tensor:
    """Weighted sum of the model's terms in `sums`, each divided by its count.

    Args:
        sums: the terms by name, summed over this batch.
        counts: what the terms are counted_in, as numbers or scalars on the device. With the global batch's
            counts, ranks and micro-batches add up to exactly the loss of one process.
    """
    counts = {name: torch.as_tensor(count).clamp(min=1) for name, count in counts.items()}
    terms = [
        t.weight(config) * sums[t.name] / counts[t.counted_in] for t in loss_terms(config) if t.name in sums
    ]
    return torch.stack(terms).sum()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a linear head without the (N, V) logits, gradients formed in forward.

    Forming them there also serves ZeRO-3, which gives the head its weight only inside its own forward.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, share: Tensor | None, chunk: int
    ) -> Tensor:
        """hidden (N, D), weight (V, D), targets (N,) in 0..V-1 -> summed loss in nats, a scalar, at least
        fp32.

        share (N,): factor on each token's loss; None: 1. Kept for backward are the gradients of the sum
        (softmax minus one-hot, times the other factor) and each token's loss, which is the gradient of its
        share.
        """
        need_hidden, need_weight, _, need_share, _ = ctx.needs_input_grad
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros(len(targets), dtype=dtype, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if need_weight else None
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            rows, target = hidden[part], targets[part]
            logits = at_least_fp32(linear(rows, weight))
            normaliser = logits.logsumexp(-1, keepdim=True)
            loss[part] = (normaliser - logits.gather(-1, target[:, None]))[:, 0]
            if need_hidden or need_weight:
                error = logits.sub_(normaliser).exp_()
                error[torch.arange(len(target), device=target.device), target] -= 1.0
                if share is not None:
                    error *= share[part, None]
                error = error.to(weight.dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = linear(error, weight.T)
                if grad_weight is not None:
                    grad_weight += linear(error.T, rows.T)
        ctx.save_for_backward(grad_hidden, grad_weight, loss if need_share else None)
        ctx.weight_dtype = weight.dtype
        return (loss if share is None else loss * share).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, loss = ctx.saved_tensors
        scale = grad_outputs[0]
        return (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * scale).to(ctx.weight_dtype),
            None,
            None if loss is None else loss * scale,
            None,
        )


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, share: Tensor | None = None, chunk: int = 1024
) -> Tensor:
    """Summed fp32 cross-entropy of hidden (N, D) under a head (V, D); skips targets (N,) of IGNORE_INDEX.

    A CPU leaves their rows out of the products. Another device multiplies them too, with a share of 0: how
    many rows are kept is only known there, and the host would wait for it.

    Args:
        share: (N,) fp32 factor on each token's loss, such as the probability of halting here; None: 1.
        chunk: rows of logits held at a time.
    """
    rows = kept_rows if hidden.device.type == "cpu" else weighted_rows
    return _ChunkedCrossEntropy.apply(*rows(hidden, weight, targets, share), chunk)


def kept_rows(hidden: Tensor, weight: Tensor, targets: Tensor, share: Tensor | None) -> _Rows:
    """The arguments of _ChunkedCrossEntropy for the rows with a target."""
    kept = targets != IGNORE_INDEX
    return hidden[kept], weight, targets[kept], None if share is None else share[kept]


def weighted_rows(hidden: Tensor, weight: Tensor, targets: Tensor, share: Tensor | None) -> _Rows:
    """The same for all rows: those without a target have a share of 0 and any target."""
    ignored = targets == IGNORE_INDEX
    share = (~ignored).float() if share is None else share.masked_fill(ignored, 0.0)
    return hidden, weight, targets.masked_fill(ignored, 0), share
