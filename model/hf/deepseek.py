"""Export to and import from Hugging Face's DeepseekV3 format; dense models go on to dense.py.

Without recurrence a ZeroModel is a DeepSeek-V3, and only two kinds of names differ: experts are stacked as
w1, w3, w2 (gate, up, down), and multi-token prediction has modules of its own. transformers reports those
modules as unexpected, so they go into a file that it does not read; vLLM reads it.

Shapes: E experts, D hidden, V vocabulary.
"""

import dataclasses
import re
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from operator import itemgetter
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
    load_config,
    saving_weights,
)
from model.hf.card import write_card
from model.hf.dense import DENSE, REFUSED, import_dense
from model.hf.files import (
    FIX,
    MTP_NAME,
    check_config,
    open_folder,
    read_fields,
    read_json,
)
from model.hf.folder import refuse_stale_weights, remove_old, writing
from model.hf.own import export_own, import_own
from model.hf.places import Imported, Place, fitted, renamed, write_places
from model.hf.remote.section import MODEL_TYPE
from model.hf.rope import deepseek_rope
from model.hf.shards import DEFAULT_SIZE, size_in_bytes
from model.hf.tokenizer import BOS_TOKEN_ID, EOS_TOKEN_ID, PAD_TOKEN_ID
from model.hf.tokenizer_export import ENDS, export_tokenizer
from model.pretrained import open_export, shapes
from model.weight_files import Stored, check_size
from model.weight_writer import DTYPES, file_names, shards, writing_weights

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
_STACK = re.compile(r"(.*\.mlp\.experts)\.(w[123])")
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


def to_hf(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of ZeroModel under the names of the Hugging Face format; views, not copies."""
    places = places_in_hf(config)
    dtype = state["lm_head.weight"].dtype
    empty = {name: torch.empty(shape, dtype=dtype) for name, shape in _empty_shared_experts(config).items()}
    return {place.name: place.change(state[name]) for name in state for place in places[name]} | empty


def places_in_hf(config: ModelConfig) -> dict[str, list[Place]]:
    """Where the tensors of a ZeroModel go in the Hugging Face format; stacked experts go one by one."""
    places = {
        name: [Place(part, change=itemgetter(row)) for row, part in enumerate(parts)]
        if _STACK.fullmatch(name)
        else [Place(part) for part in parts]
        for name, parts in _parts_in_hf(config).items()
    }
    for copy, original in _copies(config).items():
        places[original].append(Place(copy))
    return places


def _parts_in_hf(config: ModelConfig) -> dict[str, list[str]]:
    """The names in the Hugging Face format of a tensor's rows, for stacked experts, or of all of it."""
    parts: dict[str, list[str]] = {}
    for name, shape in shapes(config).items():
        on_disk = _mtp_to_hf(config, name)
        stack = _STACK.fullmatch(on_disk)
        if stack is None:
            parts[name] = [on_disk]
        else:
            layer, projection = stack[1], _PROJECTIONS[stack[2]]
            parts[name] = [f"{layer}.{expert}.{projection}.weight" for expert in range(shape[0])]
    return parts


def _copies(config: ModelConfig) -> dict[str, str]:
    """Tensors that vLLM looks for in modules of multi-token prediction, and what they are copies of."""
    L = config.num_hidden_layers
    layers = [f"model.layers.{layer}" for layer in range(L, L + config.num_nextn_predict_layers)]
    embeddings = {f"{layer}.embed_tokens.weight": "model.embed_tokens.weight" for layer in layers}
    return embeddings | {f"{layer}.shared_head.head.weight": "lm_head.weight" for layer in layers}


def import_deepseek(values: dict[str, Any], hf: Path) -> Imported:
    """The model of a folder in the DeepseekV3 format.

    Raises:
        ValueError, FileNotFoundError: a file is missing or damaged, config.json is of another kind, or a
            tensor is missing, has another shape, or does not belong to the model.
    """
    config = config_from_hf(values)
    weights = open_folder(hf)
    check_size(config, weights.stored, hf / CONFIG_NAME, FIX)
    places: dict[str, list[Place]] = {}
    for name, parts in _parts_in_hf(config).items():
        for row, part in enumerate(parts):
            stacked = _STACK.fullmatch(name) is not None
            places[part] = [Place(name, row, lambda expert: expert[None]) if stacked else Place(name)]
    copies = {copy: original for copy, original in _copies(config).items() if copy in weights.stored}
    empty = _empty_shared_experts(config).keys() & weights.stored.keys()
    places |= {name: [] for name in (*copies, *empty)}
    planned = fitted(weights.stored, places, shapes(config))
    for copy, original in copies.items():
        if not torch.equal(weights.checked(copy), weights.checked(original)):
            raise ValueError(f"{copy} differs from {original}; multi-token prediction shares it here")
    return Imported(config, weights, places, planned)


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


def _empty_shared_experts(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Tensors (name -> shape) of no numbers, for layers without shared experts."""
    D = config.hidden_size
    parts = {"gate_proj": (0, D), "up_proj": (0, D), "down_proj": (D, 0)}
    return {
        f"{prefix}.{name}.weight": shape
        for prefix in _shared_expert_prefixes(config)
        for name, shape in parts.items()
    }


def export_deepseek(checkpoint: Path, out: Path, max_shard_size: int) -> dict[str, Any]:
    """Writes tokenizer and weights of an export/ folder that the DeepseekV3 format can express.

    Args:
        max_shard_size: bytes of weights in a file.

    Returns:
        config.json, not written yet.

    Raises:
        ValueError, OSError: see open_export, hf_config and export_tokenizer.
    """
    with open_export(checkpoint) as (config, weights):
        values, places = hf_config(config), places_in_hf(config)
        dtype = weights.stored["lm_head.weight"].dtype
        stored = renamed(weights.stored, places)
        stored |= {name: Stored(shape, dtype) for name, shape in _empty_shared_experts(config).items()}
        beyond = [name for name in stored if _layer_number(name) >= config.num_hidden_layers]
        files = shards({name: stored[name] for name in stored if name not in beyond}, max_shard_size)
        if beyond:
            files[MTP_NAME] = beyond
        refuse_stale_weights(out, file_names(files))
        with writing_weights(out, files, stored) as writer:
            for name in weights:
                write_places(weights.checked(name), places[name], stored, writer)
            remove_old(out)
            ids = export_tokenizer(checkpoint, out, config.max_position_embeddings, begins=False)
    values |= {name: ids[name] for name in ENDS}
    return {**values, "torch_dtype": str(DTYPES[dtype]).removeprefix("torch.")}


def export_folder(
    checkpoint: Path, out: Path, max_shard_size: int = size_in_bytes(DEFAULT_SIZE), scores: Path | None = None
) -> str:
    """Writes the Hugging Face folder of an export/ folder: in the DeepseekV3 format where that can express
    the model, since vLLM reads it too; otherwise with its own code.

    Args:
        max_shard_size: bytes of weights in a file.
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
            values = export_deepseek(checkpoint, out, max_shard_size)
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
        imported, tokenizer = import_dense(values, hf)
    else:
        imported = (import_own if kind == MODEL_TYPE else import_deepseek)(values, hf)
        path = hf / TOKENIZER_NAME
        tokenizer = path.read_bytes() if path.is_file() else None
    if (hf / "chat_template.jinja").is_file():
        print(f"note: the chat template of {hf} is not kept: prompts here are plain text", file=sys.stderr)
    with (
        writing(out, "an import", is_hf=False),
        saving_weights(out, imported.config, imported.planned) as writer,
    ):
        imported.write(writer)
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
