"""The layers of the network: embedded tokens -> final hidden states, with the loops among them.

Shapes: B batch, T tokens, D hidden, E experts, P pause tokens.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.causal_mixing import CausalMixing
from model.config.execution import ExecutionConfig
from model.config.model import ModelConfig
from model.context import AttentionContext, LoopStep
from model.decoder import AUX_TERMS, DecoderLayer, run_layer
from model.layers import layer_norm
from model.loop_trace import LoopTrace
from model.memory import RecurrentMemory
from model.moe import MoE
from model.mtp import MTPModule
from model.recurrence import CoreOutput, LatentReasoningUnit


class _LayersOutput(NamedTuple):
    """The result of several layers."""

    hidden: Tensor  # (B, T, D)
    aux: Tensor  # (2,), AUX_TERMS
    kept: dict[int, tuple[Tensor, ...]]  # by layer, see cache.kept_keys
    loads: dict[int, Tensor]  # by layer, (E,) tokens routed to each expert
    traces: list[LoopTrace]  # from the layers' own Latent Reasoning Units
    states: list[Tensor]  # (B, T, D) after each layer, if the context collects them


class TransformerOutput(NamedTuple):
    """What the head and the loss need."""

    hidden: Tensor  # (B, T, D), normed
    aux: Tensor  # (2,), AUX_TERMS summed over the layers, averaged over loop steps
    # For an expected loss: hidden (B, T, D) and p_n (B, T) of each step
    readouts: list[tuple[Tensor, Tensor]]
    traces: list[LoopTrace]  # of every loop


class Transformer(nn.Module):
    """Embedding, layers (some looped), final norm, modules of multi-token prediction."""

    def __init__(self, config: ModelConfig, moe_class: type[MoE], execution: ExecutionConfig) -> None:
        super().__init__()
        self.config, self.execution, L = config, execution, config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.learned_positions:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.embedding_mixing:
            taps = config.embedding_mixing
            # Starting at zero also learns, but a third slower: docs/LOG.md.
            self.embedding_mixing = CausalMixing(config.hidden_size, taps, initial_std=taps**-0.5)
        self.layers = nn.ModuleList(DecoderLayer(config, i, moe_class, execution) for i in range(L))
        block = config.recurrence.placement == "block"
        self.ranges = config.recurrence.layer_ranges(L) if block else []
        if self.ranges:
            recompute = execution.checkpointing == "iteration"
            self.recurrence = nn.ModuleList(
                LatentReasoningUnit(config, config.hidden_size, f"loop{i}", range(first, last + 1), recompute)
                for i, (first, last) in enumerate(self.ranges)
            )
        if config.num_pause_tokens:
            self.pause_tokens = nn.Embedding(config.num_pause_tokens, config.hidden_size)
        if config.num_memory_tokens:
            self.memory = RecurrentMemory(config)
        self.norm = layer_norm(config)
        if config.num_nextn_predict_layers:
            modules = range(L, L + config.num_nextn_predict_layers)
            self.mtp = nn.ModuleList(MTPModule(config, i, moe_class, execution) for i in modules)

    def forward(
        self,
        x: Tensor,
        context: AttentionContext,
        predict: Callable[[Tensor], Tensor] | None = None,
        noise_seed: int | None = None,
    ) -> TransformerOutput:
        """Embedded tokens x (B, T, D) -> normed hidden states and what the loss needs.

        Args:
            predict: states (B, T, D), not yet normed -> logits, for exits by divergence.
            noise_seed: start the loops from normal noise instead of their input.
        """
        aux, traces, done = zero_aux(x), [], 0
        states, probabilities = [x], None
        for number, (first, last) in enumerate(self.ranges):
            out = self._run_counted(range(done, first), x, context)
            start = None if noise_seed is None else _noise(out.hidden, noise_seed)
            unit: Any = self.recurrence[number]
            loop = unit(out.hidden, self._core(first, last, context), context, predict, start)
            for _, loads, after in loop.extras:
                self._count(loads)
                _collect(context, after)
            aux = aux + out.aux + torch.stack([core_aux for core_aux, _, _ in loop.extras]).mean(0)
            traces.append(loop.trace)
            x, done = loop.out, last + 1
            states = [x]
            if self.training and context.statistics and context.recurrence.expectation == "loss":
                states = [unit.output_norm(state) for state in loop.states]
                probabilities = loop.trace.halt_probs.unbind(-1)
        tails = [self._run_counted(range(done, len(self.layers)), state, context) for state in states]
        hidden = [self.norm(tail.hidden) for tail in tails]
        aux = aux + torch.stack([tail.aux for tail in tails]).mean(0)
        readouts = [] if probabilities is None else list(zip(hidden, probabilities, strict=True))
        return TransformerOutput(hidden[-1], aux, readouts, traces + tails[-1].traces)

    def embed(self, tokens: Tensor, context: AttentionContext, embedded: Tensor | None = None) -> Tensor:
        """tokens (B, T) -> (B, T, D), or with P pause tokens after each (B, T (1 + P), D).

        Args:
            embedded: (B, T, D) instead of the tokens' embeddings, and treated as these are.
        """
        x = self.embed_tokens(tokens) if embedded is None else embedded
        if self.config.embedding_mixing:
            x = x + self.embedding_mixing(x, context, ("embedding", 0))
        if self.config.learned_positions:
            x = x + self.embed_positions(context.positions)
        if not self.config.num_pause_tokens:
            return x
        pauses = self.pause_tokens(torch.arange(self.config.num_pause_tokens, device=x.device))
        return torch.cat((x[:, :, None], pauses.expand(*x.shape[:2], -1, -1)), 2).flatten(1, 2)

    def _core(self, first: int, last: int, context: AttentionContext) -> Callable[..., CoreOutput]:
        """Layers first..last as the core of a loop; see recurrence.Core."""
        r = context.recurrence
        remembers = r.carries_keys or context.cache is not None

        def core(
            state: Tensor, step: int, running: Tensor | None, kept: dict[int, tuple[Tensor, ...]]
        ) -> CoreOutput:
            loop = LoopStep(r, step, running, kept) if remembers else None
            inner = dataclasses.replace(context, loop=loop)
            if context.depths is not None and running is not None:  # the losses are means over a row's steps
                inner.row_weights = context.num_steps / context.depths
                real = context.token_mask
                inner.token_mask = running if real is None else running & real
            out = self._run(range(first, last + 1), state, inner)
            return CoreOutput(out.hidden, out.kept, (out.aux, out.loads, out.states))

        return core

    def predict_further(
        self, module: int, hidden: Tensor, tokens: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Tensor]:
        """One module of multi-token prediction.

        Args:
            hidden: (B, T, D) of the model or of the previous module.
            tokens: (B, T), which the hidden states predict.

        Returns:
            Normed states (B, T, D) that predict the tokens after those, and the (2,) auxiliary losses.
        """
        mtp: Any = self.mtp[module]
        out = run_layer(mtp, self.execution, hidden, self.embed_tokens(tokens), context)
        if self.training and out.load is not None:
            mtp.count(out.load)
        return out.hidden, zero_aux(hidden) if out.aux is None else out.aux

    def _run(self, layers: range, x: Tensor, context: AttentionContext) -> _LayersOutput:
        result = _LayersOutput(x, zero_aux(x), {}, {}, [], [])
        for i in layers:
            out = run_layer(self.layers[i], self.execution, result.hidden, context)
            result = result._replace(
                hidden=out.hidden, aux=result.aux if out.aux is None else result.aux + out.aux
            )
            if out.kept is not None:
                result.kept[i] = out.kept
            if out.load is not None:
                result.loads[i] = out.load
            if out.trace is not None:
                result.traces.append(out.trace)
            if context.states is not None:
                result.states.append(out.hidden)
        return result

    def _run_counted(self, layers: range, x: Tensor, context: AttentionContext) -> _LayersOutput:
        out = self._run(layers, x, context)
        self._count(out.loads)
        _collect(context, out.states)
        return out

    def _count(self, loads: dict[int, Tensor]) -> None:
        """In training, adds the load of a pass to the experts' own count."""
        if self.training:
            for i, load in loads.items():
                layer: Any = self.layers[i]
                layer.count(load)


def _collect(context: AttentionContext, states: list[Tensor]) -> None:
    """Runs outside the part that activation checkpointing runs twice."""
    if context.states is not None:
        context.states.extend(states)


def zero_aux(x: Tensor) -> Tensor:
    """(2,) auxiliary losses, all 0."""
    return torch.zeros(len(AUX_TERMS), device=x.device)


def _noise(like: Tensor, seed: int) -> Tensor:
    """(B, T, D) standard normal noise; a seed gives the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator).to(like)
