"""ZeroModel as a causal language model of Hugging Face: loss, generation, saving.

Shapes: B batch, T new tokens, S cached and new tokens, D hidden, V vocabulary, U loops.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from model.config.execution import ExecutionConfig
from model.hf.remote.backbone import Backbone
from model.hf.remote.configuration_zeromodel import ZeroModelConfig
from model.initialization import initialize
from model.moe import MoE

# transformers' names of attention -> ExecutionConfig's; all others, `eager` too, run as the latter's default.
ATTENTION = {"flash_attention_2": "flash_attn", "flex_attention": "flex"}


@dataclass
class ZeroModelOutput(CausalLMOutputWithPast):
    """Also says how many loop steps each token took."""

    num_iterations: Tensor | None = None  # (U, B, T) int64; None without recurrence


class ZeroModelForCausalLM(PreTrainedModel, GenerationMixin):
    """The network, `network`, behind the interface of transformers.

    A looped model takes `num_steps` (loop steps; default: the config's) and, at inference, `exit_threshold`
    and `exit_measure`, in forward and in generate. Keep them the same while a cache is in use.
    """

    config_class = ZeroModelConfig
    base_model_prefix = "network"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    # What the layers share in a pass lies on one device.
    _no_split_modules = ["Backbone"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]

    def __init__(self, config: ZeroModelConfig) -> None:
        super().__init__(config)
        execution = ExecutionConfig(attention=ATTENTION.get(str(config._attn_implementation), "auto"))
        self.network = Backbone(config, execution)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_steps: int | None = None,
        exit_threshold: float | None = None,
        exit_measure: str | None = None,
        num_latents: int | None = None,
        num_iterations: int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ZeroModelOutput | tuple[Any, ...]:
        """Logits, and with labels their loss.

        The loss is Hugging Face's: the mean cross-entropy of the next tokens, or its sum divided by
        `num_items_in_batch`. The terms for balance, halting and multi-token prediction belong to this
        project's own training and are not in it.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, S), 1 where a token is real; S includes cached tokens.
            position_ids: (B, T); default: counted without padding.
            past_key_values: a DynamicCache, extended in place.
            inputs_embeds: (B, T, D) instead of input_ids.
            labels: (B, T), input_ids or -100 where nothing is to be learned; shifted here.
            use_cache: default: the config's, and never in training.
            logits_to_keep: form logits only for this many last positions, or for these positions; 0: all.
            num_steps: loop steps; default: the config's.
            exit_threshold: a token stops looping at this cosine of successive states (default 0.95), or at
                this divergence of successive predictions in nats (5e-4); replaces the config's halting.
            exit_measure: cosine (default) or kl, which needs placement=block.
            num_latents: input_ids end in as many placeholders and <eot>, as generate makes them; think.
            num_iterations: of thinking; default: the config's.
            output_hidden_states: also return the output of every run of a layer, in order, and the normed
                state that the head reads.

        Raises:
            ValueError: one line for arguments that do not fit together.
        """
        if num_latents and labels is not None:
            raise ValueError(
                f"num_latents={num_latents} gives the state at <eot> alone; leave out labels, or num_latents"
            )
        out = self.network(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            num_steps=num_steps,
            exit_threshold=exit_threshold,
            exit_measure=exit_measure,
            num_latents=num_latents,
            num_iterations=num_iterations,
            output_hidden_states=output_hidden_states,
            output_attentions=kwargs.pop("output_attentions", None),
        )
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.network.lm_head(out.last_hidden_state[:, rows])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        result = ZeroModelOutput(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            num_iterations=out.num_iterations,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return result if as_dict else result.to_tuple()

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers' generate, which documents the arguments; further ones are forward's.

        A model with latent thoughts thinks after prompts that all end in <bot>, and the answer follows
        <eot>: [bos] Q <bot> -> [bos] Q <bot> <eot> A. `num_latents` is the number of thoughts (default: the
        config's, 0: none), `num_iterations` that of their iterations.

        Raises:
            ValueError: one line for arguments that do not fit together.
        """
        tokens = kwargs.get("input_ids") if inputs is None else inputs
        count = kwargs.pop("num_latents", None)
        if count is None:
            count = self._default_latents(tokens)
        generate: Any = super().generate  # type: ignore[misc]  # its self is a protocol
        if not count:
            return generate(inputs, *args, **kwargs)
        if self.config.eot_token_id is None or tokens is None:
            raise ValueError(
                f"num_latents={count} needs input_ids and the token <eot>; set model.config.eot_token_id to "
                "its id, or give num_latents=0"
            )
        kwargs.pop("input_ids", None)
        B, T = tokens.shape
        room = tokens.new_zeros(B, count)  # read as thoughts, whatever the ids
        prompt = torch.cat((tokens, room, tokens.new_full((B, 1), self.config.eot_token_id)), 1)
        mask = kwargs.pop("attention_mask", None)
        mask = torch.ones_like(tokens) if mask is None else mask
        kwargs["attention_mask"] = nn.functional.pad(mask, (0, count + 1), value=1)
        for limit in ("max_length", "min_length"):
            if kwargs.get(limit) is not None:
                kwargs[limit] += count
        out = generate(prompt, *args, num_latents=count, **kwargs)
        if isinstance(out, Tensor):
            return torch.cat((out[:, :T], out[:, T + count :]), 1)
        out.sequences = torch.cat((out.sequences[:, :T], out.sequences[:, T + count :]), 1)
        return out

    def _default_latents(self, tokens: Tensor | None) -> int:
        """The config's thoughts if every prompt ends in <bot>."""
        if tokens is None or self.config.bot_token_id is None:
            return 0
        ends = tokens.shape[1] > 0 and bool((tokens[:, -1] == self.config.bot_token_id).all())
        return self.network.config.latent_cot.num_latents if ends else 0

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Gives initial values to what no file gave, as ZeroModel does when it is built."""
        initialize(self.network, 0, lambda parameter: getattr(parameter, "_is_hf_initialized", False))
        for module in self.network.modules():
            if isinstance(module, MoE):
                module.load.zero_()  # no file has it

    def get_input_embeddings(self) -> nn.Module:
        return self.network.model.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.network.model.embed_tokens = value
        if self._tied:
            self.network.lm_head.tied = (value,)

    def get_output_embeddings(self) -> nn.Module:
        """An nn.Linear around the head's matrix, which may be the embedding's."""
        weight = self.network.model.embed_tokens.weight if self._tied else self.network.lm_head.weight
        V, D = weight.shape
        linear = nn.Linear(D, V, bias=False, device="meta")
        linear.weight = weight
        return linear

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        if not self._tied:
            self.network.lm_head.weight = new_embeddings.weight

    @property
    def _tied(self) -> bool:
        return self.network.config.tie_word_embeddings

    @property
    def gradient_checkpointing(self) -> bool:
        return self.network.model.execution.checkpointing != "none"

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        """Layer by layer, keeping the routers' choices."""
        self.network.model.execution = ExecutionConfig(
            attention=self.network.execution.attention, checkpointing="block" if enable else "none"
        )
