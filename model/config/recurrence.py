"""RecurrenceConfig and HaltingConfig: what is looped, how the state is carried, and when a token stops."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

from common.schema import Count, CountOrZero, Limits, Share, Weight, check_fields

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
    def heads(self) -> tuple[str, ...]:
        """Learned heads that decide: see halting.HaltingUnit."""
        both = {"token": ("token",), "sequence": ("sequence",), "mixed": ("token", "sequence")}
        return both[self.granularity] if self.learned else ()

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
class DepthPoint:
    """A point of `depth_schedule`."""

    step: CountOrZero  # optimizer steps done before
    num_steps: Annotated[float, Limits(least=1, most=10_000)]  # the fixed or the mean depth
    backprop_steps: Count | None = None  # in place of recurrence.backprop_steps; at every point or at none


@dataclass(frozen=True)
class RecurrenceConfig:
    """The Latent Reasoning Unit: where it sits, how often it runs, and how its state is carried."""

    # none | kv: the KV latent, before attention | post_attention: attention's output | block: whole layers
    placement: str = "none"
    # First and last layer of each loop (block) or of the layers that have a unit, counted from 0; default:
    # all.
    ranges: list[list[int]] | None = None
    num_steps: Steps = 1  # loop steps R at inference; in training the fixed or the mean depth
    # Depth in training as a function of the optimizer step: linear between points, constant before the first
    # and after the last; depth_sampling=fixed rounds it. It leaves num_steps, the depth at inference and in
    # validation, as it is: let the last point reach it.
    depth_schedule: list[DepthPoint] | None = None
    depth_sampling: str = "fixed"  # fixed | poisson (log-normal Poisson around the mean)
    depth_per: str = "step"  # depth_sampling=poisson: a draw per step (optimizer step) | sequence (row)
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

    def mean_steps(self, step: int) -> float:
        """The fixed or the mean depth in optimizer step `step`, counted from 0."""
        points = self.depth_schedule
        return self.num_steps if points is None else _between(points, [p.num_steps for p in points], step)

    def backprop_at(self, step: int) -> int | None:
        """Last loop steps that gradients flow through in optimizer step `step`; None: all."""
        points = self.depth_schedule or []
        cuts = [p.backprop_steps for p in points if p.backprop_steps is not None]
        return nearest_integer(_between(points, cuts, step)) if cuts else self.backprop_steps

    def changes_at(self, step: int) -> bool:
        """Whether optimizer step `step` starts another level of depth: a loop step more or less.

        A drawn depth varies in every step, so there only a jump of its mean counts.
        """
        now, before = self.mean_steps(step), self.mean_steps(max(0, step - 1))
        if self.depth_sampling == "poisson":
            return abs(now - before) >= 1
        cut = self.backprop_at(step) != self.backprop_at(max(0, step - 1))
        return cut or nearest_integer(now) != nearest_integer(before)

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


def nearest_integer(x: float) -> int:
    """Halves are rounded up."""
    return math.floor(x + 0.5)


def _between(points: list[DepthPoint], values: Sequence[float], step: int) -> float:
    """Linear interpolation of the points' values at an optimizer step; constant outside."""
    if step <= points[0].step:
        return values[0]
    for (a, x), (b, y) in itertools.pairwise(zip(points, values, strict=True)):
        if step < b.step:
            return x + (y - x) * (step - a.step) / (b.step - a.step)
    return values[-1]


_CHOICES: dict[str, tuple[str | None, ...]] = {
    "placement": ("none", "kv", "post_attention", "block"),
    "depth_sampling": ("fixed", "poisson"),
    "depth_per": ("step", "sequence"),
    "injection": ("none", "add", "concat", "gate"),
    "update": ("gated", "simple", "retrofit"),
    "cache": ("per_step", "parallel", "ema", "average", "last", "first"),
    "k_rope_source": (None, "hidden", "latent", "hidden_plus_latent"),
}
_HALTING_CHOICES: dict[str, tuple[str | None, ...]] = {
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
    _check_choices(r, "recurrence", _CHOICES)
    _check_choices(r.halting, "recurrence.halting", _HALTING_CHOICES)
    _check_ranges(r, num_layers)
    _check_counts(r)
    _check_depth(r)
    _check_placement(r, use_mla)
    _check_halting(r)


def with_halting(r: RecurrenceConfig, halting: HaltingConfig, num_steps: int) -> RecurrenceConfig:
    """The loop of a trained model with another kind of halting, for inference with num_steps loop steps.

    Raises:
        ValueError: the model has no loop or lacks the learned heads, or the values do not fit together.
    """
    check_fields(halting, "model.recurrence.halting")
    _check_choices(halting, "recurrence.halting", _HALTING_CHOICES)
    if r.placement == "none":
        raise ValueError(f"halting.kind={halting.kind} is for a loop, but the model has none; leave it out")
    lacking = [head for head in halting.heads if head not in r.halting.heads]
    if lacking:
        raise ValueError(
            f"halting.kind={halting.kind} with granularity={halting.granularity} needs a learned "
            f"{lacking[0]} head, but the model was trained with kind={r.halting.kind} and granularity="
            f"{r.halting.granularity}; choose kind=threshold or fixed"
        )
    called = replace(r, halting=halting)
    _check_halting(called)
    if halting.kind != "fixed":
        _check_counts(replace(called, num_steps=num_steps, max_steps=max(num_steps, r.max_steps)))
    return called


def _check_choices(section: object, where: str, choices: dict[str, tuple[str | None, ...]]) -> None:
    for name, allowed in choices.items():
        if getattr(section, name) not in allowed:
            raise ValueError(
                f"model.{where}.{name}={getattr(section, name)!r} is unknown; "
                f"choose one of {', '.join(map(str, allowed))}"
            )


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


def _check_depth(r: RecurrenceConfig) -> None:
    """What training draws or schedules must be a depth, and change something."""
    if r.depth_schedule is not None:
        _check_schedule(r, r.depth_schedule)
    if r.depth_per == "step":
        return
    for refused, option, reason in (
        (r.placement == "none", "placement=none", "which has no loop; set placement"),
        (
            r.depth_sampling == "fixed",
            "depth_sampling=fixed",
            "which gives every row the same depth; choose depth_sampling=poisson",
        ),
        (
            r.halting.learned,
            f"halting.kind={r.halting.kind}",
            "which learns when a token stops; choose kind=fixed or threshold",
        ),
        (
            r.cache == "parallel",
            "cache=parallel",
            "where all rows attend to as many steps; choose another cache",
        ),
    ):
        if refused:
            raise ValueError(f"model.recurrence.depth_per=sequence does not go with {option}, {reason}")


def _check_schedule(r: RecurrenceConfig, points: list[DepthPoint]) -> None:
    name = "model.recurrence.depth_schedule"
    if r.placement == "none":
        raise ValueError(f"{name} needs a loop, but placement=none; set placement or leave it out")
    if not points:
        raise ValueError(f"{name}=[] has no point; leave it out for a constant depth")
    for before, after in itertools.pairwise(points):
        if before.step >= after.step:
            raise ValueError(f"{name}: step {after.step} follows {before.step}; sort the points by step")
    cuts = [point.backprop_steps for point in points if point.backprop_steps is not None]
    if 0 < len(cuts) < len(points):
        raise ValueError(
            f"{name}: {len(cuts)} of {len(points)} points have backprop_steps; name it at every point or none"
        )
    if cuts and r.backprop_steps is not None:
        raise ValueError(
            f"model.recurrence.backprop_steps={r.backprop_steps} and that of {name} exclude each other; "
            "leave one of them out"
        )
    for point in points:
        at, cut = f"{name} at step {point.step}", point.backprop_steps
        if point.num_steps > r.max_steps:
            raise ValueError(f"{at}: num_steps={point.num_steps:g} exceeds max_steps={r.max_steps}; raise it")
        if cut is not None and r.depth_sampling == "fixed" and cut > point.num_steps:
            raise ValueError(
                f"{at}: backprop_steps={cut} exceeds num_steps={point.num_steps:g}, so that it cuts nothing; "
                "lower it"
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
    cuts = [r.backprop_steps, *(point.backprop_steps for point in r.depth_schedule or [])]
    cut = next((steps for steps in cuts if steps is not None), None)
    if h.learned and cut is not None:
        raise ValueError(
            f"model.recurrence.backprop_steps={cut} cuts the gradient that "
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
