"""Import of Hugging Face folders of GPT-2, Llama, Mistral, Qwen2 and Qwen3: plain attention, dense layers.

Their values and names, GPT-2's transposed matrices, and the halves that Llama rotates where this network
rotates neighbours, follow transformers' configuration_*.py and modeling_*.py. Dropout is left out. The
embedding, and an untied head, get rows for the special tokens that special_tokens.py adds.

Shapes: D hidden, V vocabulary.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.schema import as_type
from model.config.model import ModelConfig
from model.export_files import CONFIG_NAME
from model.hf.files import FIX, check_config, open_folder, read_fields
from model.hf.places import Imported, Place, fitted
from model.hf.rope import llama_rope
from model.hf.special_tokens import VOCAB_SIZE, SpecialTokens, add_special_tokens, changes_of_texts
from model.pretrained import shapes
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


def gpt2_places(config: ModelConfig, stored: Iterable[str]) -> dict[str, list[Place]]:
    """Where GPT-2's tensors go; matrices are (in, out) on disk."""
    places: dict[str, list[Place]] = {}
    for name in stored:
        match = re.fullmatch(r"(?:h\.(\d+)\.)?(.+)\.(weight|bias)", name.removeprefix("transformer."))
        if match is None or re.fullmatch(r"(.*\.)?h\.\d+\.attn\.(masked_)?bias", name):  # masks
            places[name] = []
            continue
        layer, part, kind = match.groups()
        if layer is None:
            known = f"model.{_GPT2_TOP[part]}" if part in _GPT2_TOP else part
            places[name] = [Place(f"{known}.{kind}")]
            continue
        prefix = f"model.layers.{layer}"
        if part == "attn.c_attn":
            places[name] = [
                Place(f"{prefix}.self_attn.{projection}.{kind}", change=partial(_third, number))
                for number, projection in enumerate(("q_proj", "k_proj", "v_proj"))
            ]
        else:
            places[name] = [Place(f"{prefix}.{_GPT2_LAYER.get(part, part)}.{kind}", change=_turned)]
    return places


def _turned(value: Tensor) -> Tensor:
    return value.T if value.dim() == 2 else value


def _third(number: int, value: Tensor) -> Tensor:
    return _turned(value).tensor_split(3)[number]


def llama_places(config: ModelConfig, stored: Iterable[str]) -> dict[str, list[Place]]:
    """Where the tensors of a relative of Llama go: under their names, which are ours. The halves (i, i + R/2)
    of a head become pairs (2i, 2i+1), in rows and biases of queries and keys, and in the norms of a head.
    """

    def paired(value: Tensor) -> Tensor:
        halves = value.unflatten(0, (-1, 2, config.plain_head_dim // 2))
        return halves.transpose(1, 2).flatten(0, 2)

    places: dict[str, list[Place]] = {}
    for name in stored:
        if name.endswith("rotary_emb.inv_freq"):
            places[name] = []
        elif re.search(r"self_attn\.[qk]_(proj|norm)\.(weight|bias)$", name):
            places[name] = [Place(name, change=paired)]
        else:
            places[name] = [Place(name)]
    return places


def with_rows(weight: Tensor, tokens: SpecialTokens) -> tuple[Tensor, Tensor]:
    """weight (V, D) of embedding or head -> itself and the rows (V' - V, D) behind it, with a row for every
    added special token; `weight` is changed.

    A new row is the mean of the known tokens' rows plus normal noise with their standard deviation in each
    column, so that new tokens resemble known ones and differ from each other.
    """
    known = weight[: tokens.known].float()
    generator = torch.Generator().manual_seed(NOISE_SEED)
    noise = torch.randn(len(tokens.added), weight.shape[1], generator=generator)
    rows = (known.mean(0) + known.std(0) * noise).to(weight.dtype)
    behind = weight.new_zeros(tokens.ids[VOCAB_SIZE] - len(weight), weight.shape[1])
    for token, row in zip(tokens.added, rows, strict=True):
        target, place = (weight, token) if token < len(weight) else (behind, token - len(weight))
        target[place] = row
    return weight, behind


Importer = tuple[
    Callable[[dict[str, Any]], ModelConfig], Callable[[ModelConfig, Iterable[str]], dict[str, list[Place]]]
]
DENSE: dict[str, Importer] = {  # by model_type
    "gpt2": (gpt2_config, gpt2_places),
    **dict.fromkeys(LLAMA_KINDS, (llama_config, llama_places)),
}


def import_dense(values: dict[str, Any], hf: Path) -> tuple[Imported, bytes | None]:
    """The model, and the content of the tokenizer file of an export/ folder.

    None: the folder has no tokenizer, and the vocabulary stays as it is.

    Args:
        values: config.json, of a model_type in DENSE.

    Raises:
        ValueError, FileNotFoundError: a file is missing or damaged, or the model is of another kind.
    """
    read_config, find_places = DENSE[values["model_type"]]
    config = read_config(values)
    weights = open_folder(hf)
    check_size(config, weights.stored, hf / CONFIG_NAME, FIX)
    found = add_special_tokens(hf, values)
    places = find_places(config, weights.stored)
    tied = HEAD if config.tie_word_embeddings and HEAD in places else None
    if tied is not None:
        places[tied] = []
    planned = fitted(weights.stored, places, shapes(config))
    if tied is not None:
        [embedding] = [name for name, targets in places.items() if Place(EMBEDDING) in targets]
        if not torch.equal(weights.checked(tied), weights.checked(embedding)):
            raise ValueError(f"{HEAD} differs from {EMBEDDING}, but config.json ties them; fix one of them")
    if found is None:
        return Imported(config, weights, places, planned), None
    tokenizer, tokens = found
    if changes := changes_of_texts(tokenizer):
        print(f"note: the tokenizer of {hf} {' and '.join(changes)}", file=sys.stderr)
    for name, targets in places.items():
        if targets and targets[0].name in (EMBEDDING, HEAD):
            target, old = targets[0].name, planned[targets[0].name]
            width = tokens.ids[VOCAB_SIZE]
            planned[target] = old._replace(shape=(width, *old.shape[1:]))
            places[name] = _grown(target, old.shape[0], tokens)
    grown = ModelConfig.from_dict({**config.to_dict(), "vocab_size": tokens.ids[VOCAB_SIZE]})
    return Imported(grown, weights, places, planned), (json.dumps(tokenizer, indent=2) + "\n").encode()


def _grown(name: str, vocabulary: int, tokens: SpecialTokens) -> list[Place]:
    """The places of a tensor (V, D) that gets new rows."""
    return [
        Place(name, 0, lambda weight: with_rows(weight, tokens)[0]),
        Place(name, vocabulary, lambda weight: with_rows(weight, tokens)[1]),
    ]
