"""Bytes that a training step sends: what DeepSpeed 0.19.8's ZeRO and our expert parallelism exchange.

Read from its source and checked against its communication logger by tests/pretrain/test_plan.py:

- ZeRO-3 gathers a module before use, forward and backward, unless it is still there: a module stays if it is
  used again within stage3_max_reuse_distance parameters. Gradients are reduce-scattered in every
  micro-batch.
- ZeRO-1 and 2 ALL-REDUCE gradients, twice the bytes of a reduce-scatter (use_multi_rank_bucket_allreduce, the
  default): ZeRO-1 once per step, ZeRO-2 in every micro-batch. Both gather the new weights once per step.
- Experts do the same over their expert-data-parallel group. Tokens travel to them and back in forward and in
  backward, and once more each way where activation checkpointing reruns the layer.

Left out: norms, overflow flags, loads and loss sums, a few hundred bytes per step.
"""

import itertools
from dataclasses import dataclass

from model import ModelConfig
from pretrain.planning.layout import Layout, Loads, Part

MOST_RUNS = 100_000


@dataclass(frozen=True)
class Collective:
    """Equal exchanges of one step."""

    operation: str  # all_gather_into_tensor | reduce_scatter_tensor | all_reduce | all_to_all_single
    group: str  # world | expert_data | expert
    phase: str  # forward | backward | step
    # As DeepSpeed's logger counts on a rank: the tensors passed in, over all calls, even in a group of one
    bytes: float
    calls: float

    def links(self, layout: Layout) -> tuple[float, float]:
        """Bytes that a GPU sends over NVLink and over the network.

        A ring enters and leaves every node once; NCCL runs one ring per GPU of a node, so that the GPUs share
        the traffic between nodes. All-to-all sends each peer its part.
        """
        size, local = layout.group(self.group)
        if size == 1:
            return 0.0, 0.0
        if self.operation == "all_to_all_single":
            return self.bytes * (local - 1) / size, self.bytes * (size - local) / size
        full = self.bytes * (size if self.operation == "all_gather_into_tensor" else 1)
        rounds = 2 if self.operation == "all_reduce" else 1
        nodes = size / local
        across = rounds * full * (nodes - 1) / nodes / local
        return rounds * full * (size - 1) / size - across, across


@dataclass(frozen=True)
class Gathering:
    """What ZeRO-3 gathers in one micro-batch."""

    forward: list[str]  # names of parts, in order
    backward: list[str]
    peak_elements: int  # largest number gathered at a time


def collectives(
    config: ModelConfig,
    parts: dict[str, Part],
    layout: Layout,
    loads: Loads | None = None,
    ep_rank: int | None = None,
) -> list[Collective]:
    """All exchanges of one step that grow with the model or the batch.

    Args:
        loads: shares of the experts, one list per MoE layer; None: even.
        ep_rank: the rank whose all-to-all is counted; None: in every layer the most loaded rank.
    """
    found = _zero3(config, parts, layout) if layout.stage == 3 else _zero12(parts, layout)
    if layout.ep > 1:
        found += _all_to_all(config, layout, loads, ep_rank)
    return [c for c in found if c.bytes]


def _zero12(parts: dict[str, Part], layout: Layout) -> list[Collective]:
    width, found = layout.element_bytes, list[Collective]()
    reductions = layout.accumulation if layout.stage == 2 else 1
    dense = sum(sum(part.dense) for part in parts.values())
    experts = sum(sum(part.experts) for part in parts.values()) // layout.ep
    for group, elements in (("world", dense), ("expert_data", experts)):
        buckets = -(-elements // layout.zero.reduce_bucket_size)
        full = float(elements * width)
        shard = full / layout.group(group)[0]
        reduced = float(elements * (layout.reduction_bytes or width) * reductions)
        found.append(Collective("all_reduce", group, "backward", reduced, buckets * reductions))
        if layout.group(group)[0] > 1:
            found.append(Collective("all_gather_into_tensor", group, "step", shard, 1))
    return found


def _zero3(config: ModelConfig, parts: dict[str, Part], layout: Layout) -> list[Collective]:
    gathering = gather_schedule(config, parts, layout)
    width, found = layout.element_bytes * layout.accumulation, list[Collective]()
    reduction = (layout.reduction_bytes or layout.element_bytes) * layout.accumulation
    for group in ("world", "expert_data"):
        size = layout.group(group)[0]
        shards = {name: part.shards(layout)[group] for name, part in parts.items()}
        kept = [n for n in shards.values() if n]
        if size > 1:
            for phase, names in (("forward", gathering.forward), ("backward", gathering.backward)):
                sent = [shards[name] for name in names if shards[name]]
                calls = len(sent) * layout.accumulation
                found.append(Collective("all_gather_into_tensor", group, phase, sum(sent) * width, calls))
        calls = len(kept) * layout.accumulation
        reduced = sum(kept) * size * reduction
        found.append(Collective("reduce_scatter_tensor", group, "backward", reduced, calls))
    return found


def gather_schedule(config: ModelConfig, parts: dict[str, Part], layout: Layout) -> Gathering:
    """Replays DeepSpeed's fetches and releases over the traced order of use of the modules.

    After partitioned_param_coordinator.py, __params_to_release. A leaf module looks ahead through whole
    modules, of which the root, first in backward, contains it; any other looks only at modules' own
    parameters.
    """
    forward, backward = uses(config, layout.checkpointing)
    forward, backward = ([n for n in names if n in parts] for names in (forward, backward))
    order = [*forward, "", *backward]
    elements = {name: part.held(layout.ep) for name, part in parts.items()}
    gathered, peak, fetched = set[str](), 0, list[list[str]]([[], []])
    for i, name in enumerate(order):
        if not name:
            continue
        if name not in gathered:
            fetched[i > len(forward)].append(name)
            gathered.add(name)
        peak = max(peak, sum(elements[n] for n in gathered))
        if not _used_soon(i, order, parts, elements, layout.zero.max_reuse_distance):
            gathered.discard(name)
    return Gathering(fetched[0], fetched[1], peak)


def _used_soon(
    now: int, order: list[str], parts: dict[str, Part], elements: dict[str, int], distance: float
) -> bool:
    name = order[now]
    leaf, passed = parts[name].leaf, 0
    for other in itertools.islice(order, now + 1, None):
        if passed >= distance:
            return False
        if other == name or (leaf and not other):
            return True
        if other and (leaf or not parts[other].leaf):
            passed += elements[other]
    return False


def uses(config: ModelConfig, checkpointing: str = "none") -> tuple[list[str], list[str]]:
    """Modules in the order a micro-batch uses them, forward and backward.

    Raises:
        ValueError: there are too many to be listed; one line.
    """
    r, L, done = config.recurrence, config.num_hidden_layers, 0
    runs = sum(config.runs_of_layer(layer, r.num_steps, training=True) for layer in range(L))
    if runs > MOST_RUNS:
        raise ValueError(
            f"the model runs {runs:,} layers per token, more than the {MOST_RUNS:,} that a plan replays; "
            "lower model.recurrence.num_steps"
        )
    forward = ["embed_tokens", "embed_positions", "embedding_mixing", "pause_tokens", "memory"]
    backward: list[str] = []
    for number, (first, last) in enumerate(r.layer_ranges(L) if r.placement == "block" else []):
        before = [f"layers.{i}" for i in range(done, first)]
        step = [f"recurrence.{number}", *(f"layers.{i}" for i in range(first, last + 1))]
        kept = min(r.backprop_steps or r.num_steps, r.num_steps)
        again = step if checkpointing == "iteration" else []
        forward += before + step * r.num_steps
        backward = [*again, *reversed(step)] * kept + before[::-1] + backward
        done = last + 1
    tail = [f"layers.{i}" for i in range(done, L)]
    tail *= config.runs_of_layer(L - 1, r.num_steps, training=True) if tail else 0
    head = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    end = ["norm", head]
    for number in range(config.num_nextn_predict_layers):
        end += ["embed_tokens", f"mtp.{number}", head]
    entrance = forward[:5]
    return forward + tail + end, [*reversed(end), *reversed(tail), *backward, *reversed(entrance)]


def expert_runs(config: ModelConfig) -> list[tuple[int, int, bool]]:
    """For each MoE layer: runs in forward, runs in backward, and whether it is looped."""
    r, found = config.recurrence, list[tuple[int, int, bool]]()
    for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        if not config.is_moe_layer(layer):
            continue
        runs = config.runs_of_layer(layer, r.num_steps, training=True)
        inside = layer < config.num_hidden_layers and r.placement == "block"
        looped = inside and r.range_of(layer, config.num_hidden_layers) is not None
        cut = min(r.backprop_steps or runs, runs) if looped else runs
        found.append((runs, cut, looped))
    return found


def rank_shares(loads: Loads, ep: int) -> Loads:
    """For each MoE layer, each rank's tokens as a multiple of an even load."""
    experts = len(loads[0]) // ep
    return [
        [ep * sum(layer[i : i + experts]) / sum(layer) for i in range(0, len(layer), experts)]
        for layer in loads
    ]


def _all_to_all(
    config: ModelConfig, layout: Layout, loads: Loads | None, ep_rank: int | None
) -> list[Collective]:
    """Rows to their experts and back, preceded by their counts (int64)."""
    runs = expert_runs(config)
    shares = [[1.0] * layout.ep for _ in runs] if loads is None else rank_shares(loads, layout.ep)
    rows = layout.micro_tokens * config.positions_per_token * config.num_experts_per_tok
    row_bytes = config.hidden_size * layout.element_bytes
    sent = dict.fromkeys(("forward", "backward"), 0.0)
    calls = dict.fromkeys(sent, 0)
    for (forward, backward, looped), share in zip(runs, shares, strict=True):
        received = max(share) if ep_rank is None else share[ep_rank]
        there_and_back = rows * (1 + received) * row_bytes
        counts = 8 * config.n_routed_experts
        again = recomputes(layout.checkpointing, looped) * backward
        sent["forward"] += forward * (there_and_back + counts)
        sent["backward"] += backward * there_and_back + again * (there_and_back + counts)
        calls["forward"] += 3 * forward
        calls["backward"] += 2 * backward + 3 * again
    times = layout.accumulation
    return [
        Collective("all_to_all_single", "expert", phase, sent[phase] * times, calls[phase] * times)
        for phase in sent
    ]


def recomputes(checkpointing: str, looped: bool) -> bool:
    """Whether backward recomputes a layer's forward pass."""
    return checkpointing in ("block", "selective") or (checkpointing == "iteration" and looped)
