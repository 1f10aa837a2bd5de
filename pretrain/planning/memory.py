"""Bytes of memory that a training run needs on each GPU, or in each rank's host memory on CPUs, part by part.

The partitions of parameters, gradients and optimizer are exact (tests/pretrain/test_plan.py compares them
with DeepSpeed's on 2 and 4 ranks). Activations count what autograd saves in a layer, within 10% of what
the same test counts on a CPU. Gathered parameters, buckets and temporaries follow the source, unmeasured.
"""

import math

from model import ModelConfig
from pretrain.planning.communication import Gathering, expert_runs, recomputes
from pretrain.planning.layout import Layout, Part

EXPERT_GROUP = 178_956_971  # elements of a rank's experts that DeepSpeed puts into one group (moe/utils.py)
LOGIT_ROWS = 1024  # of the head at once, see model/losses.chunked_cross_entropy


def partitions(
    parts: dict[str, Part], layout: Layout, trained: dict[str, Part] | None = None
) -> dict[str, int]:
    """Bytes that ZeRO holds throughout: mixed precision with AdamW in fp32.

    Stages 1 and 2 pad their flat groups by a few more elements.

    Args:
        trained: the parts without frozen tensors, which have neither gradients nor optimizer state.
    """
    width, learned = layout.element_bytes, parts if trained is None else trained
    held, shard = sum(part.held(layout.ep) for part in learned.values()), _shard(learned, layout)
    gradients = held if layout.stage == 1 else shard
    whole = sum(part.held(layout.ep) for part in parts.values())
    return {
        "parameters": width * (_shard(parts, layout) if layout.stage == 3 else whole),
        "gradients": (layout.gradient_bytes or width) * gradients,
        "optimizer": (4 + 4 + 4) * shard,  # fp32 weight, also of fp32 parameters, and AdamW's two moments
    }


def _shard(parts: dict[str, Part], layout: Layout) -> int:
    """Elements of a rank's shards."""
    if layout.stage == 3:
        return sum(sum(part.shards(layout).values()) for part in parts.values())
    dense = sum(sum(part.dense) for part in parts.values())
    experts = sum(part.held(layout.ep) for part in parts.values()) - dense
    return math.ceil(dense / layout.gpus) + math.ceil(experts / layout.group("expert_data")[0])


def memory(
    config: ModelConfig,
    parts: dict[str, Part],
    layout: Layout,
    gathering: Gathering | None,
    skew: float,
    trained: dict[str, Part] | None = None,
    cpu: bool = False,
) -> dict[str, int]:
    """Bytes on a GPU at the peak, either in backward or in the optimizer's step.

    Args:
        cpu: of a rank without a GPU, in host memory. torch's AdamW makes two temporaries there, gloo copies
            what it reduces, and most CPUs multiply bf16 weights in fp32.
        gathering: ZeRO-3's; None for the other stages.
        skew: the most loaded rank's tokens as a multiple of an even load.
        trained: see partitions.
    """
    kept, width = partitions(parts, layout, trained), layout.element_bytes
    learned = parts if trained is None else trained
    shard = _shard(learned, layout)
    # AdamW's fp32 gradient and one temporary of its foreach update.
    step = {"optimizer step": 12 * max(_groups(learned, layout)) if cpu else 8 * shard}
    rows = layout.micro_tokens * config.positions_per_token * config.num_experts_per_tok
    buckets = 1 if layout.stage == 3 else 2  # stages 1 and 2 fill one while the other is sent
    # Their type: what is accumulated, computed and reduced under stages 1, 2 and 3. Where they are reduced in
    # another one, the bucket that is sent exists in both. setup.prepare makes them no larger than the model.
    reduced = layout.reduction_bytes or width
    filled = {1: layout.gradient_bytes or width, 2: width, 3: reduced}[layout.stage]
    sent = 0 if filled == reduced else reduced
    bucket = min(layout.zero.reduce_bucket_size, sum(part.held(1) for part in parts.values()))
    vocabulary = config.vocab_size
    logit_rows = min(LOGIT_ROWS, layout.micro_tokens)
    largest = max(part.held(layout.ep) for part in learned.values())
    backward = {
        "gradient buckets": int((buckets * filled + sent + 2 * cpu * reduced) * bucket),
        "gathered parameters": width * gathering.peak_elements if gathering else 0,
        # On a CPU also its weights and their gradient in fp32.
        "largest layer's gradient": (width + (8 if cpu and width == 2 else 0)) * largest,
        "activations": activation_bytes(config, layout, skew),
        # Logits in `width`, in fp32 and their error in `width`; the head's gradient waits in fp32.
        "logits and head": logit_rows * vocabulary * (4 + 2 * width) + 4 * vocabulary * config.hidden_size,
        # Rows permuted, sent and received at once.
        "all-to-all": int(rows * (1 + 2 * skew) * config.hidden_size * width) if layout.ep > 1 else 0,
    }
    # The buckets stay allocated through the step.
    step["gradient buckets"] = backward["gradient buckets"]
    fullest = max((backward, step), key=lambda moment: sum(moment.values()))
    return kept | {name: value for name, value in fullest.items() if value}


def start_memory(
    parts: dict[str, Part],
    layout: Layout,
    trained: dict[str, Part] | None = None,
    given: bool = False,
    cpu: bool = False,
) -> dict[str, int]:
    """Bytes on a GPU at the peak before the first step; AdamW's moments come in that step.

    Args:
        trained: see partitions.
        given: whether the weights are those of --init.
        cpu: of a rank without a GPU, in host memory.
    """
    width, learned = layout.element_bytes, parts if trained is None else trained
    kept = partitions(parts, layout, trained)
    weights, groups = kept["parameters"], _groups(learned, layout)
    masters = 4 * sum(groups)
    one = host_start(parts, layout, given) if cpu else width * largest_tensor(parts, layout)
    moments = [{"one tensor": one}]
    if layout.stage == 3:
        # DeepSpeed clones a group's fp32 weights, and makes it a gradient, before it keeps the partitions'.
        moments.append({"fp32 weights": masters, "a group's fp32 copy": 4 * max(groups)})
        # Last it gathers one parameter after another, which gloo copies.
        gathered = (1 + cpu) * width * largest_tensor(parts, layout)
        held = {"fp32 weights": masters, "gradients": kept["gradients"]}
        moments.append({**held, "one tensor gathered": gathered})
    else:
        # It flattens a group of weights by copying it, and makes an fp32 gradient of every partition.
        moments.append({"a group's weights again": width * max(_groups(learned, layout, whole=True))})
        moments.append({"fp32 weights": masters, "fp32 gradients": masters})
    fullest = max(moments, key=lambda moment: sum(moment.values()))
    return {"parameters": weights} | {name: value for name, value in fullest.items() if value}


def host_start(parts: dict[str, Part], layout: Layout, given: bool = False) -> int:
    """Bytes of host memory in which a rank makes its largest tensor, see pretrain/building.py.

    A 16-bit tensor is rounded from fp32 values; of experts, one expert at a time has them. Given weights are
    read whole, here taken to be stored in fp32.
    """
    width = layout.element_bytes
    made = [n * (width if width == 4 else width + 4) for part in parts.values() for n in part.dense]
    made += [n // layout.ep * width for part in parts.values() for n in part.experts]
    if given:
        made = [n * (width + 4) for part in parts.values() for n in part.dense]
        made += [n * 4 + n // layout.ep * width for part in parts.values() for n in part.experts]
    return max(made)


def largest_tensor(parts: dict[str, Part], layout: Layout) -> int:
    """Elements of the largest tensor that a rank holds whole."""
    dense = [n for part in parts.values() for n in part.dense]
    return max(dense + [n // layout.ep for part in parts.values() for n in part.experts])


def _groups(parts: dict[str, Part], layout: Layout, whole: bool = False) -> list[int]:
    """This rank's elements of each group that the optimizer updates at once; whole: of its weights instead.

    Embeddings have no weight decay, and experts are sharded otherwise; vectors are few. DeepSpeed cuts the
    experts into groups of EXPERT_GROUP, and ZeRO-3 each group into those of sub_group_size.
    """
    embeddings = {name: part for name, part in parts.items() if name == "embed_tokens"}
    others = {name: Part(part.dense, (), part.leaf) for name, part in parts.items() if name not in embeddings}
    experts = {name: Part((), part.experts, part.leaf) for name, part in parts.items()}
    ranks = 1 if whole else layout.group("expert_data")[0]
    cut = math.inf if whole or layout.stage < 3 else layout.zero.sub_group_size
    found = []
    for kind, limit in ((embeddings, cut), (others, cut), (experts, min(cut, EXPERT_GROUP // ranks))):
        size = sum(part.held(layout.ep) for part in kind.values()) if whole else _shard(kind, layout)
        while size:
            found.append(int(min(size, limit)))
            size -= found[-1]
    return found


def activation_bytes(config: ModelConfig, layout: Layout, skew: float = 1.0) -> int:
    """Bytes that backward needs of a micro-batch's forward pass, at their peak."""
    tokens, width = layout.micro_tokens * config.positions_per_token, layout.element_bytes
    d, policy = config.hidden_size, layout.checkpointing
    total, working, looped_working = 0.0, 0.0, 0.0
    runs = {layer: run for layer, run in zip(_moe_layers(config), expert_runs(config), strict=True)}
    r, L = config.recurrence, config.num_hidden_layers
    for layer in range(L + config.num_nextn_predict_layers):
        looped = layer < L and r.placement == "block" and r.range_of(layer, L) is not None
        times = runs[layer][1] if layer in runs else _backward_runs(config, layer, looped)
        everything = sum(saved_elements(config, layer, skew, width).values())
        if not recomputes(policy, looped):
            total += times * everything
        elif policy == "iteration":
            looped_working += everything
        else:
            products = saved_products(config, layer, skew) if policy == "selective" else 0.0
            total += times * (d + products)
            working = max(working, everything)
    if r.placement == "block":
        total += len(r.layer_ranges(L)) * min(r.backprop_steps or r.num_steps, r.num_steps) * _unit(config, d)
    return int((total + max(working, looped_working) + 3 * d) * tokens * width)


def _moe_layers(config: ModelConfig) -> list[int]:
    layers = range(config.num_hidden_layers + config.num_nextn_predict_layers)
    return [layer for layer in layers if config.is_moe_layer(layer)]


def _backward_runs(config: ModelConfig, layer: int, looped: bool) -> int:
    r = config.recurrence
    if layer >= config.num_hidden_layers:
        return 1
    runs = config.runs_of_layer(layer, r.num_steps, training=True)
    return min(r.backprop_steps or runs, runs) if looped else runs


def saved_elements(
    config: ModelConfig, layer: int, skew: float = 1.0, element_bytes: int = 2
) -> dict[str, float]:
    """Elements saved per token in one run of a layer, by kind; without weights and indices.

    fp32 tensors of a 16-bit model count double. Norms are fused, as on a GPU.
    """
    c, d, h = config, config.hidden_size, config.num_attention_heads
    if c.use_mla:
        query = (c.q_lora_rank or 0) * 2 + h * c.qk_head_dim
        attention = query + 2 * c.kv_lora_rank + h * (c.qk_head_dim + c.v_head_dim)
        out = h * c.v_head_dim
    else:
        attention = (h + 2 * c.kv_heads) * c.plain_head_dim
        out = h * c.plain_head_dim
    saved = {"norms": 4.0 * d, "attention": float(attention), "attended": float(out)}
    if c.qk_norm and c.use_mla:  # what q_norm reads and, where k_norm scales it, gives; what 1/rms multiplies
        up = h * (c.qk_nope_head_dim + c.v_head_dim)
        saved["norms"] += h * c.qk_head_dim * (1 + c.rms_norm_affine) + up + c.qk_rope_head_dim + 2 * h
    elif c.qk_norm:
        saved["norms"] += (h + c.kv_heads) * c.plain_head_dim
    r = c.recurrence
    if r.token_local and r.range_of(layer, c.num_hidden_layers) is not None:
        inner = c.kv_lora_rank if r.placement == "kv" else d
        core = 2 * (r.latent_intermediate_size or 2 * inner)
        saved["latent loop"] = float(r.num_steps * (_unit(config, inner) + core))
    # Squared ReLU keeps up alone. The others keep gate and up, or what goes into an activation and comes out.
    matrices = 1.0 if c.hidden_act == "relu2" and not c.use_bias else 2.0
    if not c.is_moe_layer(layer):
        saved["feed-forward"] = matrices * c.intermediate_size
        return saved
    k, f = c.num_experts_per_tok, c.moe_intermediate_size
    wide = 4 / element_bytes
    saved["router"] = (wide * d if wide > 1 else 0) + wide * (2 * k + c.n_routed_experts)  # its input in fp32
    saved["experts"] = k * (skew * (d + matrices * f) + d)
    saved["shared experts"] = matrices * c.n_shared_experts * f
    return saved


def _unit(config: ModelConfig, width: int) -> int:
    """Elements saved per token in one step of a Latent Reasoning Unit, without its core.

    The state, its norm's input, and the measure of its change; the input of each two-input matrix; for a gate
    also its value and what it weighs.
    """
    r = config.recurrence
    return width * (3 + r.state_norm + 4 * (r.update != "simple") + 2 * (r.injection in ("concat", "gate")))


def saved_products(config: ModelConfig, layer: int, skew: float = 1.0) -> float:
    """Elements saved per token under checkpointing=selective: results of matrix products and attention."""
    saved, d = saved_elements(config, layer, skew), config.hidden_size
    kept = saved["attention"] + saved["attended"] + d  # d: the output projection's
    if "experts" not in saved:
        return kept + saved["feed-forward"] + d
    return kept + saved["experts"] + saved["shared experts"] + d + 2 * config.n_routed_experts
