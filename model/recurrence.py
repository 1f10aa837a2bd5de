"""The Latent Reasoning Unit: one loop for every placement.

    block           prelude layers -> looped layers x R -> coda layers; attention inside the loop
    kv              a token's KV latent, before keys and values are formed from it
    post_attention  attention's output, before it is added to the residual stream

Shapes: B batch, T tokens, W width of the state, R loop steps.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cache import slot_of
from model.causal_mixing import CausalMixing
from model.checkpointing import recomputed
from model.config.model import ModelConfig
from model.config.recurrence import nearest_integer
from model.context import AttentionContext
from model.halting import Halting, HaltingUnit, RowDepths
from model.layers import Linear, RMSNorm, SwiGLU
from model.loop_trace import LoopTrace, loop_trace

# The gates start nearly open, so that an untrained loop moves its state most of the way to the core's output.
GATE_BIAS = 2.0
# In a network that was trained without the loop, later steps start as 12% of the way to the core's output,
# and an injection as the mean of state and input. On a trained network of 135M parameters two steps then
# leave the perplexity as it was, and the gate's gradient is 6 times that at a bias of -4 (docs/LOG.md).
RETROFIT_GATE_BIAS = -2.0
RETROFIT_INPUT_SHARE = 0.5


class CoreOutput(NamedTuple):
    """One run of the loop's core."""

    candidate: Tensor  # (B, T, W)
    kept: dict[int, tuple[Tensor, ...]]  # keys and values for the next step, by layer; see cache.kept_keys
    extra: Any = None  # passed through


# (input (B, T, W), step, running tokens (B, T) or None, `kept` of the previous step) -> CoreOutput
Core = Callable[[Tensor, int, Tensor | None, dict[int, tuple[Tensor, ...]]], CoreOutput]


class LoopResult(NamedTuple):
    """A whole loop."""

    out: Tensor  # (B, T, W), normed unless output_norm=false
    trace: LoopTrace
    states: list[Tensor]  # (B, T, W) after each step, not normed
    extras: list[Any]  # of each step


class LatentReasoningUnit(nn.Module):
    """Carries a latent state through R passes of a core.

    By default each pass reads the normed state with the loop's input injected again, which keeps the loop
    from forgetting it (Huginn, arXiv 2502.05171, section 3.2); the gated update is the convex combination of
    a GRU (Cho et al. 2014, eq. 7) with the core's output as the candidate. Without norm, injection and gate
    the passes are layers with tied weights (Universal Transformer, arXiv 1807.03819, without its step
    embedding).

    Args:
        width: W.
        name: of the loop, for its slots in the cache.
        layers: whose keys and values the loop keeps in the cache.
        recompute_steps: activation checkpointing of each step.
    """

    def __init__(
        self,
        config: ModelConfig,
        width: int,
        name: str = "loop0",
        layers: Sequence[int] = (),
        recompute_steps: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.name, self.layers = config.recurrence, name, layers
        self.recompute_steps = recompute_steps
        r = self.config
        if r.state_norm:
            self.state_norm = RMSNorm(width, config.rms_norm_eps, config.rms_norm_affine)
        self.output_norm: nn.Module = nn.Identity()
        if r.output_norm:
            self.output_norm = RMSNorm(width, config.rms_norm_eps, config.rms_norm_affine)
        if r.injection in ("concat", "gate"):
            gate = r.injection == "gate"
            mixing = RetrofitInjection if r.starts_near else Linear
            self.injection = mixing(2 * width, width, bias=gate, initial_bias=0.0)
        if r.update == "gated":
            self.gate = Linear(2 * width, width, initial_bias=GATE_BIAS)
        if r.update == "retrofit":
            self.gate = Linear(2 * width, width, initial_bias=RETROFIT_GATE_BIAS, zero=True)
        if r.iteration_embedding:
            self.iteration = IterationEmbedding(width)
        self.halting = HaltingUnit(width, r.halting, r.starts_near) if r.halting.learned else None

    def forward(
        self,
        initial: Tensor,
        core: Core,
        context: AttentionContext,
        predict: Callable[[Tensor], Tensor] | None = None,
        first_state: Tensor | None = None,
    ) -> LoopResult:
        """Runs context.num_steps passes, or, at inference, until every token has halted.

        Args:
            initial: (B, T, W), the input of every pass and, by default, the initial state.
            core: what to loop.
            predict: normed states (B, T, W) -> logits, for exits by divergence.
            first_state: (B, T, W), a different initial state.
        """
        r, N = context.recurrence, context.num_steps
        active = r.halting.learned or (r.halting.kind == "threshold" and not self.training)
        readout = None if predict is None else lambda state: predict(self.output_norm(state))
        halting: Halting | RowDepths = (
            Halting(r.halting, self.halting, active, context, self.name, N, readout)
            if context.depths is None
            else RowDepths(context.depths, initial.shape[1], N)
        )
        state = initial if first_state is None else first_state
        states, extras, kept = [state], list[Any](), dict[int, tuple[Tensor, ...]]()
        for step in range(N):
            # With targets, all ranks take all steps, whatever their data.
            if not context.statistics and not self.training and halting.finished():
                self._fill_cache(context, step, initial.shape[1])
                break
            state, out = self._step(step, state, initial, core, context, halting.running, kept)
            halting.update(step, states[-1], state)
            states.append(state)
            extras.append(out.extra)
            kept = out.kept
        result = self._read_out(states, halting, r.expectation)
        trace = loop_trace(
            r.halting,
            halting.probabilities,
            halting.executed,
            states,
            result,
            context.segment,
            context.token_mask,
            context.depths,
        )
        return LoopResult(result, trace, states[1:], extras)

    def refine(self, latent: Tensor, core: Callable[[Tensor], Tensor]) -> LoopResult:
        """The unit by itself, with any module as its core.

        Args:
            latent: (B, T, W); every row is one document without padding.
            core: (B, T, W) -> (B, T, W), run in every step on what the config injects into the state.
        """
        r = self.config
        context = AttentionContext(recurrence=r, num_steps=r.num_steps, backprop_steps=r.backprop_steps)
        return self(latent, lambda x, *_: CoreOutput(core(x), {}), context)

    def _step(
        self,
        step: int,
        state: Tensor,
        initial: Tensor,
        core: Core,
        context: AttentionContext,
        running: Tensor | None,
        kept: dict[int, tuple[Tensor, ...]],
    ) -> tuple[Tensor, CoreOutput]:
        """One pass, with its gradients as training wants them."""
        advance = self._recomputed_advance if self.recompute_steps else self._advance
        cut = self._cut(step, context)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not cut):
            new, out = advance(state, initial, core, step, context.own_step(step), running, kept)
        if cut and context.depths is not None and running is not None:
            # A row that starts after the cut steps keeps the gradient of its initial state.
            new = torch.where(running[..., None], new, state)
        if context.num_steps == 1 and self.training and self.config.update == "retrofit":
            # Every weight has a gradient in every step, even at depth 1: ZeRO-3 relies on it.
            new = new + 0.0 * self.gate(torch.cat((initial, new), -1))
        return new, out

    def _advance(
        self,
        state: Tensor,
        initial: Tensor,
        core: Core,
        step: int,
        own: int | Tensor,
        running: Tensor | None,
        kept: dict[int, tuple[Tensor, ...]],
    ) -> tuple[Tensor, CoreOutput]:
        """One pass, for each row its step number `own`; tokens that do not run keep their state."""
        out = core(self._inject(state, initial, own), step, running, kept)
        new = self._update(state, out.candidate, own)
        return (new if running is None else torch.where(running[..., None], new, state)), out

    def _recomputed_advance(self, *inputs: Any) -> tuple[Tensor, CoreOutput]:
        if not torch.is_grad_enabled():
            return self._advance(*inputs)
        state, out = recomputed("iteration", self._advance, *inputs)
        return state, out

    def _inject(self, state: Tensor, initial: Tensor, step: int | Tensor) -> Tensor:
        x = self.state_norm(state) if self.config.state_norm else state
        kind = self.config.injection
        if self.config.iteration_embedding:
            x = x + self.iteration(step)
        if kind == "add":
            return x + initial
        if kind == "none":
            return x
        mixed = self.injection(torch.cat((x, initial), -1))
        if kind == "concat":
            return mixed
        share = mixed.sigmoid()
        return share * initial + (1 - share) * x

    def _update(self, state: Tensor, candidate: Tensor, step: int | Tensor) -> Tensor:
        whole = self.config.update == "retrofit" and step == 0
        if self.config.update == "simple" or whole is True:
            return candidate
        gate = self.gate(torch.cat((state, candidate), -1)).sigmoid()
        moved = state + gate * (candidate - state)
        return torch.where(whole, candidate, moved) if isinstance(whole, Tensor) else moved

    def _cut(self, step: int, context: AttentionContext) -> bool:
        """Whether truncated back-propagation leaves this step out."""
        kept = context.backprop_steps
        return self.training and kept is not None and step < context.num_steps - kept

    def _read_out(self, states: list[Tensor], halting: Halting | RowDepths, expectation: str) -> Tensor:
        if expectation != "state":
            return self.output_norm(states[-1])
        weighted = [p[..., None] * s for p, s in zip(halting.probabilities, states[1:], strict=True)]
        return self.output_norm(torch.stack(weighted).sum(0).to(states[-1].dtype))

    def _fill_cache(self, context: AttentionContext, done: int, num_tokens: int) -> None:
        """Later tokens may take more steps than these: there they find what these left in their last step."""
        if context.cache is None:
            return
        last = slot_of(self.config, done - 1)
        for step in range(done, context.num_steps):
            names = [f"{self.name}.mixing"]
            if step < context.num_steps - 1:  # after the last step there is no halting decision
                names.append(f"{self.name}.halting")
            for name in names:
                context.cache.repeat((name, done - 1), (name, step), num_tokens)
            if slot_of(self.config, step) != last:
                for layer in self.layers:
                    context.cache.repeat((layer, last), (layer, slot_of(self.config, step)), num_tokens)


class RetrofitInjection(Linear):
    """The injection (B, T, 2W) -> (B, T, W) of a loop in a trained network, from (state, the loop's input).

    Starts as a fixed mixture of the two, in which the input has RETROFIT_INPUT_SHARE. In the first step the
    two are equal, and so is what comes out.
    """

    def start(self, name: str, value: Tensor) -> None:
        """Writes an initial value: concat [(1 - s) I, s I], or a gate that stands open to a share of s.

        Args:
            name: weight or bias.
        """
        share = RETROFIT_INPUT_SHARE
        if name == "bias":
            value.fill_(math.log(share / (1 - share)))
        elif self.bias is None:
            identity = torch.eye(self.out_features)
            value.copy_(torch.cat(((1 - share) * identity, share * identity), 1))
        else:
            value.zero_()


class IterationEmbedding(nn.Module):
    """Sinusoids of the step's number (Universal Transformer, arXiv 1807.03819, eq. 6), with learned scales
    that start at 0. Defined for any depth.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.scale = width, nn.Parameter(torch.zeros(width))

    def forward(self, step: int | Tensor) -> Tensor:
        """Number of a step, from 0 -> (W,); of each row, (B, 1, 1) -> (B, 1, W)."""
        pairs = torch.arange((self.width + 1) // 2, device=self.scale.device)
        angles = (step + 1) * torch.exp(pairs * (-2 * math.log(10_000.0) / self.width))
        waves = torch.cat((angles.sin(), angles.cos()), -1)[..., : self.width]
        return waves.to(self.scale.dtype) * self.scale


class LatentRefinement(nn.Module):
    """The unit of one attention layer: iterates on each token's own state.

    The core is a pre-norm gated feed-forward layer. Optionally, a causal depthwise convolution first mixes
    the states of neighbouring tokens, and a projection adds the token's own query.
    """

    def __init__(
        self, config: ModelConfig, layer: int, width: int, query_width: int, recompute: bool
    ) -> None:
        super().__init__()
        r = config.recurrence
        self.name = f"layer{layer}"
        self.unit = LatentReasoningUnit(config, width, self.name, (), recompute)
        self.norm = RMSNorm(width, config.rms_norm_eps, config.rms_norm_affine)
        self.core = SwiGLU(width, r.latent_intermediate_size or 2 * width)
        self.core.down_proj.zero = r.starts_near
        if r.position_mixing:
            self.mixing = CausalMixing(width, r.position_mixing)
        if r.query_conditioned:
            self.query_proj = Linear(query_width, width, bias=False)

    def forward(self, latent: Tensor, query: Tensor, context: AttentionContext) -> tuple[Tensor, LoopTrace]:
        """latent (B, T, W) and queries (B, T, Q) of the same tokens -> refined latent (B, T, W), normed."""
        condition = self.query_proj(query) if hasattr(self, "query_proj") else None

        def core(
            x: Tensor, step: int, running: Tensor | None, kept: dict[int, tuple[Tensor, ...]]
        ) -> CoreOutput:
            if hasattr(self, "mixing"):
                # Neighbours of a halted token see what it showed in its last step.
                shown = x if running is None or not kept else torch.where(running[..., None], x, kept[0][0])
                kept = {0: (shown,)}
                x = x + self.mixing(shown, context, (f"{self.name}.mixing", step))
            if condition is not None:
                x = x + condition
            return CoreOutput(x + self.core(self.norm(x)), kept)

        result = self.unit(latent, core, context)
        return result.out, result.trace


def stacked_traces(traces: Sequence[LoopTrace]) -> LoopTrace | None:
    """A model's loops side by side: every field gets a leading axis; shorter loops are padded with 0."""
    if not traces:
        return None
    longest = max(t.halt_probs.shape[-1] for t in traces)

    def filled(x: Tensor) -> Tensor:
        return F.pad(x, (0, longest - x.shape[-1]))

    return LoopTrace(
        halt_probs=torch.stack([filled(t.halt_probs) for t in traces]),
        num_iterations=torch.stack([t.num_iterations for t in traces]),
        ponder_cost=torch.stack([t.ponder_cost for t in traces]),
        residuals=torch.stack([filled(t.residuals) for t in traces]),
        terms=torch.stack([t.terms for t in traces]),
    )


def sample_depth(config: ModelConfig, seed: int, step: int) -> int:
    """Loop steps in an optimizer step: a function of (seed, step) alone, so that all ranks agree.

    `poisson`: tau ~ N(log r - 0.125, 0.5), R ~ Poisson(e^tau) + 1 clamped to max_steps, where r is the mean
    depth minus 1 (Huginn, arXiv 2502.05171, section 3.3).
    """
    r = config.recurrence
    mean = r.mean_steps(step)
    if r.depth_sampling == "fixed" or mean == 1:
        return nearest_integer(mean)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    tau = torch.log(torch.tensor(mean - 1.0)) - 0.125 + 0.5 * torch.randn((), generator=generator)
    return min(int(torch.poisson(tau.exp(), generator=generator)) + 1, r.max_steps)


def sample_depths(config: ModelConfig, seed: int, step: int, num_rows: int) -> Tensor:
    """Loop steps of each row of the global batch, (num_rows,) int64: functions of (seed, step, row) alone.

    The distribution is sample_depth's. Each row turns two uniform numbers of one sequence into its draw, by
    inverting first the normal and then the Poisson distribution function.
    """
    r = config.recurrence
    mean = r.mean_steps(step)
    if mean == 1:
        return torch.ones(num_rows, dtype=torch.int64)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    normal, poisson = torch.rand(num_rows, 2, dtype=torch.float64, generator=generator).unbind(1)
    rate = torch.exp(math.log(mean - 1.0) - 0.125 + 0.5 * torch.special.ndtri(normal))[:, None]
    counts = torch.arange(r.max_steps - 1)
    below = torch.special.gammaincc(counts + 1.0, rate)  # P(at most this count)
    return 1 + (below < poisson[:, None]).sum(1)
