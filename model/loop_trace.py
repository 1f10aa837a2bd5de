"""What a loop reports: how long each token ran, how far its state moved, and the loss terms that weigh this.

losses.py has the terms' names and weights.

Shapes: B batch, T tokens, W width of the state, N loop steps.
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config.recurrence import HaltingConfig
from model.layers import at_least_fp32

LATENT_TERMS = ("ponder", "stability", "sparsity", "information")
TEMPERATURE = 0.1  # of the contrastive bound on information


class LoopTrace(NamedTuple):
    """One loop of one forward pass."""

    halt_probs: Tensor  # (B, T, N) fp32, p_n
    num_iterations: Tensor  # (B, T) int64, steps executed
    ponder_cost: Tensor  # (B, T) fp32: expected steps; for act, steps and remainder (Graves 2016, eq. 14)
    residuals: Tensor  # (N,) fp32, mean |s_n - s_(n-1)| / |s_(n-1)| over the tokens that ran step n
    terms: Tensor  # (4,) fp32, LATENT_TERMS: means over the tokens of a row, summed over the rows


def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """|after - before| / |before| of states (B, T, W) -> (B, T) fp32."""
    before, after = at_least_fp32(before), at_least_fp32(after)
    return (after - before).norm(dim=-1) / before.norm(dim=-1).clamp(min=1e-12)


def loop_trace(
    config: HaltingConfig,
    probabilities: list[Tensor],
    executed: list[Tensor],
    states: list[Tensor],
    out: Tensor,
    segment: Tensor | None,
    token_mask: Tensor | None,
    depths: Tensor | None = None,
) -> LoopTrace:
    """Summarises a pass.

    Args:
        probabilities, executed: (B, T) of each of the N steps, see Halting.
        states: (B, T, W), the initial state and the one after each step.
        out: (B, T, W), the loop's output.
        segment: (B, S), see context.segments; only the last T positions count.
        token_mask: (B, T), False under padding; None: no padding.
        depths: (B,), see AttentionContext: p, steps and changes are of the row's own steps.
    """
    p, ran = at_least_fp32(torch.stack(probabilities, -1)), torch.stack(executed, -1)
    real = torch.ones_like(ran[..., 0]) if token_mask is None else token_mask
    steps = ran.sum(-1)
    numbers = torch.arange(1, p.shape[-1] + 1, device=p.device)
    final = (steps[..., None] == numbers).float()
    cost = steps + (p * final).sum(-1) if config.kind == "act" else (p * numbers).sum(-1)
    with torch.set_grad_enabled(torch.is_grad_enabled() and config.stability_weight > 0):
        changes = torch.stack([relative_change(a, b) for a, b in zip(states, states[1:], strict=False)], -1)
    late = None if depths is None else p.shape[-1] - depths  # steps after which a row starts
    if late is not None:
        own = (numbers - 1 + late[:, None]).clamp(max=p.shape[-1] - 1)
        changes = changes.gather(-1, own[:, None].expand_as(changes))
    counted = (ran & real[..., None]).float()
    residuals = (changes.detach() * counted).sum((0, 1)) / counted.sum((0, 1)).clamp(min=1)
    zero = torch.zeros_like(cost)
    terms = (
        _ponder(config, p, cost) if config.learned else zero,
        _stability(p, changes) if config.stability_weight else zero,
        hoyer_square(out) if config.sparsity_weight else zero,
        _lost_information(states, segment, real, late) if config.information_weight else zero,
    )
    weights = real / real.sum(1, keepdim=True).clamp(min=1)
    sums = torch.stack([(term * weights).sum() for term in terms])
    return LoopTrace(p, steps, cost, residuals, sums)


def _ponder(config: HaltingConfig, p: Tensor, cost: Tensor) -> Tensor:
    """(B, T) cost of thinking, from probabilities (B, T, N).

    act: steps + remainder (Graves 2016, eq. 14), whose gradient is the remainder's. ponder: KL(p || truncated
    geometric) (PonderNet, eq. 8). entropy: -H(p), the divergence from a uniform prior up to log N
    (Ouro, arXiv 2510.25741, eq. 4).
    """
    if config.kind == "act":
        return cost
    log_p = p.clamp(min=1e-12).log()
    if config.kind == "entropy":
        return (p * log_p).sum(-1)
    steps = torch.arange(p.shape[-1], device=p.device)
    prior = (config.ponder_prior * (1 - config.ponder_prior) ** steps).float()
    return (p * (log_p - (prior / prior.sum()).log())).sum(-1)


def _stability(p: Tensor, changes: Tensor) -> Tensor:
    """(B, T): squared relative change of each step, times the probability of having halted before it.

    Counts only after halting: penalising every change would reward doing nothing.
    """
    halted = (p.cumsum(-1) - p).detach()
    return (halted * changes.square()).sum(-1)


def hoyer_square(x: Tensor) -> Tensor:
    """(..., W) -> (...): (|x|_1 / |x|_2)^2 rescaled from 1..W to 0..1 (Yang et al. 2020, eq. 4).

    0: a single non-zero number, 1: all equal.
    """
    x = at_least_fp32(x)
    ratio = x.abs().sum(-1).square() / x.square().sum(-1).clamp(min=1e-12)
    return (ratio - 1) / max(x.shape[-1] - 1, 1)


def _lost_information(
    states: list[Tensor], segment: Tensor | None, real: Tensor, late: Tensor | None
) -> Tensor:
    """(B, T): minus a lower bound, in nats, of the information that successive states share.

    InfoNCE (van den Oord et al. 2018, eq. 5): the previous state must identify a token's state among those of
    the document's other tokens; log(tokens) - loss bounds the information from below. Mean over the steps,
    of which a row takes none before number late (B,).
    """
    B, T = real.shape
    document = torch.zeros(B, T, device=real.device) if segment is None else segment[:, -T:].expand(B, T)
    same = (document[:, :, None] == document[:, None, :]) & real[:, :, None] & real[:, None, :]
    same = same | torch.eye(T, dtype=torch.bool, device=real.device)
    tokens, total = same.sum(-1).log(), torch.zeros((), device=real.device)
    for step, (before, after) in enumerate(itertools.pairwise(states)):
        unit_before, unit_after = (F.normalize(at_least_fp32(s), dim=-1) for s in (before, after))
        likeness = (unit_after @ unit_before.transpose(1, 2) / TEMPERATURE).masked_fill(~same, float("-inf"))
        loss = likeness.logsumexp(-1) - likeness.diagonal(dim1=1, dim2=2)
        lost = loss - tokens
        total = total + (lost if late is None else torch.where(step >= late[:, None], lost, 0.0))
    return total / (len(states) - 1 if late is None else len(states) - 1 - late[:, None])


def loop_sums(
    num_iterations: Tensor, halt_probs: Tensor, residuals: Tensor, real: Tensor | None = None
) -> Tensor:
    """What loop_figures needs from one batch; add it up over batches and ranks.

    Args:
        num_iterations: (U, B, T) of U loops, see LoopTrace.
        halt_probs: (U, B, T, N).
        residuals: (U, N).
        real: (B, T), False under padding; None: no padding.

    Returns:
        (3, N) fp64: tokens that stopped after each step, their probability, change times tokens that ran.
    """
    N = halt_probs.shape[-1]
    steps, halted = num_iterations.flatten(1), halt_probs.flatten(1, 2)
    if real is not None:
        counted = kept_tokens if real.device.type == "cpu" else zeroed_tokens
        steps, halted = counted(steps, halted, real.flatten())
    ran = torch.stack([(steps > n).sum(1) for n in range(N)], -1).double()
    stopped = ran.sum(0) - torch.cat((ran.sum(0)[1:], ran.new_zeros(1)))
    probability = halted.double().sum((0, 1))
    return torch.stack((stopped, probability, (residuals.double() * ran).sum(0)))


def kept_tokens(steps: Tensor, halted: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Of steps (U, n) and probabilities (U, n, N) those of real tokens (n,)."""
    return steps[:, real], halted[:, real]


def zeroed_tokens(steps: Tensor, halted: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The same for sums, where the host would have to wait for how many are real: the others become 0."""
    return steps * real, halted.masked_fill(~real[:, None], 0.0)


def loop_figures(sums: Tensor) -> dict[str, float | list[float]]:
    """Means from loop_sums (3, N).

    `steps_mean`; `steps_histogram`, the share of tokens that stopped after each step; `halting_distribution`,
    mean p_n; `residuals`, mean relative change per step over the tokens that ran it; `convergence_ratio`,
    the last step's change over the first step's.
    """
    stopped, probability, moved = sums
    ran = stopped.flip(0).cumsum(0).flip(0)
    steps = torch.arange(1, len(stopped) + 1, device=sums.device)
    residuals = moved / ran.clamp(min=1)
    last = int((ran > 0).sum()) - 1
    tokens = stopped.sum().clamp(min=1)
    return {
        "steps_mean": float((stopped * steps).sum() / tokens),
        "steps_histogram": (stopped / tokens).tolist(),
        "halting_distribution": (probability / tokens).tolist(),
        "residuals": residuals.tolist(),
        "convergence_ratio": float(residuals[last] / residuals[0].clamp(min=1e-12)),
    }
