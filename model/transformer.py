"""The network: tokens -> hidden states -> logits or loss.

Shapes: B batch, T new tokens, S cached and new tokens, D hidden, V vocabulary.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.backends.attention import AttentionContext, flex_mask, row_boundaries, segments, visible_keys
from model.backends.blockwise import hidden_keys
from model.cache import LatentCache, full_mask
from model.config.execution import ExecutionConfig, attention_backend
from model.config.model import ModelConfig
from model.decoder import AUX_TERMS
from model.export_files import save_weights
from model.generate import generate
from model.initialization import initialize
from model.interface import ModelOutput
from model.latent_cot.modules import LatentThoughts
from model.layer_stack import Transformer, TransformerOutput, no_aux
from model.layers import rotations
from model.lm_head import LMHead
from model.loop_trace import LATENT_TERMS
from model.losses import IGNORE_INDEX, plain_loss_terms, total_loss
from model.moe import MoE
from model.mtp import shifted
from model.recurrence import stacked_traces


class ZeroModel(nn.Module):
    """The language model.

    Args:
        config: sizes and switches.
        moe_class: the mixture-of-experts layer; pretrain passes its expert-parallel one.
        seed: the initial weights are a function of (seed, parameter name, global expert number), so that
            they are the same however the model is spread over ranks.
        execution: how to compute; changes no result.
    """

    training_step = 0  # the optimizer step, from 0, as the trainer tells; for subclasses with a curriculum

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
        self.lm_head = LMHead(config, self.model.embed_tokens)
        if config.latent_cot.num_latents:
            self.latent_thoughts = LatentThoughts(config)
        if not self.model.embed_tokens.weight.is_meta:  # on the meta device there are shapes only
            initialize(self, seed)

    def forward(
        self,
        tokens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        targets: Tensor | None = None,
        num_steps: int | None = None,
        cache: LatentCache | None = None,
        logits_to_keep: int = 0,
        noise_seed: int | None = None,
        inputs_embeds: Tensor | None = None,
        states: list[Tensor] | None = None,
    ) -> ModelOutput:
        """Runs the model.

        Args:
            tokens: (B, T) int64; None: inputs_embeds stand for them.
            attention_mask: (B, S), 1 or True where a token is real; S counts cached tokens too. Beside
                cu_seqlens padding must be a segment of its own, as the loader gives it.
            position_ids: (B, T); default: counted from the start of each document, padding left out.
            cu_seqlens: (B, n) int32, starts of the documents packed into each row, 0 first, padded with T.
            targets: (B, T) int64, the token to predict at each place or losses.IGNORE_INDEX.
            num_steps: loop steps; default: the config's.
            cache: latents of earlier tokens; extended in place.
            logits_to_keep: form the logits of the last so many places only; 0: of all.
            noise_seed: start block loops from noise, to see whether they forget where they started.
            inputs_embeds: (B, T, D) in place of the tokens' embeddings.
            states: gets the output (B, T, D) of every run of a decoder layer, in their order.

        Raises:
            ValueError: the row is longer than max_position_embeddings, or the arguments do not fit together.
        """
        given = (tokens, attention_mask, position_ids, cu_seqlens, num_steps, cache, noise_seed)
        out, context = self.read(*given, inputs_embeds, states, statistics=targets is not None)
        loops = stacked_traces(out.traces)
        report = {} if loops is None else {name: getattr(loops, name) for name in _REPORTED}
        if targets is None:
            logits = self.lm_head(out.hidden[:, -logits_to_keep:])
            return ModelOutput(logits=logits, hidden=out.hidden, **report)
        sums = {"cross_entropy": self._cross_entropy(out, targets)}
        aux = out.aux
        if self.config.num_nextn_predict_layers:
            if tokens is None:
                raise ValueError("multi-token prediction reads tokens and cannot be trained on inputs_embeds")
            assert context is not None
            sums["mtp"], mtp_aux = self._predict_further(out.hidden, tokens, targets, context)
            aux = aux + mtp_aux
        sums |= dict(zip(AUX_TERMS, aux.unbind(), strict=True))
        if loops is not None:
            sums |= dict(zip(LATENT_TERMS, loops.terms.mean(0).unbind(), strict=True))
        sums = {term.name: sums[term.name] for term in plain_loss_terms(self.config)}
        counts = {"targets": int((targets != IGNORE_INDEX).sum()), "rows": len(targets)}
        return ModelOutput(loss=total_loss(self.config, sums, counts), loss_sums=sums, **report)

    def read(
        self,
        tokens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_steps: int | None = None,
        cache: LatentCache | None = None,
        noise_seed: int | None = None,
        inputs_embeds: Tensor | None = None,
        states: list[Tensor] | None = None,
        statistics: bool = False,
    ) -> tuple[TransformerOutput, AttentionContext | None]:
        """The part of forward below the head: final hidden states, and what the layers shared.

        Args:
            statistics: whether experts report balance and load, and all ranks take all steps; see forward for
                the others.
        """
        steps = self.config.recurrence.num_steps if num_steps is None else num_steps
        if steps < 1:
            raise ValueError(f"num_steps={steps} must be at least 1")
        if noise_seed is not None and self.config.recurrence.placement != "block":
            raise ValueError(
                f"noise_seed={noise_seed} is for placement=block, but the model has "
                f"placement={self.config.recurrence.placement}; leave it out"
            )
        if (tokens is None) == (inputs_embeds is None):
            raise ValueError("give either tokens or inputs_embeds, the other one None")
        if tokens is None:
            assert inputs_embeds is not None
            tokens = inputs_embeds.new_zeros(inputs_embeds.shape[:2], dtype=torch.int64)  # for their shape
        self._check_length(tokens, cu_seqlens, cache)
        places = self.config.places_per_token
        if self.config.num_memory_tokens:
            if inputs_embeds is not None or states is not None:
                raise ValueError("a recurrent memory reads tokens only; leave inputs_embeds and states out")
            out = self._read_segments(tokens, attention_mask, cu_seqlens, cache, statistics)
            context = None
        else:
            # Backward may run layers again: they must find the cache as it was before this pass.
            before = cache.branch() if cache is not None and cache.differentiable else cache
            context = self._context(tokens, attention_mask, position_ids, cu_seqlens, before)
            context.statistics, context.num_steps, context.states = statistics, steps, states
            predict = self._predict if self._compares_predictions() else None
            embedded = self.model.embed(tokens, context, inputs_embeds)
            out = self.model(embedded, context, predict, noise_seed)
            out = out._replace(hidden=out.hidden[:, places - 1 :: places])  # of a token's places the last
            if cache is not None and before is not None and before is not cache:
                cache.adopt(before)
        if cache is not None:
            cache.advance(tokens.shape[1] * places)
        return out, context

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
        return TransformerOutput(hidden, no_aux(hidden), [], [])

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
        loss, total = hidden.new_zeros((), dtype=torch.float32), no_aux(hidden)
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
        places = self.config.places_per_token
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
        context = AttentionContext(None, "sdpa", None, token_mask, cache=cache, segment=segment)
        if self.config.learned_positions:
            context.positions = position_ids
        else:
            context.rotation = rotations(position_ids, self.config)
        self._choose_backend(context, tokens, segment, cu_seqlens)
        return context

    def _check_length(self, tokens: Tensor, cu_seqlens: Tensor | None, cache: LatentCache | None) -> None:
        past = 0 if cache is None else cache.length // self.config.places_per_token
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

        flex takes whole rows, varlen and flash_attn whole rows whose padding, if any, is its own segment; all
        else goes through sdpa.
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
        elif (
            backend in ("varlen", "flash_attn")
            and not past
            and (context.token_mask is None or cu_seqlens is not None)
        ):
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

    @property
    def starts_stage(self) -> bool:
        """Whether the loss of `training_step` is another one than that of the step before."""
        return False

    def attention_layer(self, layer: int) -> Any:
        """The attention of decoder layer number `layer`."""
        decoder: Any = self.model.layers[layer]
        return decoder.self_attn

    def moe_layers(self) -> list[MoE]:
        return [m for m in self.modules() if isinstance(m, MoE)]

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes model.safetensors and config.json."""
        save_weights(Path(directory), self.config, self.state_dict())


_REPORTED = ("halt_probs", "num_iterations", "ponder_cost", "residuals")


def _positions(real: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(B, S) positions: padding is not counted (Hugging Face's rule), documents start at 0."""
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    if cu_seqlens is None:
        return positions
    place = torch.arange(real.shape[1], device=real.device).expand_as(real).contiguous()
    document = torch.searchsorted(cu_seqlens, place, right=True) - 1
    return positions - positions.gather(1, cu_seqlens.long().gather(1, document))
