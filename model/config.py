"""ModelConfig: every size and switch of the network, checked once, here.

Names are those of Hugging Face's DeepseekV3Config wherever that has one.
"""

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RecurrenceConfig:
    """The Latent Reasoning Unit: which layers are looped, how often, and how the state is carried."""

    placement: str = "none"  # none | block: prelude layers -> core layers x num_steps -> coda layers
    num_prelude_layers: int = 0  # layers before the loop, run once
    num_coda_layers: int = 0  # layers after the loop, run once; what is left in between is the core
    num_steps: int = 1  # loop steps R at inference; in training the fixed or the mean depth
    depth_sampling: str = "fixed"  # fixed | poisson (log-normal Poisson, one draw per optimizer step)
    max_steps: int = 32  # upper limit of a sampled depth
    injection: str = "add"  # add | concat: how the prelude's output re-enters at every step
    update: str = "gated"  # gated (GRU-style convex update) | simple (the core's output is the state)


@dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek-V3-style decoder with an optional Latent Reasoning Unit.

    Raises:
        ValueError: a size or switch is impossible; the line names the value, the limit and the mend.
    """

    preset: str | None = None  # nano: start from a named set of sizes, other keys override it
    vocab_size: int = 8192
    hidden_size: int = 256
    num_hidden_layers: int = 4  # distinct layers; a looped layer counts once
    max_position_embeddings: int = 2048  # longest sequence, in tokens
    initializer_range: float = 0.02  # standard deviation of the initial weights
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    # Multi-head latent attention
    num_attention_heads: int = 4
    q_lora_rank: int | None = None  # None: queries are projected directly
    kv_lora_rank: int = 64  # width of the cached latent
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    # Feed-forward layers
    intermediate_size: int = 688  # width of a dense feed-forward layer
    first_k_dense_replace: int = 1  # this many leading layers are dense, the others are MoE
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    n_shared_experts: int = 1
    moe_intermediate_size: int = 192  # width of one expert
    n_group: int = 1  # experts are ranked in groups, of which topk_group are kept
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    router_bias_update_rate: float = 0.001  # step of the loss-free balancing bias, once per optimizer step
    balance_loss_weight: float = 1e-4  # sequence-wise balance loss
    recurrence: RecurrenceConfig = field(default_factory=RecurrenceConfig)

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"model.qk_rope_head_dim={self.qk_rope_head_dim} must be even: it rotates in pairs"
            )
        if self.first_k_dense_replace < self.num_hidden_layers:
            self._check_experts()
        self._check_recurrence()

    def _check_experts(self) -> None:
        if self.n_routed_experts % self.n_group:
            raise ValueError(
                f"model.n_routed_experts={self.n_routed_experts} is not divisible by "
                f"n_group={self.n_group}; choose a divisor"
            )
        if not 1 <= self.topk_group <= self.n_group:
            raise ValueError(f"model.topk_group={self.topk_group} must lie in 1..n_group={self.n_group}")
        reachable = self.n_routed_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"model.num_experts_per_tok={self.num_experts_per_tok} exceeds the {reachable} "
                "experts of the kept groups; lower it or raise topk_group"
            )
        if self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
            raise ValueError(
                f"model.n_group={self.n_group} leaves fewer than 2 experts a group, but groups are "
                "ranked by their best 2; lower n_group"
            )

    def _check_recurrence(self) -> None:
        r = self.recurrence
        for name, allowed in _CHOICES.items():
            if getattr(r, name) not in allowed:
                raise ValueError(
                    f"model.recurrence.{name}={getattr(r, name)!r} is unknown; "
                    f"choose one of {', '.join(allowed)}"
                )
        if not 1 <= r.num_steps <= r.max_steps:
            raise ValueError(
                f"model.recurrence.num_steps={r.num_steps} must lie in 1..max_steps={r.max_steps}"
            )
        if r.placement == "block" and self.num_core_layers < 1:
            raise ValueError(
                f"model.num_hidden_layers={self.num_hidden_layers} leaves no core layer between "
                f"{r.num_prelude_layers} prelude and {r.num_coda_layers} coda layers; raise it"
            )

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_core_layers(self) -> int:
        """Layers inside the loop; 0 without recurrence."""
        if self.recurrence.placement == "none":
            return 0
        return self.num_hidden_layers - self.recurrence.num_prelude_layers - self.recurrence.num_coda_layers

    def is_moe_layer(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Builds a config from plain values; keys that `preset` names are its, unless given here."""
        values = dict(values)
        preset = values.get("preset")
        if preset is not None:
            if preset not in PRESETS:
                raise ValueError(
                    f"model.preset={preset!r} is unknown; choose one of {', '.join(sorted(PRESETS))}"
                )
            base = PRESETS[preset]
            recurrence = {**base.get("recurrence", {}), **values.get("recurrence", {})}
            values = {**base, **values, "recurrence": recurrence}
        recurrence = values.pop("recurrence", {})
        _reject_unknown(values, cls, "model")
        _reject_unknown(recurrence, RecurrenceConfig, "model.recurrence")
        return cls(**values, recurrence=RecurrenceConfig(**recurrence))

    # --- counts, from the sizes alone -------------------------------------------------------------

    def _attention_weights(self) -> int:
        d, h = self.hidden_size, self.num_attention_heads
        if self.q_lora_rank is None:
            query = d * h * self.qk_head_dim
        else:
            query = d * self.q_lora_rank + self.q_lora_rank * h * self.qk_head_dim
        latent = d * (self.kv_lora_rank + self.qk_rope_head_dim)
        key_value = self.kv_lora_rank * h * (self.qk_nope_head_dim + self.v_head_dim)
        return query + latent + key_value + h * self.v_head_dim * d

    def _feed_forward_weights(self, layer: int, experts: int) -> int:
        d = self.hidden_size
        if not self.is_moe_layer(layer):
            return 3 * d * self.intermediate_size
        expert = 3 * d * self.moe_intermediate_size
        return (experts + self.n_shared_experts) * expert + d * self.n_routed_experts

    def _recurrence_weights(self) -> int:
        """Matrix weights of the recurrence itself, used once per step."""
        if self.recurrence.placement == "none":
            return 0
        d = self.hidden_size
        return (2 * d * d if self.recurrence.injection == "concat" else 0) + (
            2 * d * d if self.recurrence.update == "gated" else 0
        )

    def num_parameters(self, active: bool = False) -> int:
        """Distinct parameters; `active`: those one token uses (its experts only), loops counted once."""
        d, layers = self.hidden_size, self.num_hidden_layers
        experts = self.num_experts_per_tok if active else self.n_routed_experts
        norms = layers * (2 * d + self.kv_lora_rank + (self.q_lora_rank or 0)) + d
        if self.recurrence.placement != "none":
            norms += 2 * d + (d if self.recurrence.update == "gated" else 0)  # two norms, the gate's bias
        matrices = sum(
            self._attention_weights() + self._feed_forward_weights(i, experts) for i in range(layers)
        )
        return 2 * self.vocab_size * d + norms + matrices + self._recurrence_weights()

    def flops_per_token(self, sequence_length: int, num_steps: int | None = None) -> float:
        """Forward FLOPs of one token, attention over the full sequence (PaLM, appendix B); training is 3x."""
        steps = num_steps or self.recurrence.num_steps
        first_core = self.recurrence.num_prelude_layers
        total = 2.0 * self.vocab_size * self.hidden_size
        for layer in range(self.num_hidden_layers):
            weights = self._attention_weights() + self._feed_forward_weights(layer, self.num_experts_per_tok)
            attention = sequence_length * self.num_attention_heads * (self.qk_head_dim + self.v_head_dim)
            looped = self.num_core_layers and first_core <= layer < first_core + self.num_core_layers
            total += 2.0 * (weights + attention) * (steps if looped else 1)
        return total + 2.0 * self._recurrence_weights() * steps


_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "max_position_embeddings",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_group",
)

_CHOICES = {
    "placement": ("none", "block"),
    "depth_sampling": ("fixed", "poisson"),
    "injection": ("add", "concat"),
    "update": ("gated", "simple"),
}

PRESETS: dict[str, dict[str, Any]] = {
    # A looped model that a laptop trains in minutes: 1 prelude, 1 core x 4, 1 coda layer.
    "nano": {
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "intermediate_size": 384,
        "moe_intermediate_size": 128,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "recurrence": {
            "placement": "block",
            "num_prelude_layers": 1,
            "num_coda_layers": 1,
            "num_steps": 4,
        },
    },
}


def nearest(name: str, known: list[str]) -> str:
    """Says which known name is closest, for errors about misspelt keys."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(sorted(known))}"


def _reject_unknown(values: dict[str, Any], cls: type, where: str) -> None:
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            raise ValueError(f"{where}.{key} is not a key of the model config{nearest(key, known)}")
