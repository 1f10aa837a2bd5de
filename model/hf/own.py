"""Folders of Hugging Face whose code comes with them: every ZeroModel, whatever it loops.

Weights keep their names, behind `network.`; config.json has the network's own config as a section.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.files import write_json
from model.config.model import ModelConfig
from model.export_files import CONFIG_NAME, FIX, WEIGHTS_NAME, load_config
from model.hf import bundle
from model.hf.files import FIX as HF_FIX
from model.hf.files import read_headers, read_weights, take
from model.hf.folder import refuse_stale_weights, remove_old
from model.hf.remote.section import MODEL_TYPE, SECTION, SHARED, described_model
from model.hf.shards import ShardPlan
from model.hf.tokenizer_export import ENDS, export_tokenizer
from model.pretrained import check_fits
from model.transformer import ZeroModel
from model.weight_files import check_size, read_header, unchanged

PREFIX = "network."
CLASSES = {
    "AutoConfig": f"{bundle.CONFIGURATION.rpartition('.')[2]}.ZeroModelConfig",
    "AutoModelForCausalLM": f"{bundle.MODELING.rpartition('.')[2]}.ZeroModelForCausalLM",
}
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def export_own(checkpoint: Path, out: Path, max_shard_size: int) -> dict[str, Any]:
    """Writes tokenizer, code and weights of an export/ folder.

    Args:
        max_shard_size: bytes of weights in a file.

    Returns:
        config.json, not written yet.

    Raises:
        ValueError, OSError: a file is missing, damaged, or of another kind than the others.
    """
    path = checkpoint / WEIGHTS_NAME
    with unchanged(checkpoint / CONFIG_NAME, path):
        config, stored = load_config(checkpoint), read_header(path, FIX)
        check_fits(shapes(config), {name: tensor.shape for name, tensor in stored.items()}, path)
        plan, files = ShardPlan(stored, max_shard_size), bundle.bundle()
        refuse_stale_weights(out, plan.written)
        remove_old(out)
        ids = export_tokenizer(checkpoint, out, config.max_position_embeddings, begins=True)
        for name, text in files.items():  # whole once config.json is there, which comes last
            (out / name).write_bytes(text.encode())
        write_json(out / "generation_config.json", {name: ids[name] for name in ENDS}, indent=2)
        plan.write(path, out, lambda name: PREFIX + name)
    return {
        "architectures": ["ZeroModelForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": CLASSES,
        **{name: getattr(config, name) for name in SHARED},
        **ids,
        "use_cache": True,
        "torch_dtype": DTYPES[stored["model.embed_tokens.weight"].dtype],
        "zeromodel_code": bundle.describe(files),
        SECTION: config.to_dict(),
    }


def import_own(values: Mapping[str, Any], hf: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and state of such a folder, from its data alone: its code is neither run nor read.

    Args:
        values: config.json.

    Raises:
        ValueError, FileNotFoundError: a file is missing or damaged, or config.json contradicts itself.
    """
    config = described_model(dict(values))
    check_size(config, read_headers(hf), hf / CONFIG_NAME, HF_FIX)
    tensors = dict(read_weights(hf))
    state = {name: take(tensors, PREFIX + name, torch.Size(shape)) for name, shape in shapes(config).items()}
    if tensors:
        raise ValueError(f"{len(tensors)} tensors do not belong to the model, {min(tensors)} among them")
    return config, state


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a model's state."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in ZeroModel(config).state_dict().items()}
