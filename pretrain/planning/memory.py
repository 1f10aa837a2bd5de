"""Bytes of memory that a training run needs on each GPU, part by part.

The partitions of parameters, gradients and optimizer are exact (tests/pretrain/test_plan.py compares them
with DeepSpeed's on 2 and 4 ranks). Activations count what autograd saves in a layer, within 10% of what
the same test counts on a CPU. Gathered parameters, buckets and temporaries follow the source, unmeasured.
"""

import math

from model import ModelConfig
from pretrain.planning.communication import Gathering, expert_runs, recomputes
from pretrain.planning.layout import Layout, Part

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
        "gradients": width * gradients,
        "optimizer": (4 + 4 + 4) * shard,  # fp32 weight and AdamW's two moments
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
) -> dict[str, int]:
    """Bytes on a GPU at the peak, either in backward or in the optimizer's step.

    Args:
        gathering: ZeRO-3's; None for the other stages.
        skew: the most loaded rank's tokens as a multiple of an even load.
        trained: see partitions.
    """
    kept, width = partitions(parts, layout, trained), layout.element_bytes
    learned = parts if trained is None else trained
    shard = kept["optimizer"] // 12
    # AdamW's fp32 gradient and one temporary of its foreach update.
    step = {"optimizer step": 8 * shard}
    rows = layout.micro_tokens * config.positions_per_token * config.num_experts_per_tok
    buckets = 1 if layout.stage == 3 else 2  # stages 1 and 2 fill one while the other is sent
    # setup.prepare makes them no larger than the model.
    bucket = min(layout.zero.reduce_bucket_size, sum(part.held(1) for part in parts.values()))
    vocabulary = config.vocab_size
    logit_rows = min(LOGIT_ROWS, layout.micro_tokens)
    backward = {
        "gradient buckets": int(buckets * width * bucket),
        "gathered parameters": width * gathering.peak_elements if gathering else 0,
        "largest layer's gradient": width * max(part.held(layout.ep) for part in learned.values()),
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
    r = c.recurrence
    if r.token_local and r.range_of(layer, c.num_hidden_layers) is not None:
        inner = c.kv_lora_rank if r.placement == "kv" else d
        core = 2 * (r.latent_intermediate_size or 2 * inner)
        saved["latent loop"] = float(r.num_steps * (_unit(config, inner) + core))
    if not c.is_moe_layer(layer):
        saved["feed-forward"] = 2.0 * c.intermediate_size
        return saved
    k, f = c.num_experts_per_tok, c.moe_intermediate_size
    wide = 4 / element_bytes
    saved["router"] = (wide * d if wide > 1 else 0) + wide * (2 * k + c.n_routed_experts)  # its input in fp32
    saved["experts"] = k * (skew * (d + 2.0 * f) + d)
    saved["shared experts"] = 2.0 * c.n_shared_experts * f
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
