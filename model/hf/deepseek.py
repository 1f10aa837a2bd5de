"""Export to and import from Hugging Face's DeepseekV3 format; dense models go on to dense.py.

Without recurrence a ZeroModel is a DeepSeek-V3, and only two kinds of names differ: experts are stacked as
w1, w3, w2 (gate, up, down), and multi-token prediction has modules of its own. transformers reports those
modules as unexpected, so they go into a file that it does not read; vLLM reads it.

Shapes: E experts, D hidden, V vocabulary.
"""

import dataclasses
import re
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.files import write_file, write_json
from common.schema import as_type
from model.config.model import ModelConfig
from model.config.rope import Llama3RopeConfig
from model.export_files import (
    CONFIG_NAME,
    TOKENIZER_NAME,
    TRAINING_DATA_NAME,
    WEIGHTS_NAME,
    load_config,
    save_weights,
)
from model.hf.card import write_card
from model.hf.dense import DENSE, REFUSED, import_dense
from model.hf.files import (
    FIX,
    MTP_NAME,
    check_config,
    read_fields,
    read_headers,
    read_json,
    read_weights,
    take,
)
from model.hf.folder import refuse_stale_weights, remove_old, writing
from model.hf.own import export_own, import_own
from model.hf.remote.section import MODEL_TYPE
from model.hf.rope import deepseek_rope
from model.hf.shards import DEFAULT_SIZE, size_in_bytes
from model.hf.tokenizer import BOS_TOKEN_ID, EOS_TOKEN_ID, PAD_TOKEN_ID
from model.hf.tokenizer_export import ENDS, export_tokenizer
from model.pretrained import load_pretrained
from model.transformer import ZeroModel
from model.weight_files import check_size, save_tensors

OWN_CONFIG = "zeromodel"  # key of config.json that keeps what the format has no name for

# Fields of the same name and meaning on both sides.
_SHARED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_shared_experts",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
    "num_nextn_predict_layers",
)
# Fields with the only value that this network computes.
_FIXED: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
}
_PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_MTP_PARTS = {"norm.": "shared_head.norm.", "layer.": "", "enorm.": "enorm.", "hnorm.": "hnorm."}


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of the Hugging Face folder, with the keys that transformers and vLLM read.

    Raises:
        ValueError: the format cannot express this model.
    """
    if (what := beyond_deepseek(config)) is not None:
        raise ValueError(f"the DeepseekV3 format cannot express {what}; only models without it export")
    dense = config.first_k_dense_replace if config.use_moe else config.num_hidden_layers
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        **_FIXED,
        **{name: getattr(config, name) for name in _SHARED},
        "num_key_value_heads": config.num_attention_heads,
        "first_k_dense_replace": dense,
        "rope_theta": config.rope_theta,
        "rope_scaling": _hf_rope_scaling(config),
        "attention_dropout": 0.0,
        "ep_size": 1,
        "use_cache": True,
        "bos_token_id": BOS_TOKEN_ID,
        "eos_token_id": EOS_TOKEN_ID,
        "pad_token_id": PAD_TOKEN_ID,
        "torch_dtype": "float32",
        OWN_CONFIG: config.to_dict(),
    }


def beyond_deepseek(config: ModelConfig) -> str | None:
    """What of a model the DeepseekV3 format cannot express; None: nothing."""
    refusals = (
        (config.recurrence.placement != "none", f"recurrence.placement={config.recurrence.placement}"),
        (config.embedding_mixing > 0, f"embedding_mixing={config.embedding_mixing}"),
        (config.num_pause_tokens > 0, f"num_pause_tokens={config.num_pause_tokens}"),
        (config.num_memory_tokens > 0, f"num_memory_tokens={config.num_memory_tokens}"),
        (config.latent_cot.num_latents > 0, f"latent_cot.num_latents={config.latent_cot.num_latents}"),
        (not config.use_mla, "use_mla=false"),
        (config.hidden_act != "silu", f"hidden_act={config.hidden_act}"),
        (config.qk_norm, "qk_norm=true"),
        (not config.rms_norm_affine, "rms_norm_affine=false"),
        (config.tie_word_embeddings, "tie_word_embeddings=true"),
        (config.qkv_bias, "qkv_bias=true"),
        (not config.latent_norm, "latent_norm=false"),
        (config.rope_pairs is not None, f"rope_pairs={config.rope_pairs}"),
        (isinstance(config.rope_scaling, Llama3RopeConfig), "rope_scaling.rope_type=llama3"),
        (
            not config.is_moe_layer(config.num_hidden_layers) and config.num_nextn_predict_layers > 0,
            "multi-token prediction with a dense layer",
        ),
    )
    return next((what for refused, what in refusals if refused), None)


def _hf_rope_scaling(config: ModelConfig) -> dict[str, Any] | None:
    yarn = config.rope_scaling  # latent attention allows nothing else
    return None if yarn is None else {"rope_type": "yarn", **dataclasses.asdict(yarn)}


def config_from_hf(values: dict[str, Any]) -> ModelConfig:
    """The config of a Hugging Face folder; if hf_config wrote it, exactly the one that it was given.

    Raises:
        ValueError: another kind of model, or one that this network does not compute.
    """
    kind = "DeepseekV3"
    check_config(values, kind, _FIXED)
    names = (*_SHARED, "first_k_dense_replace")
    given = read_fields(values, kind, {name: name for name in names}, _DEFAULTS)
    heads = given["num_attention_heads"]
    if values.get("num_key_value_heads", heads) != heads:
        raise ValueError(
            f"config.json has num_key_value_heads={values['num_key_value_heads']!r}, but latent attention "
            f"has as many as num_attention_heads={heads}; choose another checkpoint"
        )
    if OWN_CONFIG in values:
        if not isinstance(values[OWN_CONFIG], dict):
            raise ValueError(f"config.json: {OWN_CONFIG}={values[OWN_CONFIG]!r} is not a section; delete it")
        own = ModelConfig.from_stored(values[OWN_CONFIG])
        written = hf_config(own)
        for name in names:
            if given[name] != written[name]:
                raise ValueError(
                    f"config.json has {name}={given[name]!r}, but its section {OWN_CONFIG!r} says "
                    f"{written[name]!r}; delete the section or make them agree"
                )
        return own
    theta, yarn = deepseek_rope(values)
    return ModelConfig.from_dict({**given, "rope_theta": theta, "rope_scaling": yarn})


_DEFAULTS: dict[str, Any] = {"num_nextn_predict_layers": 0, "q_lora_rank": None, "initializer_range": 0.02}


def to_hf(config: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of ZeroModel under the names of the Hugging Face format; views, not copies."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = _mtp_to_hf(config, name)
        match = re.fullmatch(r"(.*\.mlp\.experts)\.(w[123])", name)
        if match is None:
            out[name] = tensor
        else:
            for expert, weight in enumerate(tensor):
                out[f"{match[1]}.{expert}.{_PROJECTIONS[match[2]]}.weight"] = weight
    for prefix in _shared_expert_prefixes(config):
        out |= _empty_shared_experts(config, prefix, state["lm_head.weight"].dtype)
    L = config.num_hidden_layers
    for layer in range(L, L + config.num_nextn_predict_layers):  # the copies that vLLM looks for
        out[f"model.layers.{layer}.embed_tokens.weight"] = state["model.embed_tokens.weight"]
        out[f"model.layers.{layer}.shared_head.head.weight"] = state["lm_head.weight"]
    return out


def from_hf(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of to_hf.

    Raises:
        ValueError: a tensor is missing, has another shape, or does not belong to the model.
    """
    tensors = dict(tensors)
    for prefix in _shared_expert_prefixes(config):
        for name in _empty_shared_experts(config, prefix, torch.float32):
            tensors.pop(name, None)
    with torch.device("meta"):
        expected = ZeroModel(config).state_dict()
    L, state = config.num_hidden_layers, {}
    for name, like in expected.items():
        on_disk = _mtp_to_hf(config, name)
        match = re.fullmatch(r"(.*\.mlp\.experts)\.(w[123])", on_disk)
        if match is None:
            state[name] = take(tensors, on_disk, like.shape)
        else:
            parts = (f"{match[1]}.{e}.{_PROJECTIONS[match[2]]}.weight" for e in range(len(like)))
            state[name] = torch.stack([take(tensors, part, like.shape[1:]) for part in parts])
    for layer in range(L, L + config.num_nextn_predict_layers):
        for copy, original in (
            (f"model.layers.{layer}.embed_tokens.weight", "model.embed_tokens.weight"),
            (f"model.layers.{layer}.shared_head.head.weight", "lm_head.weight"),
        ):
            if copy in tensors and not torch.equal(tensors.pop(copy), state[original]):
                raise ValueError(f"{copy} differs from {original}; multi-token prediction shares it here")
    if tensors:
        raise ValueError(
            f"{len(tensors)} tensors do not belong to the model, {min(tensors)} among them; config.json "
            "describes another model"
        )
    return state


def _mtp_to_hf(config: ModelConfig, name: str) -> str:
    """model.mtp.K.X -> model.layers.{L+K}.X'; other names stay."""
    match = re.fullmatch(r"model\.mtp\.(\d+)\.(.*)", name)
    if match is None:
        return name
    rest = match[2]
    for ours, theirs in _MTP_PARTS.items():
        if rest.startswith(ours):
            rest = theirs + rest.removeprefix(ours)
            break
    return f"model.layers.{config.num_hidden_layers + int(match[1])}.{rest}"


def _shared_expert_prefixes(config: ModelConfig) -> list[str]:
    """Layers without shared experts: transformers builds them with width 0 and requires their weights."""
    if config.n_shared_experts or not config.has_experts:
        return []
    layers = range(config.num_hidden_layers + config.num_nextn_predict_layers)
    return [f"model.layers.{i}.mlp.shared_experts" for i in layers if config.is_moe_layer(i)]


def _empty_shared_experts(config: ModelConfig, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    D = config.hidden_size
    shapes = {"gate_proj": (0, D), "up_proj": (0, D), "down_proj": (D, 0)}
    return {f"{prefix}.{name}.weight": torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}


def export_deepseek(checkpoint: Path, out: Path) -> dict[str, Any]:
    """Writes tokenizer and weights of an export/ folder that the DeepseekV3 format can express.

    Returns:
        config.json, not written yet.

    Raises:
        ValueError, OSError: see load_pretrained, hf_config and export_tokenizer.
    """
    model = load_pretrained(checkpoint)
    values = hf_config(model.config)
    tensors = to_hf(model.config, model.state_dict())
    dtype = str(tensors["lm_head.weight"].dtype).removeprefix("torch.")
    beyond = {name for name in tensors if _layer_number(name) >= model.config.num_hidden_layers}
    refuse_stale_weights(out, [WEIGHTS_NAME, *([MTP_NAME] if beyond else [])])
    remove_old(out)
    ids = export_tokenizer(checkpoint, out, model.config.max_position_embeddings, begins=False)
    values |= {name: ids[name] for name in ENDS}
    if beyond:
        save_tensors(out / MTP_NAME, {name: tensors[name] for name in beyond})
    save_tensors(out / WEIGHTS_NAME, {name: t for name, t in tensors.items() if name not in beyond})
    return {**values, "torch_dtype": dtype}


def export_folder(
    checkpoint: Path, out: Path, max_shard_size: int = size_in_bytes(DEFAULT_SIZE), scores: Path | None = None
) -> str:
    """Writes the Hugging Face folder of an export/ folder: in the DeepseekV3 format where that can express
    the model, since vLLM reads it too; otherwise with its own code.

    Args:
        max_shard_size: bytes of weights in a file, for folders with their own code.
        scores: folder of results for the model card; default: eval/ beside the checkpoint.

    Returns:
        Which format, and why.

    Raises:
        ValueError, OSError: see export_deepseek, export_own, write_card and folder.writing.
    """
    config = load_config(checkpoint)
    beyond = beyond_deepseek(config)
    with writing(out, "a Hugging Face export", is_hf=True):
        if beyond is None:
            values = export_deepseek(checkpoint, out)
        else:
            values = export_own(checkpoint, out, max_shard_size)
        write_card(config, checkpoint, out, scores, own_code=beyond is not None)
        if (data := checkpoint / TRAINING_DATA_NAME).is_file():
            write_file(out / TRAINING_DATA_NAME, data.read_bytes())
        write_json(out / CONFIG_NAME, values, indent=2)  # last: without it nothing reads the folder
    if beyond is None:
        return "in the DeepseekV3 format, for transformers and vLLM"
    return (
        f"with its own code, since the DeepseekV3 format cannot express {beyond}; load it with "
        "trust_remote_code=True"
    )


def import_folder(hf: Path, out: Path) -> None:
    """Writes an export/ folder from a Hugging Face folder. None of its code is run, no pickled file is read.

    A line on stderr says what is left out: code, or a tokenizer that is not there.

    Raises:
        ValueError, OSError: a file is missing or damaged, the model is of another kind, see also writing.
    """
    values = read_json(hf / CONFIG_NAME)
    kind = _model_type(values)
    if kind != MODEL_TYPE and ("auto_map" in values or any(hf.glob("*.py"))):
        print(f"note: {hf} brings Python code, which is not run: {kind} is built in", file=sys.stderr)
    tokenizer: bytes | None
    if kind in DENSE:
        config, state, tokenizer = import_dense(values, hf)
    elif kind == MODEL_TYPE:
        config, state = import_own(values, hf)
        path = hf / TOKENIZER_NAME
        tokenizer = path.read_bytes() if path.is_file() else None
    else:
        config = config_from_hf(values)
        check_size(config, read_headers(hf), hf / CONFIG_NAME, FIX)
        state = from_hf(config, dict(read_weights(hf)))
        path = hf / TOKENIZER_NAME
        tokenizer = path.read_bytes() if path.is_file() else None
    if (hf / "chat_template.jinja").is_file():
        print(f"note: the chat template of {hf} is not kept: prompts here are plain text", file=sys.stderr)
    with writing(out, "an import", is_hf=False):
        remove_old(out)
        if tokenizer is None:
            name = "tokenizer.json" if kind in DENSE else TOKENIZER_NAME
            copy = "; copy it from the folder that was exported" if kind == MODEL_TYPE else ""
            print(
                f"note: {hf} has no {name}{copy}; {out} gets no tokenizer, which eval/ needs", file=sys.stderr
            )
        else:
            write_file(out / TOKENIZER_NAME, tokenizer)
        if kind == MODEL_TYPE and (data := hf / TRAINING_DATA_NAME).is_file():
            write_file(out / TRAINING_DATA_NAME, data.read_bytes())
        save_weights(out, config, state)


def _model_type(values: dict[str, Any]) -> str:
    """The kind that config.json names. Raises ValueError for one that is not imported."""
    kinds = (_FIXED["model_type"], *DENSE, MODEL_TYPE)
    kind = as_type(str, values.get("model_type", kinds[0]), "config.json: model_type")
    if kind in kinds:
        return kind
    close = get_close_matches(kind, kinds, n=1)
    why = REFUSED.get(kind, f"is not {close[0]}" if close else "is unknown")
    raise ValueError(
        f"config.json has model_type={kind[:60]!r}, which {why}; choose a checkpoint of {', '.join(kinds)}"
    )


def _layer_number(name: str) -> int:
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else -1
