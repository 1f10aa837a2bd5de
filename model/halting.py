"""Halting: one code path for every kind, in training, prefill and decoding.

A token that reaches step n stops there with probability l_n, so its overall probability of stopping at n is
p_n = l_n prod_{j<n} (1 - l_j) (PonderNet, arXiv 2107.05407, eq. 6). The last step takes the remainder: the
p_n sum to 1. A token halts, and its state freezes, once 1 - prod_{j<=n} (1 - l_j) reaches the threshold; that
step then takes the remainder. Fixed depth is l = 0, a training-free exit is l in {0, 1}.

Shapes: B batch, T tokens, S cached and new tokens, W width of the state, N loop steps.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config.recurrence import HaltingConfig
from model.context import AttentionContext
from model.layers import Linear, at_least_fp32

# An untrained unit halts with probability 0.12 per step, so that learning starts from many steps.
HALTING_BIAS = -2.0


class HaltingUnit(nn.Module):
    """Halting logits: from a token's own state, and from the mean over its document so far."""

    def __init__(self, width: int, config: HaltingConfig, zero: bool = False) -> None:
        super().__init__()
        if "token" in config.heads:
            self.token = Linear(width, 1, initial_bias=HALTING_BIAS, zero=zero)
        if "sequence" in config.heads:
            self.sequence = Linear(width, 1, initial_bias=HALTING_BIAS, zero=zero)


class Halting:
    """Which tokens still run in one pass of a loop, and the probability that each step is the last.

    Args:
        config: kind, granularity and limits.
        unit: the learned logits; None for kinds without any.
        active: whether any token may halt in this pass; a training-free exit only halts at inference.
        context: of this pass.
        name: of the loop, for its slots in the cache.
        num_steps: N.
        predict: states (B, T, W) -> logits (B, T, V), for the divergence of predictions.
    """

    def __init__(
        self,
        config: HaltingConfig,
        unit: HaltingUnit | None,
        active: bool,
        context: AttentionContext,
        name: str,
        num_steps: int,
        predict: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.config, self.unit, self.active, self.context = config, unit, active, context
        self.name, self.num_steps, self.predict = name, num_steps, predict
        self.running: Tensor | None = None  # (B, T) tokens that execute the next step; None: all
        self.probabilities: list[Tensor] = []  # p_n, each (B, T)
        self.executed: list[Tensor] = []  # booleans, each (B, T)
        self._remaining: Tensor | None = None  # (B, T), left to the steps to come; None: 1
        self._signals: dict[str, Tensor] = {}
        self._prediction: Tensor | None = None

    def finished(self) -> bool:
        """Whether every token has halted; waits for the device."""
        return self.running is not None and not bool(self.running.any())

    def update(self, step: int, before: Tensor, after: Tensor) -> None:
        """Records a step that took the states from `before` to `after`, (B, T, W)."""
        shape = after.shape[:2]
        running = (
            torch.ones(shape, dtype=torch.bool, device=after.device) if self.running is None else self.running
        )
        left = self._remaining
        if left is None:
            left = torch.ones((), device=after.device).expand(shape)
        self.executed.append(running)
        if step == self.num_steps - 1:
            if self.config.learned and torch.is_grad_enabled() and self.context.cache is None:
                # Every weight has a gradient in every step, even at depth 1: ZeRO-3 relies on it.
                left = left + 0.0 * self._chance(step, before, after, running)
            self.probabilities.append(left)
            self._remaining = torch.zeros_like(left)
            return
        if not self.active:
            self.probabilities.append(torch.zeros(shape, device=after.device))
            self._remaining = left
            return
        chance = self._chance(step, before, after, running)
        if step + 1 < self.config.min_steps:
            chance = torch.zeros_like(chance)
        limit = self.config.limit if self.config.learned else 1.0
        halts = running & (1 - left * (1 - chance) >= limit)
        spent = torch.where(halts, left, left * chance)  # 0 for tokens that halted before: nothing is left
        self.probabilities.append(spent)
        self._remaining = left - spent
        self.running = running & ~halts

    def _chance(self, step: int, before: Tensor, after: Tensor, running: Tensor) -> Tensor:
        """(B, T) l_n in fp32."""
        share = {"token": 1.0, "sequence": 0.0, "mixed": self.config.mixture}[self.config.granularity]
        if self.config.learned:
            assert self.unit is not None
            chance = torch.zeros((), device=after.device)
            if share > 0:
                chance = chance + share * at_least_fp32(self.unit.token(after)[..., 0]).sigmoid()
            if share < 1:
                mean = self._document_mean(step, at_least_fp32(self.unit.sequence(after)[..., 0]), running)
                chance = chance + (1 - share) * mean.sigmoid()
            return chance
        signal = self._change(before, after)
        if share < 1:
            mean = self._document_mean(step, signal, running)
            signal = share * signal + (1 - share) * mean
        still = (
            signal >= self.config.limit if self.config.measure == "cosine" else signal <= self.config.limit
        )
        return still.float()

    def _change(self, before: Tensor, after: Tensor) -> Tensor:
        """(B, T): cosine of successive states, or KL(prediction after || prediction before) in nats."""
        if self.config.measure == "cosine":
            return F.cosine_similarity(at_least_fp32(before), at_least_fp32(after), dim=-1)
        assert self.predict is not None
        if self._prediction is None:
            self._prediction = at_least_fp32(self.predict(before)).log_softmax(-1)
        prediction = at_least_fp32(self.predict(after)).log_softmax(-1)
        change = (prediction.exp() * (prediction - self._prediction)).sum(-1)
        self._prediction = prediction
        return change

    def _document_mean(self, step: int, signal: Tensor, running: Tensor) -> Tensor:
        """Mean of a signal (B, T) over the token's document so far; halted tokens keep their last signal."""
        if "last" in self._signals:
            signal = torch.where(running, signal, self._signals["last"])
        self._signals["last"] = signal
        T = signal.shape[1]
        cache = self.context.cache
        if cache is not None:
            signal = cache.append((f"{self.name}.halting", step), signal[..., None])[..., 0]
        return document_mean(signal, self.context.segment)[:, -T:]


class RowDepths:
    """In place of Halting where each row has a depth: rows that take fewer steps start later.

    All rows take their last step together, so that truncated back-propagation, the last steps of the loop,
    is the last steps of every row.

    Args:
        depths: (B,) int64, within 1..num_steps.
        num_tokens: T.
        num_steps: N.
    """

    def __init__(self, depths: Tensor, num_tokens: int, num_steps: int) -> None:
        steps = torch.arange(num_steps, device=depths.device)[:, None, None]
        shape = (num_steps, len(depths), num_tokens)
        self._runs = (steps >= num_steps - depths[:, None]).expand(shape)
        self.running: Tensor | None = self._runs[0]  # (B, T) tokens that execute the next step
        self.probabilities = list((steps == depths[:, None] - 1).float().expand(shape))  # as Halting's
        self.executed = list((steps < depths[:, None]).expand(shape))  # booleans, by the row's own steps

    def finished(self) -> bool:
        return False

    def update(self, step: int, before: Tensor, after: Tensor) -> None:
        if step + 1 < len(self._runs):
            self.running = self._runs[step + 1]


def document_mean(signal: Tensor, segment: Tensor | None) -> Tensor:
    """Causal mean (B, S) of signal (B, S) within segments (B, S), see context.segments.

    Padding keeps its own value. segment=None: one document per row.
    """
    if segment is None:
        return signal.cumsum(1) / torch.arange(1, signal.shape[1] + 1, device=signal.device)
    B, S = signal.shape
    real = segment >= 0
    document = segment.clamp(min=0).expand(B, S)
    column = torch.arange(S, device=signal.device).expand(B, S)
    first = torch.full((B, S), S, device=signal.device).scatter_reduce(
        1, document, torch.where(real, column, S), "amin"
    )
    begin = first.gather(1, document).clamp(max=S - 1)
    sums = F.pad((signal * real).cumsum(1), (1, 0))
    counts = F.pad(real.expand(B, S).long().cumsum(1), (1, 0))
    total = sums[:, 1:] - sums.gather(1, begin)
    count = counts[:, 1:] - counts.gather(1, begin)
    return torch.where(real, total / count.clamp(min=1), signal)
