"""ModelConfig: every size and switch of the network, checked once, here.

Names follow Hugging Face's DeepseekV3Config wherever it has one.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any

from common.schema import Count, CountOrZero, Limits, Weight, check_fields, checked_values, from_plain
from model.config.distillation import DistillationConfig
from model.config.latent_cot import LatentCoTConfig, check_latent_cot
from model.config.presets import PRESETS
from model.config.recurrence import RecurrenceConfig, check_recurrence
from model.config.rope import Llama3RopeConfig, YarnConfig, check_rope_scaling

# Whatever runs over all layers or experts, such as counting parameters, stays quick.
Layers = Annotated[int, Limits(least=1, most=10_000)]
Experts = Annotated[int, Limits(least=1, most=65_536)]
Few = Annotated[int, Limits(least=0, most=1_000)]


@dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek-V3-style decoder with an optional Latent Reasoning Unit.

    Raises:
        ValueError: a size or switch is impossible; the line names the value, the limit and the fix.
    """

    preset: str | None = None  # nano | small | base | large: a named set of sizes, other keys override it
    vocab_size: Count = 8192
    hidden_size: Count = 256
    num_hidden_layers: Layers = 4  # distinct layers; a looped layer counts once
    max_position_embeddings: Count = 2048  # longest sequence, in tokens
    initializer_range: Annotated[float, Limits(above=0, most=10)] = (
        0.02  # standard deviation of the initial weights
    )
    # Kind of the layers' norms and the final one: rms_norm | layer_norm (scale and bias). The norms of
    # queries, keys and Latent Reasoning Units are always RMSNorm.
    norm: str = "rms_norm"
    rms_norm_eps: Annotated[float, Limits(above=0, most=1)] = 1e-6  # for either kind
    rms_norm_affine: bool = True  # learned scales in RMSNorm; false needs use_mla=false
    # rope | learned: a table of max_position_embeddings vectors, added to the embeddings
    position_embedding: str = "rope"
    rope_theta: Annotated[float, Limits(above=1, most=10**15)] = 10000.0
    rope_scaling: YarnConfig | Llama3RopeConfig | None = None
    # Latent attention that was converted from plain attention (model/convert/): the pairs of a head of width
    # rope_pairs_dim by which the rotated pairs turn, e.g. [0, 0, 3]; default: all pairs of qk_rope_head_dim
    rope_pairs: list[CountOrZero] | None = None
    rope_pairs_dim: Count | None = None
    tie_word_embeddings: bool = False  # the head's matrix is the embedding's
    use_bias: bool = False  # in the linear layers of attention and of a feed-forward layer without a gate
    # In the projections to queries, keys and values alone (Qwen2); with use_mla in q_proj and
    # kv_a_proj_with_mqa
    qkv_bias: bool = False
    embedding_mixing: CountOrZero = 0  # width of a causal depthwise convolution over the embeddings; 0: none
    num_attention_heads: Count = 4
    use_mla: bool = True  # multi-head latent attention; false: grouped-query attention
    # Multi-head latent attention
    q_lora_rank: Count | None = None  # None: queries are projected directly
    kv_lora_rank: Count = 64  # width of the cached latent
    qk_nope_head_dim: Count = 32
    qk_rope_head_dim: Count = 16
    v_head_dim: Count = 32
    latent_norm: bool = True  # RMSNorm of the KV latent; false in models converted from plain attention
    # Grouped-query attention
    num_key_value_heads: Count | None = None  # None: as many as query heads
    head_dim: Count | None = None  # None: hidden_size / num_attention_heads
    qk_norm: bool = False  # RMSNorm on every head's query and key, before they are rotated
    # Feed-forward layers
    use_moe: bool = True  # mixture of experts; false: every layer is dense
    # silu: SwiGLU | without a gate, and only with use_moe=false: relu2 (squared ReLU), gelu (by tanh, GPT-2)
    hidden_act: str = "silu"
    intermediate_size: Count = 688  # width of a dense feed-forward layer
    # Mixture of experts
    first_k_dense_replace: CountOrZero = 1  # this many leading layers are dense, the others are MoE
    n_routed_experts: Experts = 8
    num_experts_per_tok: Experts = 2
    n_shared_experts: CountOrZero = 1
    moe_intermediate_size: Count = 192  # width of one expert
    n_group: Experts = 1  # experts are ranked in groups, of which topk_group are kept
    topk_group: Experts = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: Weight = 1.0
    router_bias_update_rate: Annotated[float, Limits(least=0, most=1)] = (
        0.001  # step of the loss-free balancing bias, once per optimizer step
    )
    balance_loss_weight: Weight = 1e-4  # sequence-wise balance loss
    router_z_loss_weight: Weight = 0.0  # keeps the router's logits small (ST-MoE, arXiv 2202.08906, eq. 5)
    # Multi-token prediction
    num_nextn_predict_layers: Few = 0  # modules, each of which predicts one token further ahead
    mtp_loss_weight: Weight = 0.3
    recurrence: RecurrenceConfig = field(default_factory=RecurrenceConfig)
    latent_cot: LatentCoTConfig = field(default_factory=LatentCoTConfig)
    distillation: DistillationConfig | None = None  # learning to think in latents: distill/main.py
    # Baselines of the recurrence
    num_pause_tokens: Few = 0  # learned tokens after every token; the last one predicts (arXiv 2310.02226)
    num_memory_tokens: CountOrZero = (
        0  # Recurrent Memory Transformer, see model/memory.py; needs segment_length
    )
    segment_length: Count | None = None  # tokens of a segment, between which only memory passes

    def __post_init__(self) -> None:
        check_fields(self, "model")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"model.{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(known)}"
                )
        self._check_attention()
        self._check_plain()
        if self.has_experts:
            self._check_experts()
        check_recurrence(self.recurrence, self.num_hidden_layers, self.use_mla)
        self._check_baselines()
        self._check_latent_cot()
        self._check_distillation()

    def _check_attention(self) -> None:
        name = "qk_rope_head_dim" if self.use_mla else "head_dim"
        if not self.learned_positions and (self.rotary_dim % 2 or self.rotary_dim < 2):
            raise ValueError(f"model.{name}={self.rotary_dim} must be even: it rotates in pairs")
        if not self.use_mla and self.plain_head_dim < 1:
            raise ValueError(
                f"model.num_attention_heads={self.num_attention_heads} leaves heads without width at "
                f"hidden_size={self.hidden_size}; lower it or set head_dim"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"model.num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_key_value_heads={self.kv_heads}; choose a divisor"
            )
        check_rope_scaling(self.rope_scaling)
        self._check_rope_pairs()

    def _check_rope_pairs(self) -> None:
        pairs, width = self.rope_pairs, self.rope_pairs_dim
        if (pairs is None) != (width is None):
            raise ValueError(
                f"model.rope_pairs={pairs} and rope_pairs_dim={width} belong together; give both or neither"
            )
        if pairs is None or width is None:
            return
        if not self.use_mla:
            raise ValueError("model.rope_pairs is for latent attention; set use_mla=true or leave it out")
        if width % 2 or len(pairs) != self.qk_rope_head_dim // 2 or not max(pairs, default=0) < width // 2:
            raise ValueError(
                f"model.rope_pairs={pairs} must name {self.qk_rope_head_dim // 2} pairs (qk_rope_head_dim="
                f"{self.qk_rope_head_dim}), each below rope_pairs_dim / 2 with rope_pairs_dim={width} even"
            )

    def _check_plain(self) -> None:
        """Options that only plain attention and plain feed-forward layers have, and what excludes what."""
        both = ("use_mla", "use_moe")
        needs: tuple[tuple[str, bool, tuple[str, ...]], ...] = (
            ("qk_norm", self.qk_norm, ("use_mla",)),
            ("rms_norm_affine=false", not self.rms_norm_affine, ("use_mla",)),
            (f"hidden_act={self.hidden_act}", self.hidden_act != "silu", ("use_moe",)),
            ("hidden_act=gelu", self.hidden_act == "gelu", both),
            ("norm=layer_norm", self.norm == "layer_norm", both),
            ("use_bias=true", self.use_bias, both),
            ("position_embedding=learned", self.learned_positions, both),
        )
        for option, wanted, switches in needs:
            for switch in switches:
                if wanted and getattr(self, switch):
                    raise ValueError(f"model.{option} needs the plain form; set model.{switch}=false too")
        conflicts = (
            ("use_bias=true", self.use_bias, "hidden_act=silu", self.hidden_act == "silu"),
            ("qkv_bias=true", self.qkv_bias, "use_bias=true, which includes it", self.use_bias),
            (
                "qkv_bias=true",
                self.qkv_bias and self.use_mla,
                f"q_lora_rank={self.q_lora_rank}",
                self.q_lora_rank is not None,
            ),
            ("latent_norm=false", not self.latent_norm, "use_mla=false", not self.use_mla),
            ("norm=layer_norm", self.norm == "layer_norm", "rms_norm_affine=false", not self.rms_norm_affine),
            *(
                ("position_embedding=learned", self.learned_positions, f"{name}={value}", value)
                for name in (
                    "rope_scaling",
                    "num_pause_tokens",
                    "num_memory_tokens",
                    "num_nextn_predict_layers",
                )
                if (value := getattr(self, name)) is not None
            ),
        )
        for option, wanted, other, on in conflicts:
            if wanted and on:
                raise ValueError(f"model.{option} does not go with {other}; leave one of them out")

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
                f"model.n_group={self.n_group} leaves fewer than 2 experts per group, but groups are "
                "ranked by their best 2; lower n_group"
            )

    def _check_baselines(self) -> None:
        """A baseline runs alone: mixed with what it is compared to, it would compare nothing."""
        length = self.segment_length
        if (self.num_memory_tokens > 0) != (length is not None) or (length is not None and length < 1):
            raise ValueError(
                f"model.num_memory_tokens={self.num_memory_tokens} and segment_length={self.segment_length} "
                "belong together; give both, at least 1, or neither"
            )
        for name in ("num_pause_tokens", "num_memory_tokens"):
            for other, on in (
                (f"recurrence.placement={self.recurrence.placement}", self.recurrence.placement != "none"),
                (
                    f"num_nextn_predict_layers={self.num_nextn_predict_layers}",
                    self.num_nextn_predict_layers > 0,
                ),
                (f"embedding_mixing={self.embedding_mixing}", self.embedding_mixing > 0),
                ("use_moe=true", name == "num_memory_tokens" and self.has_experts),
                ("num_memory_tokens", name == "num_pause_tokens" and self.num_memory_tokens > 0),
            ):
                if getattr(self, name) and on:
                    raise ValueError(
                        f"model.{name}={getattr(self, name)} is a separate baseline and does not go with "
                        f"{other}; switch one of them off"
                    )

    def _check_latent_cot(self) -> None:
        check_latent_cot(self.latent_cot)
        if not self.latent_cot.num_latents:
            return
        refused = f"model.latent_cot.num_latents={self.latent_cot.num_latents} does not go with"
        if self.num_pause_tokens or self.num_memory_tokens:
            raise ValueError(
                f"{refused} num_pause_tokens={self.num_pause_tokens} and num_memory_tokens="
                f"{self.num_memory_tokens}, which are separate baselines; set both to 0"
            )
        if not self.decodes_exactly(self.recurrence.num_steps):
            raise ValueError(
                f"{refused} recurrence.cache={self.recurrence.cache} and virtual_layers="
                f"{self.recurrence.virtual_layers}: thoughts are read over the question's cache, which only "
                "first, or per_step or parallel with all steps kept, make exact"
            )

    def _check_distillation(self) -> None:
        """A student's pass has no expert statistics, no halting and no multi-token prediction."""
        distillation = self.distillation
        if distillation is not None and self.recurrence.depth_per == "sequence":
            raise ValueError(
                "model.recurrence.depth_per=sequence draws depths for rows of documents, but distillation "
                "takes them apart; choose depth_per=step"
            )
        if distillation is None or not distillation.student_pass:
            return
        halts = self.recurrence.placement != "none" and self.recurrence.halting.kind != "fixed"
        others = {
            f"num_nextn_predict_layers={self.num_nextn_predict_layers}": self.num_nextn_predict_layers > 0,
            f"num_pause_tokens={self.num_pause_tokens}": self.num_pause_tokens > 0,
            f"num_memory_tokens={self.num_memory_tokens}": self.num_memory_tokens > 0,
            f"recurrence.halting.kind={self.recurrence.halting.kind}": halts,
            "use_moe=true without a teacher's pass": self.has_experts and not distillation.needs_teacher,
        }
        distillation.check(self.latent_cot.num_latents, others, self.kv_widths)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def plain_head_dim(self) -> int:
        """Width of a head of grouped-query attention."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_widths(self) -> tuple[int, int]:
        """Numbers of all heads' keys, and of all heads' values, that attention compares for one token."""
        if self.use_mla:
            return self.num_attention_heads * self.qk_head_dim, self.num_attention_heads * self.v_head_dim
        return self.kv_heads * self.plain_head_dim, self.kv_heads * self.plain_head_dim

    @property
    def kv_heads(self) -> int:
        """Key-value heads of grouped-query attention."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Width that is rotated in every head."""
        return self.qk_rope_head_dim if self.use_mla else self.plain_head_dim

    @property
    def learned_positions(self) -> bool:
        return self.position_embedding == "learned"

    @property
    def has_experts(self) -> bool:
        """Whether any layer, including those of multi-token prediction, is a mixture of experts."""
        return self.is_moe_layer(self.num_hidden_layers - 1 + bool(self.num_nextn_predict_layers))

    @property
    def positions_per_token(self) -> int:
        """Positions of a sequence that a token takes: its own and those of its pauses."""
        return 1 + self.num_pause_tokens

    @property
    def learns_to_halt(self) -> bool:
        return self.recurrence.placement != "none" and self.recurrence.halting.learned

    def is_moe_layer(self, layer: int) -> bool:
        return self.use_moe and layer >= self.first_k_dense_replace

    def runs_of_layer(self, layer: int, num_steps: int, training: bool = False) -> int:
        """How often a forward pass with num_steps loop steps runs a layer.

        Training with an expected loss reads out every step, through all layers after the loop.
        """
        r = self.recurrence
        if r.placement != "block":
            return 1
        ranges = r.layer_ranges(self.num_hidden_layers)
        looped = r.range_of(layer, self.num_hidden_layers) is not None
        read_out = training and r.expectation == "loss" and layer > ranges[-1][1]
        return num_steps if looped or read_out else 1

    def decodes_exactly(self, num_steps: int) -> bool:
        """Whether tokens read in several passes over a cache give the results of one pass over all of them.

        For the loops' caches see cache.kept_keys. A recurrent memory is a state: what it has read cannot be
        moved or shared, so it counts as inexact.
        """
        r = self.recurrence
        if self.num_memory_tokens:
            return False
        if r.placement != "block":
            return True
        all_kept = r.cache in ("per_step", "parallel") and num_steps <= (r.virtual_layers or num_steps)
        return all_kept or r.cache == "first"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Builds a config from plain values; explicit keys override those of `preset`.

        Raises:
            ValueError: one line for an unknown key, a wrong type or an impossible value.
        """
        values = cls.checked(values)
        preset = values.get("preset")
        if preset is not None:
            if preset not in PRESETS:
                raise ValueError(
                    f"model.preset={preset!r} is unknown; choose one of {', '.join(sorted(PRESETS))}"
                )
            base = PRESETS[preset]
            recurrence = {**base.get("recurrence", {}), **values.get("recurrence", {})}
            values = {**base, **values, "recurrence": recurrence}
        return from_plain(cls, values, "model")

    @classmethod
    def checked(cls, values: Any) -> dict[str, Any]:
        """Plain values once their keys and types are a config's; what they say together is not checked.

        Raises:
            ValueError: one line.
        """
        return checked_values(cls, values, "model")


_CHOICES = {
    "hidden_act": ("silu", "relu2", "gelu"),
    "norm": ("rms_norm", "layer_norm"),
    "position_embedding": ("rope", "learned"),
}
