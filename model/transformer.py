"""The network: tokens -> hidden states -> logits or loss.

Shapes: B batch, T new tokens, S cached and new tokens, D hidden, V vocabulary.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .attention_backends import (
    AttentionContext,
    LoopStep,
    flex_mask,
    row_boundaries,
    segments,
    visible_keys,
)
from .blockwise_attention import hidden_keys
from .cache import LatentCache, full_mask
from .config import ModelConfig
from .decoder import AUX_TERMS, DecoderLayer, run_layer
from .execution import ExecutionConfig, attention_backend
from .generate import generate
from .latent_terms import LATENT_TERMS, LoopTrace
from .layers import Linear, RMSNorm, linear, rotations
from .losses import IGNORE_INDEX, chunked_cross_entropy, loss_terms, total_loss
from .memory import RecurrentMemory
from .moe import Experts, MoE
from .mtp import MTPModule, shifted
from .recurrence import CausalMixing, CoreOutput, IterationEmbedding, LatentReasoningUnit, stacked_traces


class ModelOutput(NamedTuple):
    """Logits and hidden states when no targets are given; otherwise the loss of this batch and its terms.

    A named tuple, since ZeRO-3 looks for tensors in tuples and dicts only.
    """

    logits: Tensor | None = None  # (B, T, V), or of the last logits_to_keep places
    hidden: Tensor | None = None  # (B, T, D), normed
    loss: Tensor | None = None  # normalised by this batch's own counts
    loss_sums: dict[str, Tensor] | None = None  # one scalar per term of losses.loss_terms, not normalised
    # Of the U loops, without recurrence None; see latent_terms.LoopTrace
    halt_probs: Tensor | None = None  # (U, B, T, N)
    num_iterations: Tensor | None = None  # (U, B, T)
    ponder_cost: Tensor | None = None  # (U, B, T)
    residuals: Tensor | None = None  # (U, N)


class LMHead(nn.Module):
    """Projection to the vocabulary, which also forms the loss: see losses.py for why."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, hidden: Tensor, targets: Tensor | None = None, share: Tensor | None = None) -> Tensor:
        """hidden (B, T, D) -> logits (B, T, V), or with targets (B, T) their summed cross-entropy.

        share: (B, T) factor on each target's loss; None: 1.
        """
        if targets is None:
            return linear(hidden, self.weight)
        share = None if share is None else share.flatten()
        return chunked_cross_entropy(hidden.flatten(0, 1), self.weight, targets.flatten(), share)


class _LayersOutput(NamedTuple):
    """Several layers' result."""

    hidden: Tensor  # (B, T, D)
    aux: Tensor  # (2,), AUX_TERMS
    kept: dict[int, tuple[Tensor, ...]]  # by layer, see cache.kept_keys
    loads: dict[int, Tensor]  # by layer, (E,) tokens given to each expert
    traces: list[LoopTrace]  # of the layers' own Latent Reasoning Units


class TransformerOutput(NamedTuple):
    """What the head and the loss need."""

    hidden: Tensor  # (B, T, D), normed
    aux: Tensor  # (2,), AUX_TERMS summed over the layers, averaged over loop steps
    readouts: list[
        tuple[Tensor, Tensor]
    ]  # for an expected loss: hidden (B, T, D) and p_n (B, T) of each step
    traces: list[LoopTrace]  # of every loop


class Transformer(nn.Module):
    """Embedding, layers (some looped), final norm, modules of multi-token prediction."""

    def __init__(self, config: ModelConfig, moe_class: type[MoE], execution: ExecutionConfig) -> None:
        super().__init__()
        self.config, self.execution, L = config, execution, config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
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
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.rms_norm_affine)
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
        aux, traces, done = _no_aux(x), [], 0
        states, probabilities = [x], None
        for number, (first, last) in enumerate(self.ranges):
            out = self._run_counted(range(done, first), x, context)
            start = None if noise_seed is None else _noise(out.hidden, noise_seed)
            unit: Any = self.recurrence[number]
            loop = unit(out.hidden, self._core(first, last, context), context, predict, start)
            for _, loads in loop.extras:
                self._count(loads)
            aux = aux + out.aux + torch.stack([core_aux for core_aux, _ in loop.extras]).mean(0)
            traces.append(loop.trace)
            x, done = loop.out, last + 1
            states = [x]
            if self.training and context.statistics and self.config.recurrence.expectation == "loss":
                states = [unit.output_norm(state) for state in loop.states]
                probabilities = loop.trace.halt_probs.unbind(-1)
        tails = [self._run_counted(range(done, len(self.layers)), state, context) for state in states]
        hidden = [self.norm(tail.hidden) for tail in tails]
        aux = aux + torch.stack([tail.aux for tail in tails]).mean(0)
        readouts = [] if probabilities is None else list(zip(hidden, probabilities, strict=True))
        return TransformerOutput(hidden[-1], aux, readouts, traces + tails[-1].traces)

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> (B, T, D), or with P pause tokens after each (B, T (1 + P), D)."""
        x = self.embed_tokens(tokens)
        if not self.config.num_pause_tokens:
            return x
        pauses = self.pause_tokens(torch.arange(self.config.num_pause_tokens, device=x.device))
        return torch.cat((x[:, :, None], pauses.expand(*x.shape[:2], -1, -1)), 2).flatten(1, 2)

    def _core(self, first: int, last: int, context: AttentionContext) -> Callable[..., CoreOutput]:
        """Layers first..last as what a loop runs; see recurrence.Core."""
        r = self.config.recurrence
        remembers = r.carries_keys or context.cache is not None

        def core(
            state: Tensor, step: int, running: Tensor | None, kept: dict[int, tuple[Tensor, ...]]
        ) -> CoreOutput:
            loop = LoopStep(r, step, running, kept) if remembers else None
            out = self._run(range(first, last + 1), state, dataclasses.replace(context, loop=loop))
            return CoreOutput(out.hidden, out.kept, (out.aux, out.loads))

        return core

    def predict_further(
        self, module: int, hidden: Tensor, tokens: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Tensor]:
        """One module of multi-token prediction.

        Args:
            hidden: (B, T, D) of the model or of the module before.
            tokens: (B, T), those that the hidden states predict.

        Returns:
            Normed states (B, T, D) that predict the tokens after those, and the (2,) auxiliary losses.
        """
        mtp: Any = self.mtp[module]
        out = run_layer(mtp, self.execution, hidden, self.embed_tokens(tokens), context)
        if self.training and out.load is not None:
            mtp.count(out.load)
        return out.hidden, _no_aux(hidden) if out.aux is None else out.aux

    def _run(self, layers: range, x: Tensor, context: AttentionContext) -> _LayersOutput:
        result = _LayersOutput(x, _no_aux(x), {}, {}, [])
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
        return result

    def _run_counted(self, layers: range, x: Tensor, context: AttentionContext) -> _LayersOutput:
        out = self._run(layers, x, context)
        self._count(out.loads)
        return out

    def _count(self, loads: dict[int, Tensor]) -> None:
        """Adds a pass's load to the experts' own count, in training."""
        if self.training:
            for i, load in loads.items():
                layer: Any = self.layers[i]
                layer.count(load)


class ZeroModel(nn.Module):
    """The language model.

    Args:
        config: sizes and switches.
        moe_class: the mixture-of-experts layer; pretrain passes its expert-parallel one.
        seed: the initial weights are a function of (seed, parameter name, global expert number), so that
            they are the same however the model is spread over ranks.
        execution: how to compute; changes no result.
    """

    def __init__(
        self,
        config: ModelConfig,
        moe_class: type[MoE] = MoE,
        seed: int = 0,
        execution: ExecutionConfig | None = None,
    ) -> None:
        super().__init__()
        self.config, self.execution = config, execution or ExecutionConfig()
        self.model = Transformer(config, moe_class, self.execution)
        self.lm_head = LMHead(config)
        if not self.lm_head.weight.is_meta:  # on the meta device there are shapes only
            initialize(self, seed)

    def forward(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        targets: Tensor | None = None,
        num_steps: int | None = None,
        cache: LatentCache | None = None,
        logits_to_keep: int = 0,
        noise_seed: int | None = None,
    ) -> ModelOutput:
        """Runs the model.

        Args:
            tokens: (B, T) int64.
            attention_mask: (B, S), 1 or True where a token is real; S counts cached tokens too.
            position_ids: (B, T); default: counted from the start of each document, padding left out.
            cu_seqlens: (B, n) int32, starts of the documents packed into each row, 0 first, padded with T.
            targets: (B, T) int64, the token to predict at each place or losses.IGNORE_INDEX.
            num_steps: loop steps; default: the config's.
            cache: latents of earlier tokens; extended in place.
            logits_to_keep: form the logits of the last so many places only; 0: of all.
            noise_seed: start block loops from noise, to see whether they forget where they started.

        Raises:
            ValueError: the row is longer than max_position_embeddings, or the arguments do not fit together.
        """
        steps = self.config.recurrence.num_steps if num_steps is None else num_steps
        if steps < 1:
            raise ValueError(f"num_steps={steps} must be at least 1")
        self._check_length(tokens, cu_seqlens, cache)
        if self.config.num_memory_tokens:
            out = self._read_segments(tokens, attention_mask, cu_seqlens, cache, targets is not None)
        else:
            context = self._context(tokens, attention_mask, position_ids, cu_seqlens, cache)
            context.statistics, context.num_steps = targets is not None, steps
            predict = self._predict if self._compares_predictions() else None
            out = self.model(self.model.embed(tokens), context, predict, noise_seed)
            pauses = self.config.num_pause_tokens
            out = out._replace(hidden=out.hidden[:, pauses :: 1 + pauses])
        if cache is not None:
            cache.advance(tokens.shape[1] * (1 + self.config.num_pause_tokens))
        loops = stacked_traces(out.traces)
        report = {} if loops is None else {name: getattr(loops, name) for name in _REPORTED}
        if targets is None:
            logits = self.lm_head(out.hidden[:, -logits_to_keep:])
            return ModelOutput(logits=logits, hidden=out.hidden, **report)
        sums = {"cross_entropy": self._cross_entropy(out, targets)}
        aux = out.aux
        if self.config.num_nextn_predict_layers:
            sums["mtp"], mtp_aux = self._predict_further(out.hidden, tokens, targets, context)
            aux = aux + mtp_aux
        sums |= dict(zip(AUX_TERMS, aux.unbind(), strict=True))
        if loops is not None:
            sums |= dict(zip(LATENT_TERMS, loops.terms.mean(0).unbind(), strict=True))
        sums = {term.name: sums[term.name] for term in loss_terms(self.config)}
        counts = {"targets": int((targets != IGNORE_INDEX).sum()), "rows": len(tokens)}
        return ModelOutput(loss=total_loss(self.config, sums, counts), loss_sums=sums, **report)

    def _read_segments(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: LatentCache | None,
        all_segments: bool,
    ) -> TransformerOutput:
        """As a Recurrent Memory Transformer."""
        (B, T), past = tokens.shape, 0 if cache is None else cache.length
        memory: Any = self.model.memory
        real = full_mask(attention_mask, B, past + T, tokens.device)
        segment = segments(real, cu_seqlens)[:, past:]
        state = None
        if cache is not None:
            state = memory.first_state(tokens) if cache.memory is None else cache.memory

        def run(x: Tensor, exists: Tensor) -> Tensor:
            return self.model(x, self._context(exists.long(), exists, None, None, None)).hidden

        hidden, state = memory(tokens, segment, self.model.embed_tokens, run, state, all_segments)
        if cache is not None:
            cache.memory = state
        return TransformerOutput(hidden, _no_aux(hidden), [], [])

    def _cross_entropy(self, out: TransformerOutput, targets: Tensor) -> Tensor:
        """Summed over the targets; in training with an expected loss, sum_n p_n CE_n."""
        if not out.readouts:
            return self.lm_head(out.hidden, targets)
        return torch.stack([self.lm_head(h, targets, p) for h, p in out.readouts]).sum()

    def _predict(self, states: Tensor) -> Tensor:
        """Early readout of states (B, T, D): head and final norm alone.

        The layers after the loop would see the unfinished states of other tokens in a full pass, and their
        last ones in decoding: the two would halt differently.
        """
        return self.lm_head(self.model.norm(states))

    def _compares_predictions(self) -> bool:
        halting = self.config.recurrence.halting
        return halting.kind == "threshold" and halting.measure == "kl" and not self.training

    def _predict_further(
        self,
        hidden: Tensor,
        tokens: Tensor,
        targets: Tensor,
        context: AttentionContext,
    ) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy of multi-token prediction, the modules' mean, and auxiliary losses (2,)."""
        modules = self.config.num_nextn_predict_layers
        loss, total = hidden.new_zeros((), dtype=torch.float32), _no_aux(hidden)
        segment = torch.zeros_like(tokens) if context.segment is None else context.segment
        for module in range(modules):
            further, further_targets = shifted(tokens, targets, segment, module + 1)
            hidden, aux = self.model.predict_further(module, hidden, further, context)
            loss = loss + self.lm_head(hidden, further_targets) / modules
            total = total + aux
        return loss, total

    def draft(
        self, hidden: Tensor, tokens: Tensor, attention_mask: Tensor | None, cache: LatentCache
    ) -> Tensor:
        """Logits of multi-token prediction's first module, for drafts.

        Args:
            hidden: (B, T, D) as forward returned them for the last T tokens.
            tokens: (B, T), the tokens that followed those.
            attention_mask: as in the call of forward.
            cache: the module's own, extended in place.

        Returns:
            (B, T, V), predictions of the tokens after `tokens`.
        """
        self._check_length(tokens, None, cache)
        context = self._context(tokens, attention_mask, None, None, cache)
        further, _ = self.model.predict_further(0, hidden, tokens, context)
        cache.advance(tokens.shape[1])
        return self.lm_head(further)

    def _context(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: LatentCache | None,
    ) -> AttentionContext:
        """What the layers share."""
        past = cache.length if cache is not None else 0
        places = 1 + self.config.num_pause_tokens
        if places > 1:
            tokens = tokens.repeat_interleave(places, 1)
            if attention_mask is not None:
                attention_mask = attention_mask.repeat_interleave(places, 1)
            if cu_seqlens is not None:
                cu_seqlens = cu_seqlens * places
            if position_ids is not None:
                offsets = torch.arange(places, device=tokens.device)
                position_ids = (position_ids[..., None] * places + offsets).flatten(1)
        B, S = len(tokens), past + tokens.shape[1]
        plain = attention_mask is None and cu_seqlens is None
        segment, token_mask = None, None
        if not plain:
            real = full_mask(attention_mask, B, S, tokens.device)
            segment = segments(real, cu_seqlens)
            token_mask = None if attention_mask is None else real[:, past:]
            position_ids = _positions(real, cu_seqlens)[:, past:] if position_ids is None else position_ids
        elif position_ids is None:
            position_ids = torch.arange(past, S, device=tokens.device)[None]
        rotation = rotations(position_ids, self.config)
        context = AttentionContext(rotation, "sdpa", None, token_mask, cache=cache, segment=segment)
        self._choose_backend(context, tokens, segment, cu_seqlens)
        return context

    def _check_length(self, tokens: Tensor, cu_seqlens: Tensor | None, cache: LatentCache | None) -> None:
        past = 0 if cache is None else cache.length // (1 + self.config.num_pause_tokens)
        length = past + tokens.shape[1]
        if self.config.max_position_embeddings < length and (cache is None or cache.limited):
            raise ValueError(
                f"{length} tokens exceed max_position_embeddings={self.config.max_position_embeddings}; "
                "shorten the input or train with a larger value"
            )
        if cu_seqlens is not None and past:
            raise ValueError("cu_seqlens describes whole rows and cannot be used with a filled cache")

    def _choose_backend(
        self, context: AttentionContext, tokens: Tensor, segment: Tensor | None, cu_seqlens: Tensor | None
    ) -> None:
        """Fills in what the attention backend needs.

        flex takes whole rows, varlen and flash_attn whole rows without padding; all else goes through sdpa.
        """
        (B, T), dtype = tokens.shape, self.model.embed_tokens.weight.dtype
        backend = attention_backend(self.execution.attention, tokens.device.type, dtype)
        past = context.cache.length if context.cache is not None else 0
        if self.config.recurrence.cache == "parallel":  # the keys of several steps need a mask of their own
            context.mask = visible_keys(tokens.new_zeros(1, past + T) if segment is None else segment, T)
            return
        if backend == "flex" and tokens.device.type == "cpu" and torch.is_grad_enabled():
            raise ValueError(
                "execution.attention=flex has no gradients on a CPU; use torch.no_grad() or attention=sdpa"
            )
        if backend == "flex" and not past:
            segment = tokens.new_zeros(B, T) if segment is None else segment
            context.backend, context.block_mask = backend, flex_mask(segment)
        elif backend in ("varlen", "flash_attn") and not past and context.token_mask is None:
            context.backend, context.boundaries = backend, row_boundaries(B, T, cu_seqlens, tokens.device)
        elif backend == "blockwise" and not past:
            context.backend = backend
            if segment is not None:
                context.mask = visible_keys(segment, T)
                context.hidden = hidden_keys(context.mask)
        elif segment is not None:
            context.mask = visible_keys(segment, T)
        elif past and T > 1:
            context.mask = visible_keys(tokens.new_zeros(1, past + T), T)

    @torch.no_grad()
    def generate(self, tokens: Tensor, max_new_tokens: int = 64, **options: Any) -> Tensor:
        """Continuation of tokens (B, T) -> (B, T + n), greedy by default; see generate.generate."""
        return generate(self, tokens, max_new_tokens, **options)

    def moe_layers(self) -> list[MoE]:
        return [m for m in self.modules() if isinstance(m, MoE)]

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes model.safetensors and config.json."""
        from .pretrained import save_weights

        save_weights(Path(directory), self.config, self.state_dict())


_REPORTED = ("halt_probs", "num_iterations", "ponder_cost", "residuals")


def _no_aux(x: Tensor) -> Tensor:
    return torch.zeros(len(AUX_TERMS), device=x.device)


def _noise(like: Tensor, seed: int) -> Tensor:
    """(B, T, D) standard normal, the same for a seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator).to(like)


def _positions(real: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(B, S) positions: padding is not counted (Hugging Face's rule), documents start at 0."""
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    if cu_seqlens is None:
        return positions
    place = torch.arange(real.shape[1], device=real.device).expand_as(real).contiguous()
    document = torch.searchsorted(cu_seqlens, place, right=True) - 1
    return positions - positions.gather(1, cu_seqlens.long().gather(1, document))


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Normal weights of the config's standard deviation, each from a stream named after the parameter."""
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}"
            if isinstance(module, Experts):
                for row, expert in zip(parameter, module.expert_ids, strict=True):
                    _fill(row, model, f"{seed}:{full_name}:{expert}")
            elif isinstance(module, Linear) and name == "bias":
                parameter.fill_(module.initial_bias)
            elif (
                isinstance(module, Linear)
                and module.zero
                or isinstance(module, IterationEmbedding | CausalMixing)
            ):
                parameter.zero_()
            elif isinstance(module, RMSNorm):
                parameter.fill_(1.0)
            else:
                _fill(parameter, model, f"{seed}:{full_name}")


def _fill(parameter: Tensor, model: Any, stream: str) -> None:
    seed = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(parameter.shape, generator=generator) * model.config.initializer_range
    parameter.copy_(values)
