"""Exports a checkpoint: model.safetensors, config.json and tokenizer.model, all that evaluation needs, and
training_data.json, which says which training sources were decontaminated.

Offline, in one process: python pretrain/export.py --run runs/NAME [--step N] [--out DIR]
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from common.errors import user_errors
from common.files import write_file
from data_pipeline.cleaning.decontaminate import EVALUATION_FILES
from data_pipeline.shards.manifest import Manifest
from model import ModelConfig, ZeroModel
from model.export_files import (
    CONVERSIONS_NAME,
    TOKENIZER_NAME,
    TRAINING_DATA_NAME,
    TRAINING_ONLY,
    require_finite,
    save_weights,
)
from pretrain import checkpoint, lora
from pretrain.checkpoint import TrainingState
from pretrain.init import base_weights


def describe_data(manifest: Manifest) -> dict[str, Any]:
    """The contents of training_data.json: the manifest's sha256, the sources, and the test files whose
    problems were removed from those that are `decontaminated`.
    """
    sources = {
        source["name"]: {
            "kind": source["kind"],
            "weight": source["weight"],
            "tokens": manifest.sources[source["name"]].splits["train"].tokens,
            "decontaminated": "decontaminate" in source.get("cleaning", ()),
        }
        for source in manifest.recipe["sources"]
    }
    cleaned = any(source["decontaminated"] for source in sources.values())
    return {
        "manifest_sha256": manifest.sha256,
        "sources": sources,
        "decontaminated_against": list(EVALUATION_FILES) if cleaned else [],
    }


def write_export(folder: Path, config: ModelConfig, weights: dict[str, Tensor], run: Path) -> None:
    """Writes the folder, with the run folder's tokenizer and data description (older runs have none); these
    come first, so that weights never lack them.

    Raises:
        ValueError: a weight is not finite; nothing is written.
    """
    weights = {name: value for name, value in weights.items() if not name.startswith(TRAINING_ONLY)}
    require_finite(weights, f"the weights to export to {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONVERSIONS_NAME).unlink(missing_ok=True)  # of a model that was there before
    for name in (TOKENIZER_NAME, TRAINING_DATA_NAME):
        if name == TOKENIZER_NAME or (run / name).is_file():
            write_file(folder / name, (run / name).read_bytes())
        else:
            (folder / name).unlink(missing_ok=True)
    save_weights(folder, config, weights)


def with_base(run: Path, trained: dict[str, Tensor], state: TrainingState) -> dict[str, Tensor]:
    """All weights of the plain model: what was trained and buffers, and from init.BASE what was not.

    Raises:
        FileNotFoundError, ValueError: see init.base_weights.
    """
    if state.lora is not None:
        return lora.merged(run, trained, state.lora)
    if state.origin is not None and state.origin.frozen:
        return trained | base_weights(run, state.origin.sha256, state.origin.frozen)
    return trained


def export_run(run: Path, step: int | None, out: Path) -> Path:
    """Exports one checkpoint of a run without starting ranks and returns the checkpoint's folder.

    A moving average of the weights goes to a second folder, whose name ends in _ema.

    Raises:
        FileNotFoundError: no such run or step.
        ValueError: the checkpoint is not whole, holds pickled code, weights of another model than it says, or
            NaN or infinity.
    """
    if step is None:
        folder, damaged = checkpoint.newest(run)
        skipped = [checkpoint.passed_over(path, problem) for path, problem in damaged.items()]
        if folder is None:
            raise FileNotFoundError(
                f"{run} holds no whole checkpoint; give --run a folder of a training run"
                + (f" ({'; '.join(skipped)})" if skipped else "")
            )
        for line in skipped:
            print(f"warning: {line}", file=sys.stderr)
    else:
        folder = run / "checkpoints" / f"step-{step}"
        if not folder.is_dir():
            have = ", ".join(map(str, checkpoint.steps(run))) or "none"
            raise FileNotFoundError(f"{run} has no checkpoint of step {step}; it has {have}")
        checkpoint.require_whole(folder, checkpoint.damage(folder))
    # Imported late: deepspeed takes seconds, and a wrong run or step should fail sooner.
    from pretrain.universal import convert_to_universal, require_no_pickle_code, universal_weights

    state, buffers = checkpoint.read(folder)
    require_no_pickle_code(folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        universal = convert_to_universal(folder, Path(scratch))
        weights = dict(universal_weights(universal))
    config = ModelConfig.from_stored(state.model)
    with torch.device("meta"):
        expected = ZeroModel(config).state_dict()
    exports = {out: weights}
    if (folder / checkpoint.EMA).is_dir():
        averaged = [load_file(path) for path in (folder / checkpoint.EMA).iterdir()]
        average = {name: value for tensors in averaged for name, value in tensors.items()}
        exports[out.with_name(f"{out.name}_ema")] = average
    own_buffers = {name: b for name, b in buffers.items() if name in expected}  # the others are the trainer's
    for target, parameters in exports.items():
        values = parameters | own_buffers
        values = with_base(run, values, state)
        values = {name: value for name, value in values.items() if not name.startswith(TRAINING_ONLY)}
        for name in sorted(values.keys() | expected.keys()):
            found, wanted = (of[name].numel() if name in of else None for of in (values, expected))
            if found != wanted:
                raise ValueError(
                    f"{folder} does not hold the model of its {checkpoint.STATE}: {name} has "
                    f"{'no' if found is None else f'{found:,}'} numbers, expected "
                    f"{'none' if wanted is None else f'{wanted:,}'}; export another checkpoint"
                )
        values = {name: values[name].view(expected[name].shape) for name in expected}
        write_export(target, config, values, run)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Export a training checkpoint for evaluation.")
    parser.add_argument("--run", type=Path, required=True, help="run folder, for example runs/demo")
    parser.add_argument("--step", type=int, help="checkpoint to export; default: the newest whole one")
    parser.add_argument("--out", type=Path, help="folder to write; default: RUN/export")
    arguments = parser.parse_args()
    out = arguments.out or arguments.run / "export"
    with user_errors(ValueError, OSError):
        folder = export_run(arguments.run, arguments.step, out)
        print(f"exported {folder} to {out}")


if __name__ == "__main__":
    main()
