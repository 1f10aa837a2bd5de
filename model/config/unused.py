"""Keys that were set but that the chosen form of a model does not read.

Where the line is: what asks for something that the form lacks is refused (ModelConfig), because such a key is
off by default and somebody must have set it. Sizes and weights of a form that is switched off may stay: one
key then switches it on again, and a group's file (pretrain/configs/groups/) can override any base. They are
named here, so that nothing is ignored in silence.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from model.config.model import ModelConfig

_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_EXPERTS = (
    *("first_k_dense_replace", "n_routed_experts", "num_experts_per_tok", "n_shared_experts"),
    *("moe_intermediate_size", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor"),
    *("router_bias_update_rate", "balance_loss_weight", "router_z_loss_weight"),
)


def unused_keys(config: ModelConfig) -> list[str]:
    """One line per reason, with the keys that do nothing; values of defaults and preset do not count."""
    given, defaults = _flat(config), _flat(ModelConfig())
    preset = defaults if config.preset is None else _flat(ModelConfig.from_dict({"preset": config.preset}))
    lines = []
    for reason, names in _unread(config, tuple(given)):
        found = [f"{n}={given[n]}" for n in names if given[n] not in (defaults[n], preset[n])]
        if found:
            lines.append(f"model.{', '.join(found)}: not used with {reason}")
    return lines


def _flat(config: ModelConfig) -> dict[str, Any]:
    """Values by dotted name."""
    flat = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for section, of in (("recurrence", config.recurrence), ("recurrence.halting", config.recurrence.halting)):
        flat |= {f"{section}.{field.name}": getattr(of, field.name) for field in dataclasses.fields(of)}
    return {name: value for name, value in flat.items() if not dataclasses.is_dataclass(value)}


def _unread(config: ModelConfig, names: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Why keys are not read, and which."""
    if not config.use_mla:
        yield "use_mla=false", _LATENT
    if not config.has_experts:
        yield "use_moe=false" if not config.use_moe else "dense layers alone", _EXPERTS
    if all(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)):
        yield "experts in every layer", ("intermediate_size",)
    if not config.num_nextn_predict_layers:
        yield "num_nextn_predict_layers=0", ("mtp_loss_weight",)
    if config.learned_positions:
        yield "position_embedding=learned", ("rope_theta",)
    r, section, halting = config.recurrence, "recurrence.", "recurrence.halting."
    if r.placement == "none":
        loop = (name for name in names if name.startswith(section) and name != f"{section}placement")
        yield "recurrence.placement=none", tuple(loop)
        return
    if r.cache != "ema":
        yield f"cache={r.cache}", (f"{section}ema_decay",)
    if r.halting.kind == "fixed":
        others = (name for name in names if name.startswith(halting) and name != f"{halting}kind")
        yield "halting.kind=fixed", tuple(others)
        return
    if r.halting.granularity != "mixed":
        yield f"halting.granularity={r.halting.granularity}", (f"{halting}mixture",)
    if r.halting.kind != "threshold":
        yield f"halting.kind={r.halting.kind}", (f"{halting}measure",)
    if r.halting.kind != "ponder":
        yield f"halting.kind={r.halting.kind}", (f"{halting}ponder_prior",)
