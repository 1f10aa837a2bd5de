"""Step time of a layout, and the search for the best one. STEP TIMES ARE PREDICTED AND UNVERIFIED.

They have not been compared with any GPU run: they are the stated figures of layout.Hardware times assumed
fractions. ZeRO's gathers overlap the arithmetic in forward, its gathers and reductions do in backward, by the
assumed fraction `overlap`; ZeRO-1 reduces, and so overlaps, in the last micro-batch only. Nothing overlaps
the exchange of tokens with experts, nor what follows the last backward: AdamW, bound by memory bandwidth, and
the gathers of ZeRO-1 and 2.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from model import ModelConfig, counts
from pretrain.planning.communication import Collective, collectives, expert_runs, gather_schedule, rank_shares
from pretrain.planning.layout import Hardware, Layout, Loads, Part, check_experts, model_parts
from pretrain.planning.memory import memory

RESOURCES = ("compute", "NVLink", "network", "memory bandwidth", "latency")


@dataclass(frozen=True)
class LayoutPlan:
    """A layout and what is predicted for it."""

    layout: Layout
    memory: dict[str, int]  # bytes on a GPU
    traffic: list[Collective]  # per step
    nvlink_bytes: float  # sent by a GPU per step
    network_bytes: float
    seconds: dict[str, float]  # per step, by the resource that is waited for

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return self.layout.step_tokens / self.step_seconds

    @property
    def limit(self) -> str:
        """The resource that the step waits for most."""
        return max(self.seconds, key=lambda name: self.seconds[name])


def plan(
    config: ModelConfig,
    layout: Layout,
    hardware: Hardware,
    loads: Loads | None = None,
    parts: dict[str, Part] | None = None,
) -> LayoutPlan:
    """Predicts one layout.

    Args:
        loads: shares of the experts in every MoE layer, as metrics.jsonl records them; None: even.
        parts: of the model, if already known.
    """
    parts = parts or model_parts(config)
    skew = _skew(config, layout, loads)
    gathering = gather_schedule(config, parts, layout) if layout.stage == 3 else None
    traffic = collectives(config, parts, layout, loads)
    links = [c.links(layout) for c in traffic]
    return LayoutPlan(
        layout,
        memory(config, parts, layout, gathering, skew),
        traffic,
        sum(nvlink for nvlink, _ in links),
        sum(network for _, network in links),
        _seconds(config, parts, layout, hardware, traffic, skew),
    )


def _skew(config: ModelConfig, layout: Layout, loads: Loads | None) -> float:
    """The most loaded rank's tokens as a multiple of an even load, averaged over the layers' runs."""
    if loads is None or layout.ep == 1:
        return 1.0
    runs = [forward for forward, _, _ in expert_runs(config)]
    if len(loads) != len(runs) or any(len(layer) != config.n_routed_experts for layer in loads):
        raise ValueError(
            f"--loads has {len(loads)} layers of {len(loads[0])} experts, but the model has {len(runs)} of "
            f"{config.n_routed_experts}; give metrics of a run of this model"
        )
    worst = [max(shares) for shares in rank_shares(loads, layout.ep)]
    return sum(n * w for n, w in zip(runs, worst, strict=True)) / sum(runs)


def _seconds(
    config: ModelConfig,
    parts: dict[str, Part],
    layout: Layout,
    hardware: Hardware,
    traffic: list[Collective],
    skew: float,
) -> dict[str, float]:
    waited = dict.fromkeys(RESOURCES, 0.0)
    forward, recomputed = _flops(config, layout, skew)
    for phase, flops in (("forward", forward), ("backward", 2 * forward + recomputed)):
        arithmetic = flops / (hardware.peak_flops * hardware.compute_fraction)
        waited["compute"] += arithmetic
        exchanges = [c for c in traffic if c.phase == phase]
        for resource, seconds in _transfer(_of(exchanges, experts=True), layout, hardware).items():
            waited[resource] += seconds
        hidden = _transfer(_of(exchanges, experts=False), layout, hardware)
        covering = arithmetic / layout.accumulation if layout.stage == 1 else arithmetic
        whole = sum(hidden.values())
        covered = min(covering, whole) * hardware.overlap
        for resource, seconds in hidden.items():  # what arithmetic does not cover, split in proportion
            waited[resource] += seconds * (1 - covered / whole)
    for resource, seconds in _transfer([c for c in traffic if c.phase == "step"], layout, hardware).items():
        waited[resource] += seconds
    held = sum(sum(part.shards(layout).values()) for part in parts.values())
    # AdamW reads a gradient, weight and two moments in fp32 and writes three of them and the 16-bit weight.
    update = held * (4 * 4 + 3 * 4 + layout.element_bytes)
    waited["memory bandwidth"] += update / (hardware.memory_bandwidth * hardware.memory_bandwidth_fraction)
    return waited


def _flops(config: ModelConfig, layout: Layout, skew: float) -> tuple[float, float]:
    """FLOPs per step on the most loaded GPU: forward, and what backward recomputes."""
    tokens = layout.micro_tokens * layout.accumulation
    runs = expert_runs(config)
    expert = 6.0 * config.hidden_size * config.moe_intermediate_size * config.num_experts_per_tok
    extra = (skew - 1) * expert * sum(n for n, _, _ in runs) * config.positions_per_token
    forward = counts.training_flops_per_token(config, layout.sequence_length) / 3 + extra
    again = 0.0
    if layout.checkpointing == "block":
        again = forward - 2.0 * config.vocab_size * config.hidden_size
    elif layout.checkpointing == "iteration" and config.recurrence.placement == "block":
        one, two = (counts.flops_per_token(config, layout.sequence_length, n) for n in (1, 2))
        again = (two - one) * config.recurrence.num_steps
    return forward * tokens, again * tokens


def _of(traffic: list[Collective], experts: bool) -> list[Collective]:
    return [c for c in traffic if (c.operation == "all_to_all_single") == experts]


def _transfer(traffic: list[Collective], layout: Layout, hardware: Hardware) -> dict[str, float]:
    """Seconds of consecutive exchanges by link: each takes as long as its slower link."""
    seconds = dict.fromkeys(("NVLink", "network", "latency"), 1e-12)
    for collective in traffic:
        nvlink, network = collective.links(layout)
        near = nvlink / (hardware.nvlink_bandwidth * hardware.nvlink_fraction)
        far = network / (hardware.network_bandwidth * hardware.network_fraction)
        seconds["network" if far > near else "NVLink"] += max(near, far)
        hops = math.log2(layout.group(collective.group)[0])
        seconds["latency"] += collective.calls * hops * hardware.hop_latency
    return seconds


def search(
    config: ModelConfig, hardware: Hardware, rows: int, fixed: dict[str, Any], loads: Loads | None = None
) -> LayoutPlan:
    """The layout that fits with the most predicted tokens/s; among equals, the one with most memory left.

    Args:
        rows: of the global batch, split evenly among the GPUs.
        fixed: given fields of Layout, at least gpus and sequence_length.

    Raises:
        ValueError: nothing fits, with the missing bytes, or a given field is impossible.
    """
    # In the smallest layout that could exist, ZeRO-3 over all GPUs, each parameter has 16 bytes.
    gpus = fixed["gpus"]
    least = 16 * counts.num_parameters(config) / gpus
    if least > hardware.usable_bytes:
        raise ValueError(
            f"nothing fits {hardware.usable_bytes:,.0f} usable bytes on {gpus} GPUs: the sharded weights, "
            f"gradients and optimizer alone take {least:,.0f} of each; give more GPUs or a smaller model"
        )
    parts = model_parts(config)
    layouts = list(_layouts(config, hardware, rows, fixed))
    plans = [plan(config, layout, hardware, loads, parts) for layout in layouts]
    fitting = [p for p in plans if p.memory_bytes <= hardware.usable_bytes]
    if not fitting:
        smallest = min(plans, key=lambda p: p.memory_bytes)
        raise ValueError(
            f"nothing fits {hardware.usable_bytes:,.0f} usable bytes on {smallest.layout.gpus} GPUs: the "
            f"smallest layout ({describe(smallest.layout)}) is short of "
            f"{smallest.memory_bytes - hardware.usable_bytes:,.0f} bytes; give more GPUs or a smaller model"
        )
    return max(fitting, key=lambda p: (round(p.tokens_per_second, -1), -p.memory_bytes))


def _layouts(config: ModelConfig, hardware: Hardware, rows: int, fixed: dict[str, Any]) -> Iterator[Layout]:
    gpus = fixed["gpus"]
    if rows % gpus:
        raise ValueError(
            f"--global_batch_size {rows} is not divisible by the {gpus} GPUs; choose a multiple of {gpus}"
        )
    own, node = rows // gpus, hardware.gpus_per_node
    if own % fixed.get("micro_batch_size", 1):
        raise ValueError(
            f"--micro_batch_size {fixed['micro_batch_size']} does not divide the {own} rows of a GPU; "
            "choose one of their divisors"
        )
    if "ep" in fixed:
        check_experts(config, fixed["ep"])
    experts = config.n_routed_experts if config.has_experts else 1
    divisors = [n for n in range(1, experts + 1) if experts % n == 0 and gpus % n == 0]
    options: dict[str, list[Any]] = {
        "ep": [n for n in divisors if node % n == 0 or n % node == 0],
        "stage": [1, 2, 3],
        "micro_batch_size": [n for n in (1, 2, 4, 8, 16, 32) if own % n == 0],
        "checkpointing": ["none", "block"],
    }
    options |= {name: [fixed[name]] for name in options if name in fixed}
    for values in itertools.product(*options.values()):
        chosen = dict(zip(options, values, strict=True))
        yield Layout(
            gpus=gpus,
            sequence_length=fixed["sequence_length"],
            accumulation=own // chosen["micro_batch_size"],
            gradient_bytes=4,  # as ds_configs/*_bf16.json have it
            reduction_bytes=4,
            gpus_per_node=node,
            **chosen,
        )


def describe(layout: Layout) -> str:
    return (
        f"ZeRO-{layout.stage}, ep {layout.ep}, micro-batch {layout.micro_batch_size} x "
        f"{layout.accumulation}, checkpointing {layout.checkpointing}"
    )
