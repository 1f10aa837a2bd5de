"""RecurrenceConfig and HaltingConfig: what is looped, how the state is carried, and when a token stops."""

from dataclasses import dataclass, field
from typing import Annotated

from common.schema import Count, CountOrZero, Limits, Share, Weight

Steps = Annotated[int, Limits(least=1, most=10_000)]
LEARNED = ("act", "ponder", "entropy")


@dataclass(frozen=True)
class HaltingConfig:
    """When a token stops iterating. See model/halting.py for the formulas."""

    # fixed: never before num_steps | act (Graves 2016) | ponder (PonderNet) | entropy (Ouro's uniform prior)
    # | threshold: training as fixed, inference stops where the state or the prediction stops changing
    kind: str = "fixed"
    granularity: str = "token"  # token | sequence (mean over the document so far) | mixed
    mixture: Share = 0.5  # granularity=mixed: share of the token's own signal
    measure: str = "cosine"  # kind=threshold: cosine of successive states | kl of successive predictions
    # Learned kinds: a token halts once it has spent this probability (default 0.99). kind=threshold: at a
    # cosine of at least this (0.95), or at a divergence of at most this many nats (5e-4).
    threshold: Annotated[float, Limits(least=-1, most=10**6)] | None = None
    min_steps: Steps = 1  # no token halts earlier
    # loss: sum p_n CE_n (default for block) | state: sum p_n s_n (default for the others)
    expectation: str | None = None
    ponder_weight: Weight | None = None  # default: act 0.001, ponder 0.01, entropy 0.1
    ponder_prior: Share = 0.2  # kind=ponder: parameter of the geometric prior, about 1 / expected steps
    stability_weight: Weight = 0.0  # change of the state after it should have halted
    sparsity_weight: Weight = 0.0  # Hoyer-square of the state that is read out, 0..1
    information_weight: Weight = 0.0  # minus a lower bound of the information that successive states share

    @property
    def learned(self) -> bool:
        return self.kind in LEARNED

    @property
    def limit(self) -> float:
        """The threshold in use."""
        if self.threshold is not None:
            return self.threshold
        return 0.99 if self.learned else {"cosine": 0.95, "kl": 5e-4}[self.measure]

    @property
    def ponder_scale(self) -> float:
        """The ponder term's weight in use."""
        if self.ponder_weight is not None:
            return self.ponder_weight
        return {"act": 0.001, "ponder": 0.01, "entropy": 0.1}.get(self.kind, 0.0)


@dataclass(frozen=True)
class RecurrenceConfig:
    """The Latent Reasoning Unit: where it sits, how often it runs, and how its state is carried."""

    # none | kv: the KV latent, before attention | post_attention: attention's output | block: whole layers
    placement: str = "none"
    # First and last layer of each loop (block) or of the layers that have a unit, counted from 0; default:
    # all.
    ranges: list[list[int]] | None = None
    num_steps: Steps = 1  # loop steps R at inference; in training the fixed or the mean depth
    depth_sampling: str = "fixed"  # fixed | poisson (log-normal Poisson, one draw per optimizer step)
    max_steps: Steps = 32  # upper limit of a sampled depth
    backprop_steps: Count | None = None  # gradients flow through this many last steps only; default: all
    injection: str = "add"  # none | add | concat | gate: how the loop's input re-enters at every step
    # gated (GRU-style convex update) | simple (the core's output is the state) | retrofit (the first step as
    # simple, later ones gated, so that one step is the network without a loop)
    update: str = "gated"
    # Each pass reads the normed state. False: it reads the state itself, so that with injection=none and
    # update=simple the residual stream runs through the passes as through layers of tied weights.
    state_norm: bool = True
    # Norms what the loop hands on. False: its state as it is, for a loop in a network that was trained
    # without it; its new weights then start so that the network stays near what it was (see starts_near).
    output_norm: bool = True
    iteration_embedding: bool = False  # tells the core which step it is in
    halting: HaltingConfig = field(default_factory=HaltingConfig)
    # block only
    sandwich_norm: bool = False  # looped layers also norm what attention and feed-forward layer give
    cache: str = "per_step"  # per_step | parallel | ema | average | last | first; see model/cache.py
    # steps that keep keys of their own (per_step, parallel); default: all
    virtual_layers: Count | None = None
    ema_decay: Share = 0.7  # cache=ema: share of what was merged before
    # kv and post_attention only
    # inner width of the unit's core; default: twice the state's
    latent_intermediate_size: Count | None = None
    # width of a causal depthwise convolution over tokens in every step; 0: none
    position_mixing: CountOrZero = 0
    query_conditioned: bool = False  # the refinement reads the token's own query
    # kv only: hidden (as DeepSeek) | latent | hidden_plus_latent (default: DeepSeek's before training)
    k_rope_source: str | None = None

    @property
    def token_local(self) -> bool:
        """Whether the unit sits inside attention and iterates on each token's own state."""
        return self.placement in ("kv", "post_attention")

    @property
    def starts_near(self) -> bool:
        """Whether the loop's new weights start so that a trained network stays near what it was.

        A unit's core starts as the identity, an injection as the loop's input, halting without regard to the
        state, whose size in trained networks would decide otherwise.
        """
        return not self.output_norm

    @property
    def carries_keys(self) -> bool:
        """Whether a step's keys and values depend on those of the step before."""
        return self.halting.kind != "fixed" or self.cache != "per_step"

    @property
    def key_source(self) -> str:
        """What the shared rotated key is formed from."""
        return self.k_rope_source or ("hidden_plus_latent" if self.placement == "kv" else "hidden")

    @property
    def expectation(self) -> str:
        """loss | state | last: what is trained and read out."""
        if not self.halting.learned:
            return "last"
        return self.halting.expectation or ("loss" if self.placement == "block" else "state")

    def range_of(self, layer: int, num_layers: int) -> int | None:
        """Number of the range that a layer lies in."""
        for number, (first, last) in enumerate(self.layer_ranges(num_layers)):
            if first <= layer <= last:
                return number
        return None

    def layer_ranges(self, num_layers: int) -> list[tuple[int, int]]:
        """First and last layer of each range."""
        if self.placement == "none":
            return []
        if self.ranges is None:
            return [(0, num_layers - 1)]
        return [(first, last) for first, last in self.ranges]


_CHOICES = {
    "placement": ("none", "kv", "post_attention", "block"),
    "depth_sampling": ("fixed", "poisson"),
    "injection": ("none", "add", "concat", "gate"),
    "update": ("gated", "simple", "retrofit"),
    "cache": ("per_step", "parallel", "ema", "average", "last", "first"),
    "k_rope_source": (None, "hidden", "latent", "hidden_plus_latent"),
}
_HALTING_CHOICES = {
    "kind": ("fixed", *LEARNED, "threshold"),
    "granularity": ("token", "sequence", "mixed"),
    "measure": ("cosine", "kl"),
    "expectation": (None, "loss", "state"),
}


def check_recurrence(r: RecurrenceConfig, num_layers: int, use_mla: bool) -> None:
    """Refuses what is impossible or makes no sense, and says why.

    Raises:
        ValueError: names the key, its value, the limit and the fix.
    """
    for section, where, choices in (
        (r, "recurrence", _CHOICES),
        (r.halting, "recurrence.halting", _HALTING_CHOICES),
    ):
        for name, allowed in choices.items():
            if getattr(section, name) not in allowed:
                raise ValueError(
                    f"model.{where}.{name}={getattr(section, name)!r} is unknown; "
                    f"choose one of {', '.join(map(str, allowed))}"
                )
    _check_ranges(r, num_layers)
    _check_counts(r)
    _check_placement(r, use_mla)
    _check_halting(r)


def _check_ranges(r: RecurrenceConfig, num_layers: int) -> None:
    end = -1
    for entry in r.ranges or []:
        if len(entry) != 2 or not end < entry[0] <= entry[1] < num_layers:
            raise ValueError(
                f"model.recurrence.ranges={r.ranges} must hold pairs [first, last] of layers, rising and "
                f"apart, with every layer in 0..{num_layers - 1} (num_hidden_layers={num_layers})"
            )
        end = entry[1]
    if r.ranges is not None and not r.ranges:
        raise ValueError("model.recurrence.ranges=[] loops no layer; leave it out or set placement=none")


def _check_counts(r: RecurrenceConfig) -> None:
    h = r.halting
    if not 1 <= r.num_steps <= r.max_steps:
        raise ValueError(f"model.recurrence.num_steps={r.num_steps} must lie in 1..max_steps={r.max_steps}")
    if not 1 <= h.min_steps <= r.num_steps:
        raise ValueError(
            f"model.recurrence.halting.min_steps={h.min_steps} must lie in 1..num_steps={r.num_steps}"
        )
    fewest, name = (r.num_steps, "num_steps") if h.kind == "fixed" else (h.min_steps, "halting.min_steps")
    if r.virtual_layers is not None and not 1 <= r.virtual_layers <= fewest:
        raise ValueError(
            f"model.recurrence.virtual_layers={r.virtual_layers} must lie in 1..{name}={fewest}: every "
            "token fills as many steps; lower it or raise the other"
        )


def _check_placement(r: RecurrenceConfig, use_mla: bool) -> None:
    """Each option belongs to some placements; elsewhere it would do nothing."""
    if r.placement == "kv" and not use_mla:
        raise ValueError(
            "model.recurrence.placement=kv refines the KV latent, but grouped-query attention has none; "
            "set model.use_mla=true or choose placement=post_attention"
        )
    local = "attention inside the loop already does this"
    whole = "a unit inside attention has no layers or keys of its own"
    for wanted, option, placements, reason in (
        (r.position_mixing > 0, f"position_mixing={r.position_mixing}", ("kv", "post_attention"), local),
        (r.query_conditioned, "query_conditioned=true", ("kv", "post_attention"), local),
        (r.latent_intermediate_size is not None, "latent_intermediate_size", ("kv", "post_attention"), local),
        (
            r.key_source != "hidden",
            f"k_rope_source={r.k_rope_source}",
            ("kv",),
            "only there is the latent refined before keys are formed",
        ),
        (r.sandwich_norm, "sandwich_norm=true", ("block",), whole),
        (r.cache != "per_step", f"cache={r.cache}", ("block",), whole),
        (r.virtual_layers is not None, f"virtual_layers={r.virtual_layers}", ("block",), whole),
    ):
        if wanted and r.placement not in placements:
            raise ValueError(
                f"model.recurrence.{option} is not for placement={r.placement}, only for "
                f"{' and '.join(placements)}: {reason}"
            )
    if r.virtual_layers is not None and r.cache not in ("per_step", "parallel"):
        raise ValueError(
            f"model.recurrence.virtual_layers={r.virtual_layers} counts the keys that steps keep apart, but "
            f"cache={r.cache} merges them; leave it out or choose cache=per_step or parallel"
        )


def _check_halting(r: RecurrenceConfig) -> None:
    h = r.halting
    if h.kind == "fixed":
        _refuse_without_halting(h)
        return
    if r.placement == "none":
        raise ValueError(f"model.recurrence.halting.kind={h.kind} needs a loop; set placement")
    if h.kind == "threshold" and h.measure == "kl" and r.placement != "block":
        raise ValueError(
            "model.recurrence.halting.measure=kl compares predictions, but a unit inside attention makes "
            "none; choose measure=cosine or placement=block"
        )
    if h.learned and r.backprop_steps is not None:
        raise ValueError(
            f"model.recurrence.backprop_steps={r.backprop_steps} cuts the gradient that "
            f"halting.kind={h.kind} learns from; leave it out or choose halting.kind=fixed or threshold"
        )
    if h.learned and not 0 < h.limit < 1:
        raise ValueError(f"model.recurrence.halting.threshold={h.limit} must lie between 0 and 1")
    if r.expectation == "loss" and (r.placement != "block" or len(r.ranges or [0]) > 1):
        raise ValueError(
            "model.recurrence.halting.expectation=loss reads the loss out after every step, which needs "
            "placement=block and a single range; choose expectation=state"
        )
    if not h.learned and h.expectation is not None:
        raise ValueError(
            f"model.recurrence.halting.expectation={h.expectation} weighs steps by their probability, but "
            f"halting.kind={h.kind} has none; leave it out"
        )
    if not h.learned:
        _refuse_without_halting(h)


def _refuse_without_halting(h: HaltingConfig) -> None:
    for name in ("stability_weight", "ponder_weight"):
        if getattr(h, name):
            raise ValueError(
                f"model.recurrence.halting.{name}={getattr(h, name)} weighs learned halting probabilities, "
                f"but halting.kind={h.kind} has none; choose kind act, ponder or entropy"
            )
