"""Import of Hugging Face folders of GPT-2, Llama, Mistral, Qwen2 and Qwen3: plain attention, dense layers.

Their values and names, GPT-2's transposed matrices, and the halves that Llama rotates where this network
rotates neighbours, follow transformers' configuration_*.py and modeling_*.py. Dropout is left out. The
embedding, and an untied head, get rows for the special tokens that special_tokens.py adds.

Shapes: D hidden, V vocabulary.
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.schema import as_type
from model.config.model import ModelConfig
from model.export_files import CONFIG_NAME
from model.hf.files import FIX, check_config, read_fields, read_headers, read_weights, take
from model.hf.rope import llama_rope
from model.hf.special_tokens import VOCAB_SIZE, SpecialTokens, add_special_tokens, changes_of_texts
from model.transformer import ZeroModel
from model.weight_files import check_size

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NOISE_SEED = 0

_GPT2_FIXED: dict[str, Any] = {
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
_GPT2_TOP = {"wte": "embed_tokens", "wpe": "embed_positions", "ln_f": "norm"}
_GPT2_LAYER = {
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
_GPT2_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "initializer_range": "initializer_range",
    "rms_norm_eps": "layer_norm_epsilon",
    "tie_word_embeddings": "tie_word_embeddings",
}
_GPT2_DEFAULTS: dict[str, Any] = {
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class LlamaKind:
    """What a relative of Llama has of its own."""

    name: str
    fixed: dict[str, Any] = field(default_factory=dict)  # see check_config
    defaults: dict[str, Any] = field(default_factory=dict)  # what transformers takes for an absent key
    switches: dict[str, Any] = field(default_factory=dict)  # values of ModelConfig
    window: str = "never"  # whether sliding_window is read: always | switched by use_sliding_window | never


_LLAMA_FIXED: dict[str, Any] = {"hidden_act": "silu"}
_LLAMA_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_LLAMA_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "num_key_value_heads": None,
    "head_dim": None,
}
_QWEN_DEFAULTS: dict[str, Any] = {"max_position_embeddings": 32768, "num_key_value_heads": 32}
LLAMA_KINDS = {  # by model_type
    "llama": LlamaKind("Llama", fixed={"attention_bias": False, "mlp_bias": False}),
    "mistral": LlamaKind(
        "Mistral", defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8}, window="always"
    ),
    "qwen2": LlamaKind("Qwen2", defaults=_QWEN_DEFAULTS, switches={"qkv_bias": True}, window="switched"),
    "qwen3": LlamaKind(
        "Qwen3",
        fixed={"attention_bias": False},
        defaults=_QWEN_DEFAULTS | {"head_dim": 128},
        switches={"qk_norm": True},
        window="switched",
    ),
}
REFUSED = {  # kinds that are asked for, and what this network does not compute
    "smollm3": "has layers without rotation (no_rope_layers), but all layers rotate here",
    "olmo2": (
        "has norms behind attention and feed-forward layers (post_feedforward_layernorm) and over all heads "
        "together (q_norm), but they lie before them and span one head here"
    ),
}


def gpt2_config(values: dict[str, Any]) -> ModelConfig:
    """The config for GPT-2's config.json.

    Raises:
        ValueError: a size is missing, or this network does not compute this model.
    """
    if values.get("activation_function") == "gelu_pytorch_tanh":  # the same function
        values = {**values, "activation_function": "gelu_new"}
    kind = "GPT-2"
    check_config(values, kind, _GPT2_FIXED)
    given = read_fields(values, kind, _GPT2_NAMES, _GPT2_DEFAULTS)
    inner = as_type(int | None, values.get("n_inner"), "config.json: n_inner")
    return ModelConfig.from_dict(
        {
            **given,
            "norm": "layer_norm",
            "position_embedding": "learned",
            "use_bias": True,
            "use_mla": False,
            "use_moe": False,
            "hidden_act": "gelu",
            "intermediate_size": 4 * given["hidden_size"] if inner is None else inner,
        }
    )


def llama_config(values: dict[str, Any]) -> ModelConfig:
    """The config for config.json of a model_type in LLAMA_KINDS.

    Raises:
        ValueError: a size is missing, or this network does not compute this model.
    """
    kind = LLAMA_KINDS[values["model_type"]]
    check_config(values, kind.name, _LLAMA_FIXED | kind.fixed)
    defaults = _LLAMA_DEFAULTS | kind.defaults
    given = read_fields(values, kind.name, {name: name for name in (*_LLAMA_SIZES, *defaults)}, defaults)
    theta, scaling = llama_rope(values)
    config = ModelConfig.from_dict(
        {
            **given,
            **kind.switches,
            "rope_theta": theta,
            "rope_scaling": scaling,
            "use_mla": False,
            "use_moe": False,
        }
    )
    _check_window(values, kind, config)
    return config


def _check_window(values: dict[str, Any], kind: LlamaKind, config: ModelConfig) -> None:
    """Raises ValueError if a layer attends to a window that is shorter than the context.

    Defaults are transformers': a window of 4096 tokens, which Qwen's layers from number 28 on have if
    use_sliding_window says so.
    """
    if kind.window == "never":
        return
    window = as_type(int | None, values.get("sliding_window", 4096), "config.json: sliding_window")
    named = as_type(list[str] | None, values.get("layer_types"), "config.json: layer_types")
    if odd := set(named or ()) - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"config.json: layer_types has {min(odd)!r}, but only full_attention is supported for "
            f"{kind.name}; choose another checkpoint"
        )
    slides, listed = True, "sliding_attention" in (named or ())
    if kind.window == "switched":
        if not as_type(bool, values.get("use_sliding_window", False), "config.json: use_sliding_window"):
            window = None
        first = as_type(int, values.get("max_window_layers", 28), "config.json: max_window_layers")
        slides = first < config.num_hidden_layers if named is None else listed
    if listed and window is None:
        raise ValueError(f"config.json: layer_types has 'sliding_attention', but no window is set; {FIX}")
    length = config.max_position_embeddings
    if slides and window is not None and window < length:
        raise ValueError(
            f"config.json has sliding_window={window}, below max_position_embeddings={length}, but attention "
            "reaches back to the first token here; choose another checkpoint, or lower "
            f"max_position_embeddings to {window} if no text is longer"
        )


def gpt2_state(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2's tensors under ZeroModel's names.

    Raises:
        ValueError: see _complete.
    """
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        name = name.removeprefix("transformer.")  # absent from the folders of 2019
        match = re.fullmatch(r"(?:h\.(\d+)\.)?(.+)\.(weight|bias)", name)
        if match is None or re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name):  # masks
            continue
        layer, part, kind = match.groups()
        if layer is None:
            found[f"model.{_GPT2_TOP[part]}.{kind}" if part in _GPT2_TOP else name] = value
            continue
        prefix = f"model.layers.{layer}"
        value = value.T if value.dim() == 2 else value  # (in, out) on disk
        if part == "attn.c_attn":
            for third, projection in zip(value.tensor_split(3), ("q_proj", "k_proj", "v_proj"), strict=True):
                found[f"{prefix}.self_attn.{projection}.{kind}"] = third.clone()
        else:
            found[f"{prefix}.{_GPT2_LAYER.get(part, part)}.{kind}"] = value
    return _complete(config, found)


def llama_state(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a relative of Llama, already under ZeroModel's names, with pairs (2i, 2i+1) for the halves
    (i, i + R/2) of a head: in rows and biases of queries and keys, and in the norms of a head.

    Raises:
        ValueError: see _complete.
    """
    found = {name: value for name, value in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    state = _complete(config, found)
    for name, value in state.items():
        if re.search(r"self_attn\.[qk]_(proj|norm)\.(weight|bias)$", name):
            halves = value.unflatten(0, (-1, 2, config.plain_head_dim // 2))
            state[name] = halves.transpose(1, 2).flatten(0, 2)
    return state


def _complete(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's state.

    Raises:
        ValueError: a tensor is missing, has another shape, or does not belong to the model.
    """
    with torch.device("meta"):
        expected = ZeroModel(config).state_dict()
    tied = tensors.pop(HEAD, None) if config.tie_word_embeddings else None
    state = {name: take(tensors, name, like.shape) for name, like in expected.items()}
    if tied is not None and not torch.equal(tied, state[EMBEDDING]):
        raise ValueError(f"{HEAD} differs from {EMBEDDING}, but config.json ties them; fix one of them")
    if tensors:
        raise ValueError(
            f"{len(tensors)} tensors do not belong to the model, {min(tensors)} among them; config.json "
            "describes another model"
        )
    return state


def with_rows(weight: Tensor, tokens: SpecialTokens) -> Tensor:
    """weight (V, D) of embedding or head -> (V', D), with a row for every added special token.

    A new row is the mean of the known tokens' rows plus normal noise with their standard deviation in each
    column, so that new tokens resemble known ones and differ from each other.
    """
    known = weight[: tokens.known].float()
    grown = weight.new_zeros(tokens.ids[VOCAB_SIZE], weight.shape[1])
    grown[: len(weight)] = weight
    generator = torch.Generator().manual_seed(NOISE_SEED)
    noise = torch.randn(len(tokens.added), weight.shape[1], generator=generator)
    grown[tokens.added] = (known.mean(0) + known.std(0) * noise).to(weight.dtype)
    return grown


Importer = tuple[
    Callable[[dict[str, Any]], ModelConfig], Callable[[ModelConfig, dict[str, Tensor]], dict[str, Tensor]]
]
DENSE: dict[str, Importer] = {  # by model_type
    "gpt2": (gpt2_config, gpt2_state),
    **dict.fromkeys(LLAMA_KINDS, (llama_config, llama_state)),
}


def import_dense(values: dict[str, Any], hf: Path) -> tuple[ModelConfig, dict[str, Tensor], bytes | None]:
    """Config, state and the content of the tokenizer file of an export/ folder.

    None: the folder has no tokenizer, and the vocabulary stays as it is.

    Args:
        values: config.json, of a model_type in DENSE.

    Raises:
        ValueError, FileNotFoundError: a file is missing or damaged, or the model is of another kind.
    """
    read_config, read_state = DENSE[values["model_type"]]
    config = read_config(values)
    check_size(config, read_headers(hf), hf / CONFIG_NAME, FIX)
    found = add_special_tokens(hf, values)
    state = read_state(config, dict(read_weights(hf)))
    if found is None:
        return config, state, None
    tokenizer, tokens = found
    if changes := changes_of_texts(tokenizer):
        print(f"note: the tokenizer of {hf} {' and '.join(changes)}", file=sys.stderr)
    for name in (EMBEDDING, HEAD):
        if name in state:
            state[name] = with_rows(state[name], tokens)
    grown = ModelConfig.from_dict({**config.to_dict(), "vocab_size": tokens.ids[VOCAB_SIZE]})
    return grown, state, (json.dumps(tokenizer, indent=2) + "\n").encode()
