"""The network with the arguments of transformers: tokens and its caches in, final hidden states out.

Shapes: B batch, T new tokens, S cached and new tokens, D hidden, U loops.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from model.cache import LatentCache
from model.config.execution import ExecutionConfig
from model.config.recurrence import HaltingConfig
from model.generate import without_padding
from model.hf.remote.configuration_zeromodel import ZeroModelConfig
from model.hf.remote.latent_layer import latent_layer
from model.hf.remote.section import network_config
from model.latent_cot.thoughts import think
from model.transformer import ZeroModel


@dataclass
class BackboneOutput(BaseModelOutputWithPast):
    """Also says how many loop steps each token took."""

    num_iterations: Tensor | None = None  # (U, B, T) int64; None without recurrence


class Backbone(ZeroModel):
    """ZeroModel whose forward is that of a base model of transformers."""

    def __init__(self, config: ZeroModelConfig, execution: ExecutionConfig) -> None:
        super().__init__(network_config(config), execution=execution)
        self.defaults = config  # of arguments that are None

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        num_steps: int | None = None,
        exit_threshold: float | None = None,
        exit_measure: str | None = None,
        num_latents: int | None = None,
        num_iterations: int | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput:
        """Final hidden states, normed; with num_latents only the one at <eot>.

        For the arguments see ZeroModelForCausalLM.forward; others are left alone.
        """
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions=True: ZeroModel's attention keeps no weights; leave it out")
        if past_key_values is None and self._keeps_cache(use_cache):
            past_key_values = DynamicCache()
        layer = None
        if past_key_values is not None:
            layer = latent_layer(past_key_values, self.config.positions_per_token, torch.is_grad_enabled())
        if num_steps not in (None, 1) and self.config.recurrence.placement == "none":
            raise ValueError(f"num_steps={num_steps}: the model has no loop; leave it out")
        loop: dict[str, Any] = {"num_steps": num_steps, "halting": self._exits(exit_threshold, exit_measure)}
        mask = without_padding(attention_mask)
        if num_latents and not (layer is not None and layer.latent.length):
            if layer is None or input_ids is None:
                raise ValueError(
                    f"num_latents={num_latents}: thoughts come from tokens and live in the cache; give "
                    "input_ids and use_cache=True"
                )
            layer.latent = self._think(input_ids, mask, num_latents, num_iterations, loop)
            input_ids, position_ids = input_ids[:, -1:], None
        if output_hidden_states is None:
            output_hidden_states = self.defaults.output_hidden_states
        states = list[Tensor]() if output_hidden_states else None
        out, _ = self.read(
            input_ids,
            mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            cache=None if layer is None else layer.latent,
            states=states,
            **loop,
        )
        steps = [trace.num_iterations for trace in out.traces]
        return BackboneOutput(
            last_hidden_state=out.hidden,
            past_key_values=past_key_values,
            hidden_states=None if states is None else (*states, out.hidden),
            num_iterations=torch.stack(steps) if steps else None,
        )

    def _keeps_cache(self, asked: bool | None) -> bool:
        return self.defaults.use_cache and not self.training if asked is None else asked

    def _exits(self, threshold: float | None, measure: str | None) -> HaltingConfig | None:
        """The halting that these arguments ask for; None: the config's."""
        if threshold is None and measure is None:
            return None
        if self.config.recurrence.placement == "none":
            raise ValueError(
                f"exit_threshold={threshold}, exit_measure={measure}: the model has no loop; leave them out"
            )
        lowest, highest = (0.0, math.inf) if measure == "kl" else (-1.0, 1.0)
        if threshold is not None and not lowest <= threshold <= highest:
            raise ValueError(
                f"exit_threshold={threshold} must lie in {lowest:g}..{highest:g} for exit_measure="
                f"{measure or 'cosine'}"
            )
        least = self.config.recurrence.virtual_layers or 1  # every token fills as many steps
        return HaltingConfig(
            kind="threshold", measure=measure or "cosine", threshold=threshold, min_steps=least
        )

    def _think(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        num_latents: int,
        num_iterations: int | None,
        loop: dict[str, Any],
    ) -> LatentCache:
        """The cache of a question (B, T) and its thoughts; tokens (B, T + num_latents + 1)."""
        last = -num_latents - 1
        thoughts = think(
            self,
            tokens[:, :last],
            None if mask is None else mask[:, :last],
            num_latents=num_latents,
            num_iterations=num_iterations,
            **loop,
        )
        return thoughts.cache
