"""Parameters and FLOPs of a config, from its sizes alone."""

from model.cache import slot_of
from model.config.model import ModelConfig


def num_parameters(config: ModelConfig, active: bool = False) -> int:
    """Distinct parameters, including those of multi-token prediction and latent thoughts.

    Args:
        active: those that one token uses to predict the next: only its own experts, no multi-token
            prediction, no latent thoughts; loops counted once.
    """
    d = config.hidden_size
    experts = config.num_experts_per_tok if active else config.n_routed_experts
    total = (1 if config.tie_word_embeddings else 2) * config.vocab_size * d + _layer_norm(config)
    total += config.max_position_embeddings * d if config.learned_positions else 0
    total += sum(_layer_parameters(config, i, experts) for i in range(config.num_hidden_layers))
    total += _recurrence_parameters(config)
    total += (config.embedding_mixing + config.num_pause_tokens + config.num_memory_tokens) * d
    if not active:
        module = (
            _layer_parameters(config, config.num_hidden_layers, experts) + 3 * _layer_norm(config) + 2 * d * d
        )
        total += config.num_nextn_predict_layers * module
        total += _thought_parameters(config)
    return total


def flops_per_token(config: ModelConfig, sequence_length: int, num_steps: int | None = None) -> float:
    """Forward FLOPs per token to predict the next, with attention over the full sequence (PaLM, appendix B).

    Args:
        sequence_length: tokens attended to.
        num_steps: loop steps; default: the config's.
    """
    steps = num_steps or config.recurrence.num_steps
    return _forward_flops(config, sequence_length, steps, training=False)


def training_flops_per_token(
    config: ModelConfig, sequence_length: int, num_steps: int | None = None
) -> float:
    """FLOPs per token of forward and backward (twice the forward), including multi-token prediction."""
    d = config.hidden_size
    module = _layer_flops(config, config.num_hidden_layers, sequence_length)
    module += 2.0 * (2 * d * d + config.vocab_size * d)
    steps = num_steps or config.recurrence.num_steps
    forward = _forward_flops(config, sequence_length, steps, training=True)
    forward += config.num_nextn_predict_layers * module
    cut = config.recurrence.backprop_steps
    if cut is None or cut >= steps:
        return 3 * forward
    # The steps that truncated back-propagation leaves out have no backward pass.
    one, two = (_forward_flops(config, sequence_length, n, training=True) for n in (1, 2))
    return 3 * forward - 2 * (steps - cut) * (two - one)


def recomputed_flops_per_token(
    config: ModelConfig, checkpointing: str, sequence_length: int, num_steps: int | None = None
) -> float:
    """Forward FLOPs per token that a training step computes a second time.

    Args:
        checkpointing: see execution.ExecutionConfig. `selective` keeps all matrix products and attention.
    """
    r, steps = config.recurrence, num_steps or config.recurrence.num_steps
    steps = min(steps, r.backprop_steps or steps)  # nothing without gradients is computed twice
    units = 2.0 * _recurrence_weights(config) * steps
    if checkpointing == "iteration":
        if r.placement != "block":
            return units
        layers = range(config.num_hidden_layers)
        looped = [i for i in layers if r.range_of(i, config.num_hidden_layers) is not None]
        return units + sum(_layer_flops(config, i, sequence_length) for i in looped) * steps
    if checkpointing != "block":
        return 0.0
    positions, length = _positions_per_token(config, sequence_length)
    total = 0.0 if r.placement == "block" else units + 2.0 * _key_weights(config)  # inside the layers
    for layer in range(config.num_hidden_layers):
        runs = config.runs_of_layer(layer, steps, training=True)
        total += _layer_flops(config, layer, length) * runs * positions
    module = _layer_flops(config, config.num_hidden_layers, length) + 4.0 * config.hidden_size**2
    return total + config.num_nextn_predict_layers * module


def cached_numbers(config: ModelConfig, num_steps: int | None = None) -> int:
    """Keys and values, or latents, that decoding keeps per token, over all layers and loop steps."""
    r, steps = config.recurrence, num_steps or config.recurrence.num_steps
    width = (
        config.kv_lora_rank + config.qk_rope_head_dim
        if config.use_mla
        else 2 * config.kv_heads * config.plain_head_dim
    )
    slots = 1 + slot_of(r, steps - 1)
    runs = [min(config.runs_of_layer(i, steps), slots) for i in range(config.num_hidden_layers)]
    return sum(runs) * width * config.positions_per_token


def _forward_flops(config: ModelConfig, sequence_length: int, steps: int, training: bool) -> float:
    readouts = steps if training and config.recurrence.expectation == "loss" else 1
    total = 2.0 * config.vocab_size * config.hidden_size * readouts
    total += 2.0 * (_recurrence_weights(config) * steps - _first_gates(config) + _key_weights(config))
    positions, length = _positions_per_token(config, sequence_length)
    for layer in range(config.num_hidden_layers):
        runs = config.runs_of_layer(layer, steps, training)
        total += _layer_flops(config, layer, length) * runs * positions
    return total


def _positions_per_token(config: ModelConfig, sequence_length: int) -> tuple[float, float]:
    """Positions that the layers compute per token, and the mean number of positions they attend to."""
    if config.segment_length is None:
        factor = config.positions_per_token
        return factor, factor * sequence_length
    full, rest = divmod(sequence_length, config.segment_length)
    lengths = [config.segment_length] * full + [rest] * (rest > 0)
    segments = [n + 2 * config.num_memory_tokens for n in lengths]
    return sum(segments) / sequence_length, sum(n * n for n in segments) / sum(segments)


def _layer_parameters(config: ModelConfig, layer: int, experts: int) -> int:
    norms = 2 * _layer_norm(config)
    if config.use_mla:
        norms += _norm(config, config.kv_lora_rank) * config.latent_norm
        norms += _norm(config, config.q_lora_rank or 0)
    elif config.qk_norm:
        norms += 2 * _norm(config, config.plain_head_dim)
    weights = _attention_weights(config) + _feed_forward_weights(config, layer, experts)
    return norms + weights + _biases(config)


def _layer_flops(config: ModelConfig, layer: int, sequence_length: float) -> float:
    weights = _attention_weights(config) + _feed_forward_weights(config, layer, config.num_experts_per_tok)
    widths = config.qk_head_dim + config.v_head_dim if config.use_mla else 2 * config.plain_head_dim
    return 2.0 * (weights + sequence_length * config.num_attention_heads * widths)


def _norm(config: ModelConfig, width: int) -> int:
    return width if config.rms_norm_affine else 0


def _layer_norm(config: ModelConfig) -> int:
    """Parameters of one norm of hidden states, see layers.layer_norm."""
    return 2 * config.hidden_size if config.norm == "layer_norm" else _norm(config, config.hidden_size)


def _biases(config: ModelConfig) -> int:
    """Biases of a layer's attention and its feed-forward layer without a gate."""
    if config.qkv_bias and config.use_mla:
        return config.num_attention_heads * config.qk_head_dim + config.kv_lora_rank + config.qk_rope_head_dim
    heads = config.num_attention_heads + 2 * config.kv_heads
    outputs = heads * config.plain_head_dim
    if config.use_bias:
        return outputs + config.intermediate_size + 2 * config.hidden_size
    return outputs if config.qkv_bias else 0


def _attention_weights(config: ModelConfig) -> int:
    d, h = config.hidden_size, config.num_attention_heads
    if not config.use_mla:
        return d * config.plain_head_dim * 2 * (h + config.kv_heads)
    if config.q_lora_rank is None:
        query = d * h * config.qk_head_dim
    else:
        query = d * config.q_lora_rank + config.q_lora_rank * h * config.qk_head_dim
    latent = d * (config.kv_lora_rank + config.qk_rope_head_dim)
    key_value = config.kv_lora_rank * h * (config.qk_nope_head_dim + config.v_head_dim)
    return query + latent + key_value + h * config.v_head_dim * d


def _feed_forward_weights(config: ModelConfig, layer: int, experts: int) -> int:
    d = config.hidden_size
    if not config.is_moe_layer(layer):
        return (3 if config.hidden_act == "silu" else 2) * d * config.intermediate_size
    expert = 3 * d * config.moe_intermediate_size
    return (experts + config.n_shared_experts) * expert + d * config.n_routed_experts


def _thought_parameters(config: ModelConfig) -> int:
    d, thoughts = config.hidden_size, config.latent_cot
    return d * thoughts.has_embedding + (2 * d * d + 4 * d) * thoughts.projects


def _units(config: ModelConfig) -> tuple[int, int]:
    """How many Latent Reasoning Units a model has, and the width of their state."""
    r = config.recurrence
    ranges = r.layer_ranges(config.num_hidden_layers)
    if r.placement == "block":
        return len(ranges), config.hidden_size
    width = config.kv_lora_rank if r.placement == "kv" else config.hidden_size
    return sum(last - first + 1 for first, last in ranges), width


def _halting_heads(config: ModelConfig) -> int:
    """Halting logits per unit."""
    return len(config.recurrence.halting.heads)


def _recurrence_weights(config: ModelConfig) -> int:
    """Matrix weights of all units that are used once per step; the query's projection runs once per pass."""
    (units, width), r = _units(config), config.recurrence
    matrices = (r.injection in ("concat", "gate")) + (r.update != "simple")
    total = matrices * 2 * width * width + _halting_heads(config) * width
    if r.token_local:
        total += 3 * width * (r.latent_intermediate_size or 2 * width)
    return units * total


def _first_gates(config: ModelConfig) -> int:
    """Weights of the gates that update=retrofit leaves out in the first step."""
    units, width = _units(config)
    return units * 2 * width * width if config.recurrence.update == "retrofit" else 0


def _key_weights(config: ModelConfig) -> int:
    """Matrix weights of units inside attention that are used once per pass: queries in, keys out."""
    (units, width), r = _units(config), config.recurrence
    query = config.num_attention_heads * (config.qk_head_dim if config.use_mla else config.plain_head_dim)
    total = query * width if r.query_conditioned else 0
    if r.placement == "kv":
        rotary = config.kv_lora_rank * config.qk_rope_head_dim
        total += 0 if r.key_source == "hidden" else rotary
        if r.key_source == "latent":  # replaces the key from the hidden state
            total -= (config.hidden_size + config.qkv_bias) * config.qk_rope_head_dim
    return units * total


def _recurrence_parameters(config: ModelConfig) -> int:
    (units, width), r = _units(config), config.recurrence
    vectors = (r.output_norm + r.state_norm) * _norm(config, width) + _halting_heads(config)
    vectors += width * ((r.injection == "gate") + (r.update != "simple") + r.iteration_embedding)
    if r.token_local:
        vectors += _norm(config, width) + width * r.position_mixing
    if r.sandwich_norm:
        looped = sum(last - first + 1 for first, last in r.layer_ranges(config.num_hidden_layers))
        vectors += 2 * _layer_norm(config) * looped // units
    return _recurrence_weights(config) + _key_weights(config) + units * vectors
