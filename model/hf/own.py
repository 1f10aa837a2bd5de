"""Folders of Hugging Face whose code comes with them: every ZeroModel, whatever it loops.

Weights keep their names, behind `network.`; config.json has the network's own config as a section.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.files import write_json
from model.export_files import CONFIG_NAME
from model.hf import bundle
from model.hf.files import FIX as HF_FIX
from model.hf.files import open_folder
from model.hf.folder import refuse_stale_weights, remove_old
from model.hf.places import Imported, Place, fitted
from model.hf.remote.section import MODEL_TYPE, SECTION, SHARED, described_model
from model.hf.tokenizer_export import ENDS, export_tokenizer
from model.pretrained import open_export, shapes
from model.weight_files import check_size
from model.weight_writer import DTYPES, file_names, shards, writing_weights

PREFIX = "network."
CLASSES = {
    "AutoConfig": f"{bundle.CONFIGURATION.rpartition('.')[2]}.ZeroModelConfig",
    "AutoModelForCausalLM": f"{bundle.MODELING.rpartition('.')[2]}.ZeroModelForCausalLM",
}


def export_own(checkpoint: Path, out: Path, max_shard_size: int) -> dict[str, Any]:
    """Writes tokenizer, code and weights of an export/ folder.

    Args:
        max_shard_size: bytes of weights in a file.

    Returns:
        config.json, not written yet.

    Raises:
        ValueError, OSError: see open_export and export_tokenizer.
    """
    with open_export(checkpoint) as (config, weights):
        stored = {PREFIX + name: tensor for name, tensor in weights.stored.items()}
        divided, files = shards(stored, max_shard_size), bundle.bundle()
        refuse_stale_weights(out, file_names(divided))
        with writing_weights(out, divided, stored) as writer:
            for name in weights:
                writer.write(PREFIX + name, weights.checked(name))
            remove_old(out)
            ids = export_tokenizer(checkpoint, out, config.max_position_embeddings, begins=True)
            for name, text in files.items():  # whole once config.json is there, which comes last
                (out / name).write_bytes(text.encode())
            write_json(out / "generation_config.json", {name: ids[name] for name in ENDS}, indent=2)
    return {
        "architectures": ["ZeroModelForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": CLASSES,
        **{name: getattr(config, name) for name in SHARED},
        **ids,
        "use_cache": True,
        "torch_dtype": str(DTYPES[weights.stored["model.embed_tokens.weight"].dtype]).removeprefix("torch."),
        "zeromodel_code": bundle.describe(files),
        SECTION: config.to_dict(),
    }


def import_own(values: Mapping[str, Any], hf: Path) -> Imported:
    """The model of such a folder, from its data alone: its code is neither run nor read.

    Args:
        values: config.json.

    Raises:
        ValueError, FileNotFoundError: a file is missing or damaged, or config.json contradicts itself.
    """
    config = described_model(dict(values))
    weights, expected = open_folder(hf), shapes(config)
    check_size(config, weights.stored, hf / CONFIG_NAME, HF_FIX)
    places = {PREFIX + name: [Place(name)] for name in expected}
    return Imported(config, weights, places, fitted(weights.stored, places, expected))
