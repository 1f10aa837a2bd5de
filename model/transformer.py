"""The network: tokens -> hidden states -> logits or loss.

Shapes: B batch, T new tokens, S cached and new tokens, D hidden, V vocabulary.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.schema import Count, as_type
from model.backends.flash import Documents
from model.cache import LatentCache, full_mask
from model.config.execution import ExecutionConfig
from model.config.model import ModelConfig
from model.config.recurrence import HaltingConfig, RecurrenceConfig, with_halting
from model.context import AttentionContext, build_context, segments
from model.decoder import AUX_TERMS
from model.export_files import save_weights
from model.generate import generate
from model.initialization import initialize
from model.interface import ModelOutput
from model.latent_cot.modules import LatentThoughts
from model.layer_stack import Transformer, TransformerOutput, zero_aux
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
        moe_class: the mixture-of-experts layer; pretrain/ passes its expert-parallel one.
        seed: the initial weights are a function of (seed, parameter name, global expert number), so they do
            not depend on how the model is spread over ranks. None: they are not set, for a caller that does.
        execution: how to compute; changes no result.
    """

    training_step = 0  # the optimizer step, from 0, set by the trainer; for subclasses with a curriculum

    def __init__(
        self,
        config: ModelConfig,
        moe_class: type[MoE] = MoE,
        seed: int | None = 0,
        execution: ExecutionConfig | None = None,
    ) -> None:
        super().__init__()
        self.config, self.execution = config, execution or ExecutionConfig()
        self.model = Transformer(config, moe_class, self.execution)
        self.lm_head = LMHead(config, self.model.embed_tokens)
        if config.latent_cot.num_latents:
            self.latent_thoughts = LatentThoughts(config)
        if seed is not None and not self.model.embed_tokens.weight.is_meta:  # meta: there are shapes only
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
        halting: HaltingConfig | None = None,
        depths: Tensor | None = None,
        documents: Documents | None = None,
    ) -> ModelOutput:
        """Runs the model.

        Args:
            tokens: (B, T) int64; None: inputs_embeds replace them.
            attention_mask: (B, S), 1 or True where a token is real; S includes cached tokens. With
                cu_seqlens, padding must be a separate segment, as the loader makes it.
            position_ids: (B, T); default: counted from the start of each document, without padding.
            cu_seqlens: (B, n) int32, starts of the documents packed into each row, 0 first, padded with T.
            targets: (B, T) int64, the token to predict at each position, or losses.IGNORE_INDEX.
            num_steps: loop steps; default: the config's.
            cache: latents of earlier tokens; extended in place.
            logits_to_keep: form logits only for this many last positions; 0: for all.
            noise_seed: start block loops from noise, to test whether they forget their initial state.
            inputs_embeds: (B, T, D) instead of the tokens' embeddings.
            states: collects the output (B, T, D) of every run of a decoder layer, in order.
            halting: when tokens stop iterating, at inference, in place of the config's. Kinds that learn
                need a model that was trained with them. A cache is used with one halting throughout.
            depths: (B,) int64, the loop steps that each row takes, within 1..num_steps (not checked: the
                device would have to be waited for). The loop still runs num_steps passes over all rows.
            documents: what the host knows of cu_seqlens, which flash kernels need; None: they allow for empty
                documents and for one that fills its row.

        Raises:
            ValueError: the row is longer than max_position_embeddings, or the arguments do not fit together.
        """
        out, context = self.read(
            tokens,
            attention_mask,
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            documents=documents,
            num_steps=num_steps,
            cache=cache,
            noise_seed=noise_seed,
            inputs_embeds=inputs_embeds,
            states=states,
            halting=halting,
            depths=depths,
            statistics=targets is not None,
        )
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
        counts: dict[str, int | Tensor] = {"targets": (targets != IGNORE_INDEX).sum(), "rows": len(targets)}
        return ModelOutput(loss=total_loss(self.config, sums, counts), loss_sums=sums, **report)

    def read(
        self,
        tokens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        documents: Documents | None = None,
        num_steps: int | None = None,
        cache: LatentCache | None = None,
        noise_seed: int | None = None,
        inputs_embeds: Tensor | None = None,
        states: list[Tensor] | None = None,
        halting: HaltingConfig | None = None,
        depths: Tensor | None = None,
        statistics: bool = False,
    ) -> tuple[TransformerOutput, AttentionContext | None]:
        """The part of forward below the head: final hidden states, and what the layers shared.

        Args:
            statistics: whether experts report balance and load, and all ranks take all steps. For the other
                arguments see forward.
        """
        steps = self.config.recurrence.num_steps if num_steps is None else num_steps
        as_type(Count, steps, "num_steps")
        recurrence = self._recurrence(halting, steps, statistics)
        if depths is not None:
            self._check_depths(recurrence, depths, cache)
        if noise_seed is not None and self.config.recurrence.placement != "block":
            raise ValueError(
                f"noise_seed={noise_seed} is for placement=block, but the model has "
                f"placement={self.config.recurrence.placement}; leave it out"
            )
        if (tokens is None) == (inputs_embeds is None):
            raise ValueError("give either tokens or inputs_embeds and leave the other None")
        if tokens is None:
            assert inputs_embeds is not None
            tokens = inputs_embeds.new_zeros(inputs_embeds.shape[:2], dtype=torch.int64)  # for their shape
        self._check_length(tokens, cu_seqlens, cache)
        repeats = self.config.positions_per_token
        if self.config.num_memory_tokens:
            if inputs_embeds is not None or states is not None:
                raise ValueError("a recurrent memory only reads tokens; leave out inputs_embeds and states")
            out = self._read_segments(tokens, attention_mask, cu_seqlens, cache, statistics)
            context = None
        else:
            # Backward may run layers again; they must find the cache as it was before this pass.
            before = cache.branch() if cache is not None and cache.differentiable else cache
            context = self.attention_context(
                tokens,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cu_seqlens=cu_seqlens,
                documents=documents,
                cache=before,
            )
            context.statistics, context.num_steps, context.states = statistics, steps, states
            context.recurrence, context.depths = recurrence, depths
            context.backprop_steps = recurrence.backprop_at(self.training_step)
            predict = self._predict if self._compares_predictions(recurrence.halting) else None
            embedded = self.model.embed(tokens, context, inputs_embeds)
            out = self.model(embedded, context, predict, noise_seed)
            out = out._replace(hidden=out.hidden[:, repeats - 1 :: repeats])  # a token's last position
            if cache is not None and before is not None and before is not cache:
                cache.adopt(before)
        if cache is not None:
            cache.advance(tokens.shape[1] * repeats)
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
            return self.model(x, self.attention_context(exists.long(), attention_mask=exists)).hidden

        hidden, state = memory(tokens, segment, self.model.embed_tokens, run, state, all_segments)
        if cache is not None:
            cache.memory = state
        return TransformerOutput(hidden, zero_aux(hidden), [], [])

    def _cross_entropy(self, out: TransformerOutput, targets: Tensor) -> Tensor:
        """Summed over the targets; in training with an expected loss, sum_n p_n CE_n."""
        if not out.readouts:
            return self.lm_head(out.hidden, targets)
        return torch.stack([self.lm_head(h, targets, p) for h, p in out.readouts]).sum()

    def _predict(self, states: Tensor) -> Tensor:
        """Early readout of states (B, T, D): head and final norm alone.

        Through the layers after the loop, a full pass would see other tokens' unfinished states where
        decoding sees their last ones: the two would halt differently.
        """
        return self.lm_head(self.model.norm(states))

    def _recurrence(self, halting: HaltingConfig | None, num_steps: int, targets: bool) -> RecurrenceConfig:
        """The loop's config, with the halting asked for instead of its own."""
        if halting is None:
            return self.config.recurrence
        if targets or self.training:
            raise ValueError(
                f"halting.kind={halting.kind} replaces the model's at inference only; leave out targets and "
                "call eval(), or set model.recurrence.halting"
            )
        return with_halting(self.config.recurrence, halting, num_steps)

    def _check_depths(self, r: RecurrenceConfig, depths: Tensor, cache: LatentCache | None) -> None:
        exits = r.halting.learned or (r.halting.kind == "threshold" and not self.training)
        for refused, reason in (
            (r.placement == "none", "placement=none has no loop"),
            (exits, f"halting.kind={r.halting.kind} decides when a token stops"),
            (r.cache == "parallel", "with cache=parallel all rows attend to as many steps"),
            (cache is not None, "a cache holds equally many steps of every row"),
        ):
            if refused:
                raise ValueError(f"depths of {len(depths)} rows: {reason}; leave them out")

    def _compares_predictions(self, halting: HaltingConfig) -> bool:
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
        loss, total = hidden.new_zeros((), dtype=torch.float32), zero_aux(hidden)
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
        """Draft logits from the first module of multi-token prediction.

        Args:
            hidden: (B, T, D), what forward returned for the last T tokens.
            tokens: (B, T), the tokens that followed those.
            attention_mask: as in that call of forward.
            cache: the module's own, extended in place.

        Returns:
            (B, T, V), predictions for the tokens after `tokens`.
        """
        self._check_length(tokens, None, cache)
        context = self.attention_context(tokens, attention_mask=attention_mask, cache=cache)
        further, _ = self.model.predict_further(0, hidden, tokens, context)
        cache.advance(tokens.shape[1])
        return self.lm_head(further)

    def attention_context(self, tokens: Tensor, **given: Any) -> AttentionContext:
        """What the layers share in a pass over tokens (B, T); see context.build_context."""
        dtype = self.model.embed_tokens.weight.dtype
        return build_context(self.config, self.execution, dtype, tokens, **given)

    def _check_length(self, tokens: Tensor, cu_seqlens: Tensor | None, cache: LatentCache | None) -> None:
        past = 0 if cache is None else cache.length // self.config.positions_per_token
        length = past + tokens.shape[1]
        if self.config.max_position_embeddings < length and (cache is None or cache.limited):
            raise ValueError(
                f"{length} tokens exceed max_position_embeddings={self.config.max_position_embeddings}; "
                "shorten the input or train with a larger value"
            )
        if cu_seqlens is not None and past:
            raise ValueError("cu_seqlens describes whole rows and cannot be used with a filled cache")

    @torch.no_grad()
    def generate(self, tokens: Tensor, max_new_tokens: int = 64, **options: Any) -> Tensor:
        """Continuation of tokens (B, T) -> (B, T + n), greedy by default; see generate.generate."""
        return generate(self, tokens, max_new_tokens, **options)

    @property
    def starts_stage(self) -> bool:
        """Whether the loss at `training_step` is another one than the previous step's: here, whether the
        depth changes for good, by a step of the loop or of what is back-propagated."""
        return self.config.recurrence.changes_at(self.training_step)

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
