"""The Latent Reasoning Unit in `block` placement: prelude -> core x R -> coda.

Shapes: B batch, T tokens, D hidden, R loop steps.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .config import ModelConfig
from .layers import Linear, RMSNorm

# The gate starts nearly open, so that an untrained loop moves its state by most of what the core says.
GATE_BIAS = 2.0


class LatentReasoningUnit(nn.Module):
    """Carries a latent state through R passes of the core layers.

    Each pass reads the normed state with the prelude's output re-injected, which keeps the loop from
    forgetting its input (Huginn, arXiv 2502.05171, section 3.2); the gated update is the convex
    combination of a GRU (Cho et al. 2014, eq. 7) with the core's output as the candidate.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config.recurrence
        D = config.hidden_size
        self.state_norm = RMSNorm(D, config.rms_norm_eps, config.rms_norm_affine)
        self.output_norm = RMSNorm(D, config.rms_norm_eps, config.rms_norm_affine)
        if self.config.injection == "concat":
            self.injection = Linear(2 * D, D, bias=False)
        if self.config.update == "gated":
            self.gate = Linear(2 * D, D)

    def forward(
        self, prelude: Tensor, core: Callable[[Tensor, int], tuple[Tensor, Tensor]], num_steps: int
    ) -> tuple[Tensor, Tensor]:
        """Runs num_steps passes.

        Args:
            prelude: (B, T, D), the state before the first pass and the input of every pass.
            core: maps (B, T, D) and the step's number to (B, T, D) and its auxiliary losses.

        Returns:
            The last state (B, T, D), normed, and the auxiliary losses averaged over the passes.
        """
        state, total = prelude, torch.zeros(())
        for step in range(num_steps):
            candidate, aux = core(self._inject(self.state_norm(state), prelude), step)
            state = self._update(state, candidate)
            total = total.to(aux.device) + aux
        return self.output_norm(state), total / num_steps

    def _inject(self, state: Tensor, prelude: Tensor) -> Tensor:
        if self.config.injection == "concat":
            return self.injection(torch.cat((state, prelude), -1))
        return state + prelude

    def _update(self, state: Tensor, candidate: Tensor) -> Tensor:
        if self.config.update == "simple":
            return candidate
        gate = self.gate(torch.cat((state, candidate), -1)).sigmoid()
        return state + gate * (candidate - state)


def sample_depth(config: ModelConfig, seed: int, step: int) -> int:
    """Loop steps of an optimizer step, a function of (seed, step) alone, so that all ranks agree.

    `poisson`: tau ~ N(log r - 0.125, 0.5), R ~ Poisson(e^tau) + 1 clamped to max_steps, r the mean depth
    less one (Huginn, arXiv 2502.05171, section 3.3).
    """
    r = config.recurrence
    if r.depth_sampling == "fixed" or r.num_steps == 1:
        return r.num_steps
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    tau = torch.log(torch.tensor(r.num_steps - 1.0)) - 0.125 + 0.5 * torch.randn((), generator=generator)
    return min(int(torch.poisson(tau.exp(), generator=generator)) + 1, r.max_steps)
