"""Exports a checkpoint: model.safetensors, config.json and tokenizer.model, all that evaluation needs, and
training_data.json, which says which training sources were decontaminated.

Offline, in one process: python pretrain/export.py --run runs/NAME [--step N] [--out DIR]
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from common.errors import user_errors
from common.files import write_file
from data_pipeline.cleaning.decontaminate import EVALUATION_FILES
from data_pipeline.shards.manifest import Manifest
from model import ModelConfig
from model.export_files import (
    CONVERSIONS_NAME,
    TOKENIZER_NAME,
    TRAINING_DATA_NAME,
    TRAINING_ONLY,
    require_finite,
    saving_weights,
)
from model.pretrained import shapes
from model.weight_files import Stored
from pretrain import checkpoint, lora
from pretrain.checkpoint import TrainingState
from pretrain.init import Shapes, base_weights
from pretrain.parts import Part


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


def write_export(folder: Path, config: ModelConfig, weights: Iterable[Part], run: Path) -> None:
    """Writes the folder, in fp32, with the run's tokenizer and data description (older runs have none). They
    come before the weights are in place, so that weights never lack them.

    Args:
        weights: every tensor of the model, in any order and perhaps in parts, of which memory holds one. What
            only training needs is left out.

    Raises:
        ValueError: a weight is not finite or missing; nothing is replaced.
    """
    planned = {name: Stored(shape, "F32") for name, shape in shapes(config).items()}
    with saving_weights(folder, config, planned) as writer:
        for name, value, row in weights:
            if not name.startswith(TRAINING_ONLY):
                require_finite(name, value, f"the weights to export to {folder}")
                writer.write(name, value.float(), row)
        (folder / CONVERSIONS_NAME).unlink(missing_ok=True)  # of a model that was there before
        for name in (TOKENIZER_NAME, TRAINING_DATA_NAME):
            if name == TOKENIZER_NAME or (run / name).is_file():
                write_file(folder / name, (run / name).read_bytes())
            else:
                (folder / name).unlink(missing_ok=True)


def with_base(run: Path, trained: Iterable[Part], state: TrainingState) -> Iterator[Part]:
    """All weights of the plain model: what was trained and buffers, and from init.BASE what was not.

    Raises:
        FileNotFoundError, ValueError: see init.base_weights.
    """
    if state.lora is not None:
        yield from lora.merged(run, trained, state.lora)
        return
    yield from trained
    if state.origin is not None and state.origin.frozen:
        for name, value in base_weights(run, state.origin.sha256, state.origin.frozen):
            yield Part(name, value)


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
    config = ModelConfig.from_stored(state.model)
    expected = shapes(config)
    own_buffers = [Part(name, b) for name, b in buffers.items() if name in expected]  # not the trainer's

    def write(target: Path, parameters: Iterator[tuple[str, Tensor]]) -> None:
        # Beside adapters, a Universal Checkpoint holds buffers too.
        trained = chain((Part(*given) for given in parameters if given[0] not in buffers), own_buffers)
        weights = _fitting(folder, with_base(run, trained, state), expected)
        write_export(target, config, weights, run)

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        write(out, universal_weights(convert_to_universal(folder, Path(scratch))))
    if (folder / checkpoint.EMA).is_dir():
        write(out.with_name(f"{out.name}_ema"), checkpoint.averages(folder))
    return folder


def _fitting(folder: Path, weights: Iterable[Part], expected: Shapes) -> Iterator[Part]:
    """Whole weights in the shapes of a model; those of a Universal Checkpoint are perhaps flat.

    Raises:
        ValueError: a weight is missing or of another size, or there is one too many.
    """

    def misfit(name: str, found: str, wanted: str) -> ValueError:
        return ValueError(
            f"{folder} does not hold the model of its {checkpoint.STATE}: {name} has {found} numbers, "
            f"expected {wanted}; export another checkpoint"
        )

    missing = dict(expected)
    for name, value, _ in weights:
        if name.startswith(TRAINING_ONLY):
            continue
        shape = missing.pop(name, None)
        wanted = None if shape is None else math.prod(shape)
        if shape is None or value.numel() != wanted:
            raise misfit(name, f"{value.numel():,}", "none" if wanted is None else f"{wanted:,}")
        yield Part(name, value.view(shape))
    for name, shape in missing.items():
        raise misfit(name, "no", f"{math.prod(shape):,}")


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
