"""The groups that are compared, as functions of a task's layers k and loop steps R, and their pairs.

A group is a set of overrides over experiments/base.yaml, whose layers combine latent attention (MLA) with
dense feed-forward layers. Where two groups must be equal in parameters, the feed-forward width makes up the
difference. `unequal` checks from sizes alone what `equal` promises.

This is the one definition of every group: the matrices read it, and experiments/group_files.py writes
pretrain/configs/groups/ from it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from model import ModelConfig
from model.counts import flops_per_token, num_parameters, training_flops_per_token
from model.dense_twin import LAYERS, WIDTHS, dense_twin, solve_widths

Model = dict[str, Any]  # keys of model.config.ModelConfig


def merged(base: Model, changes: Model) -> Model:
    """The base's keys with the changes over them, sections key by key."""
    sections = {key: merged(base[key], changes[key]) for key in changes if isinstance(base.get(key), dict)}
    return {**base, **changes, **sections}


@dataclass(frozen=True)
class Shape:
    """What a group is built for."""

    base: Model  # the task's and the size's own keys, vocab_size included
    layers: int  # k: distinct layers of a loop
    steps: int  # R: loop steps, or the mean if drawn at random
    sequence_length: int  # T
    prelude: int = 0  # layers before the loop, which run once
    coda: int = 0  # layers after it, which run once
    memory_tokens: int = 4  # of the Recurrent Memory Transformer

    @property
    def all_layers(self) -> int:
        """Distinct layers."""
        return self.prelude + self.layers + self.coda

    @property
    def layer_runs(self) -> int:
        """Runs of a layer per token."""
        return self.prelude + self.layers * self.steps + self.coda

    def config(self, changes: Model) -> ModelConfig:
        return ModelConfig.from_dict(merged(self.base, changes))


@dataclass(frozen=True)
class Group:
    source: str  # what it is and where it comes from
    build: Callable[[Shape], Model]
    method: str | None = None  # of distill/methods.py; None: pretrain/main.py trains it


def _fixed(shape: Shape, **changes: Any) -> Model:
    """k layers run R times; each step reads the normed state and the loop's input, so that it can settle."""
    recurrence = {"placement": "block", "num_steps": shape.steps, "injection": "add", "update": "simple"}
    if shape.layers < shape.all_layers:
        recurrence["ranges"] = [[shape.prelude, shape.prelude + shape.layers - 1]]
    return _layers(shape, recurrence={**recurrence, **changes})


def _loop(shape: Shape, **changes: Any) -> Model:
    """k layers run R times, the residual stream through all of them: the unrolled twin with tied weights."""
    return _fixed(shape, **{"injection": "none", "state_norm": False, **changes})


def _random(shape: Shape, **changes: Any) -> Model:
    return _fixed(shape, depth_sampling="poisson", max_steps=2 * shape.steps, **changes)


def _gated(shape: Shape, **changes: Any) -> Model:
    return _fixed(shape, update="gated", **changes)


def _universal(shape: Shape, **changes: Any) -> Model:
    return _loop(shape, iteration_embedding=True, **changes)


def _layers(shape: Shape, **changes: Any) -> Model:
    return {"num_hidden_layers": shape.all_layers, **changes}


def _unrolled(shape: Shape) -> Model:
    return {"num_hidden_layers": shape.layer_runs}


def _grouped(shape: Shape) -> Model:
    heads = shape.config({}).num_attention_heads
    return _layers(shape, use_mla=False, num_key_value_heads=heads // 2)


def _solved(shape: Shape, changes: Model, key: str, active: bool = False) -> Model:
    """`changes` with the width `key` that gives it the parameters of `fixed`, one norm more than the loop's.

    Raises:
        ValueError: even a width of 1 has more.
    """
    wanted = num_parameters(shape.config(_fixed(shape)), active)
    solved = solve_widths(
        shape.config(changes),
        [key],
        lambda model: num_parameters(model, active),
        wanted,
        multiples=(1,),
        tolerance=None,
    )
    return {**changes, key: getattr(solved, key)}


def _twin(shape: Shape, by: str) -> Model:
    """The dense twin of `gated`: every feed-forward width in proportion, multiples of 8 if near enough."""
    twin = dense_twin(shape.config(_gated(shape)), by, shape.sequence_length)
    return {key: getattr(twin, key) for key in (*LAYERS, *WIDTHS)}


def _dense_parameters(shape: Shape) -> Model:
    return _solved(shape, _layers(shape), "intermediate_size")


def _dense_narrow(shape: Shape) -> Model:
    """k R layers; its width, divisible by 8, keeps the feed-forward part nearest the base's proportion."""
    base = shape.config({})
    proportion = base.intermediate_size / base.hidden_size
    found: list[tuple[float, Model]] = []
    for width in range(8, base.hidden_size, 8):
        try:
            model = _solved(shape, {**_unrolled(shape), "hidden_size": width}, "intermediate_size")
        except ValueError:
            continue  # too wide
        found.append((abs(math.log(model["intermediate_size"] / width / proportion)), model))
    if not found:
        raise ValueError(
            f"no {shape.layer_runs} layers are narrow enough for the parameters of {shape.all_layers}: "
            "choose a larger size or fewer steps"
        )
    return min(found, key=lambda pair: pair[0])[1]


def _local(shape: Shape, placement: str, loop: Callable[..., Model]) -> Model:
    """A unit inside attention whose core is as wide as its state; `loop` says how the state is passed on."""
    base = shape.config({})
    width = base.kv_lora_rank if placement == "kv" else base.hidden_size
    changes = loop(shape, placement=placement, latent_intermediate_size=width)
    return _solved(shape, changes, "intermediate_size")


def _experts(shape: Shape) -> Model:
    changes = {**_loop(shape), "use_moe": True, "first_k_dense_replace": 0, "n_routed_experts": 8}
    changes |= {"num_experts_per_tok": 2, "n_shared_experts": 1}
    return _solved(shape, changes, "moe_intermediate_size", active=True)


def _memory(shape: Shape) -> Model:
    length = math.ceil(shape.sequence_length / shape.steps)
    return _layers(shape, num_memory_tokens=shape.memory_tokens, segment_length=length)


def _pause(shape: Shape) -> Model:
    """As many runs of a layer per token as the loop has, to the nearest whole token."""
    return _layers(shape, num_pause_tokens=round(shape.layer_runs / shape.all_layers) - 1)


_PONDER = {"kind": "ponder", "expectation": "loss"}
_ACT = {"kind": "act", "expectation": "state"}
_UT = "Universal Transformer (arXiv 1807.03819): loop, and every step has an embedding of its number"

GROUPS: dict[str, Group] = {
    "plain": Group("plain attention, k layers", lambda s: _layers(s, use_mla=False)),
    "mla": Group("multi-head latent attention (arXiv 2405.04434), k layers", _layers),
    "loop": Group("k layers run R times with tied weights, fixed depth", _loop),
    "adaptive": Group(
        "loop with learned halting, PonderNet (arXiv 2107.05407)", lambda s: _loop(s, halting=_PONDER)
    ),
    "threshold": Group(
        "random, and it stops where predictions stop changing: no learned halting (arXiv 2502.05171)",
        lambda s: _random(s, halting={"kind": "threshold", "measure": "kl"}),
    ),
    "fixed": Group(
        "loop with a normed state and its input injected at every step (arXiv 2502.05171)", _fixed
    ),
    "random": Group("fixed, but its depths drawn from a log-normal Poisson (arXiv 2502.05171)", _random),
    "ut": Group(_UT, _universal),
    "ut_act": Group(f"{_UT}; with ACT", lambda s: _universal(s, halting=_ACT)),
    "rmt": Group(
        "Recurrent Memory Transformer (arXiv 2207.06881): R segments, memory tokens between them", _memory
    ),
    "pause": Group(
        "pause tokens after every token (arXiv 2310.02226): as many runs of a layer per token as loop has",
        _pause,
    ),
    "dense_params": Group("k layers with the parameters of the loop", _dense_parameters),
    "dense_narrow": Group("k R layers, so narrow that they have the parameters of the loop", _dense_narrow),
    "dense_flops": Group("k R layers: the loop unrolled, with its inference FLOPs", _unrolled),
    # Each of these two uses the loop that learned addition better on the sweep's seed (docs/LOG.md).
    "kv": Group("a unit on the KV latent, R steps, before attention", lambda s: _local(s, "kv", _fixed)),
    "post_attention": Group(
        "a unit on attention's output, R steps, before the FFN", lambda s: _local(s, "post_attention", _loop)
    ),
    "moe_core": Group("loop with 8 experts, of which 2 and a shared one are active", _experts),
    "cot": Group("k R layers that write a chain of thought, and its majority vote", _unrolled, "cot"),
    "no_cot": Group("k R layers that answer at once", _unrolled, "no_cot"),
    "loop_no_cot": Group("k layers looped R times that answer at once", _loop, "no_cot"),
    # In no matrix yet: pretrain/configs/groups/ has them for the nano size.
    "gqa": Group(
        "plain with half as many key and value heads: grouped-query attention (arXiv 2305.13245)", _grouped
    ),
    "gated": Group("fixed, its update gated as in a GRU instead of simple", _gated),
    "gated_act": Group(
        "gated with learned halting, ACT (arXiv 1603.08983), trained on the expected loss over the steps",
        lambda s: _gated(s, halting={"kind": "act", "expectation": "loss"}),
    ),
    "gated_dense_params": Group(
        "k layers with the parameters of gated, all feed-forward widths scaled",
        lambda s: _twin(s, "parameters"),
    ),
    "gated_dense_flops": Group(
        "gated unrolled, with its inference FLOPs, all feed-forward widths scaled",
        lambda s: _twin(s, "flops"),
    ),
    "ut_normed": Group("ut, but each step reads the normed state", lambda s: _universal(s, state_norm=True)),
    "ut_normed_act": Group(
        "ut_act, but each step reads the normed state",
        lambda s: _universal(s, state_norm=True, halting=_ACT),
    ),
}


@dataclass(frozen=True)
class Pair:
    """Two groups that are compared because they are equal in something."""

    a: str
    b: str
    equal: str  # parameters | active_parameters | inference_flops | training_flops
    tolerance: float  # of their difference, as a share of the larger side


# training_flops holds for budgets given as a group's FLOPs, see matrix_file.Budget.
PAIRS = (
    Pair("loop", "dense_params", "parameters", 0.01),
    Pair("loop", "dense_narrow", "parameters", 0.01),
    Pair("loop", "dense_flops", "inference_flops", 0.02),
    Pair("loop", "dense_flops", "training_flops", 0.02),
    Pair("loop", "dense_params", "training_flops", 0.02),
    Pair("fixed", "random", "parameters", 0.0),
    Pair("loop", "fixed", "parameters", 0.01),
    Pair("loop", "adaptive", "parameters", 0.01),
    Pair("loop", "ut", "parameters", 0.01),
    Pair("loop", "kv", "parameters", 0.02),
    Pair("loop", "post_attention", "parameters", 0.02),
    Pair("loop", "moe_core", "active_parameters", 0.05),
    Pair("mla", "pause", "parameters", 0.01),
    Pair("mla", "rmt", "parameters", 0.01),
    Pair("cot", "no_cot", "inference_flops", 0.0),
    Pair("no_cot", "loop_no_cot", "inference_flops", 0.02),
    Pair("gated", "gated_act", "parameters", 0.01),
    Pair("gated", "gated_dense_params", "parameters", 0.01),
    Pair("gated", "gated_dense_flops", "inference_flops", 0.02),
)


def measured(what: str, config: ModelConfig, sequence_length: int, tokens: int) -> float:
    """One side of a pair, from sizes alone; training_flops are those of `tokens` tokens at the mean depth."""
    if what == "training_flops":
        return training_flops_per_token(config, sequence_length) * tokens
    if what == "inference_flops":
        return flops_per_token(config, sequence_length)
    return num_parameters(config, active=what == "active_parameters")


def unequal(pair: Pair, a: float, b: float) -> str | None:
    """How the sides of a pair differ, in words; None if they are equal within the tolerance."""
    difference = abs(a - b) / max(a, b)
    if difference <= pair.tolerance:
        return None
    return (
        f"{pair.a} has {pair.equal} {a:,.0f} and {pair.b} {b:,.0f}, {difference:.2%} apart, above the "
        f"tolerance of {pair.tolerance:.0%}: leave one of them out, or change the size so that its widths fit"
    )
