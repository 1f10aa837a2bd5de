"""Teaches a model latent chain of thought from its own explicit chain of thought.

    deepspeed --num_accelerators 2 distill/main.py --ds_config ds_configs/zero2.json \\
        --config distill/configs/kava.yaml --init runs/NAME/export [a.b=c ...]

The run uses the configs, data, engine, checkpoints, metrics and export of pretrain/. `--init` gives the
weights to start from, and the values of `model` keys that the config leaves out.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from data_pipeline.loading.loader import Loader
from data_pipeline.sources.documents import ANSWER_PREFIX
from data_pipeline.tokenization.tokenizer import Tokenizer
from distill.methods import with_method
from distill.student import Student
from model import ModelConfig
from model.export_files import TOKENIZER_NAME, WEIGHTS_NAME, load_config
from pretrain.config import RunConfig
from pretrain.lora import NEW
from pretrain.main import argument_parser, start
from pretrain.setup import Outline, Run, prepare

FLOATING = ("F16", "BF16", "F32", "F64")  # as safetensors names them


def main() -> None:
    parser = argument_parser("Teach a ZeroModel latent chain of thought.")
    parser.add_argument(
        "--init",
        type=Path,
        help="export/ folder of a run or of model.hf import whose weights this run starts from",
    )
    arguments = parser.parse_intermixed_args()
    start(arguments, lambda: prepare_distillation(arguments))


def prepare_distillation(arguments: argparse.Namespace) -> Outline:
    """pretrain.setup.prepare for a run that trains a Student.

    Raises:
        ValueError, OSError: one line for the user.
    """
    init: Path | None = arguments.init

    def complete(config: RunConfig, loader: Loader | None) -> None:
        if loader is not None:
            check_data(config, loader)
        if init is not None:
            config.model = with_sizes(config.model, init, loader)
        config.model = with_method(config.model)
        if loader is not None:
            config.model = with_data(config.model, Tokenizer(loader.tokenizer_path), config.max_steps)

    weights = None if init is None else init / WEIGHTS_NAME
    given = (arguments.config, arguments.ds_config, arguments.overrides)
    run = prepare(*given, complete, weights, dry_run=arguments.dry_run)
    distillation = run.model_config.distillation
    # ZeRO-3 gathers a layer's weights for backward when a gradient reaches the layer's output. Thoughts teach
    # layers through their keys and values, bypassing it; KaVa also reads kv_b_proj outside its layer.
    if run.zero_stage == 3 and distillation is not None and distillation.student_pass:
        raise ValueError(
            f"zero_optimization.stage=3 does not go with model.distillation.method={distillation.method}, "
            "whose gradients flow through a cache; use ds_configs/zero2.json"
        )
    if isinstance(run, Run):
        check_length(run)
    if weights is not None:
        check_weights(weights, run.model_config)
    return dataclasses.replace(run, model_class=Student)


def check_data(config: RunConfig, loader: Loader) -> None:
    """Raises ValueError unless every document lies whole in a row."""
    length = config.data.sequence_length
    if config.data.packing != "best_fit":
        raise ValueError(
            f"data.packing={config.data.packing} cuts documents, but questions need their answers; set "
            "data.packing=best_fit"
        )
    for source, longest in loader.longest_document.items():
        if longest > length:
            raise ValueError(
                f"data.sequence_length={length} is below the {longest} tokens of a document of source "
                f"{source!r}, which would be cut; raise it"
            )


def check_length(run: Run) -> None:
    """Raises ValueError unless the longest question, its latents and the longest answer fit into a row.

    They need not come from one document. Their lengths are unknown, but do not exceed a document's.
    """
    limit, latents = run.model_config.max_position_embeddings, run.model_config.latent_cot.num_latents
    longest = max(run.loader.longest_document.values())
    if latents and 2 * longest + latents > limit:
        fix = f"set it to {2 * longest + latents} or more, which adds no weights"
        if run.model_config.learned_positions:
            fix = "leave long documents out of the data, since every position has weights of its own"
        raise ValueError(
            f"model.max_position_embeddings={limit} may be too short for a question and an answer of "
            f"documents of up to {longest} tokens with {latents} latents; {fix}"
        )


def with_sizes(model: dict[str, Any], init: Path, loader: Loader | None) -> dict[str, Any]:
    """The config of an export, overridden by the keys of `model`.

    Raises:
        ValueError: the data use another tokenizer, or `model` names a preset.
    """
    if model.get("preset") is not None:
        raise ValueError(f"model.preset={model['preset']} and --init both give sizes; leave one of them out")
    base = load_config(init).to_dict()
    if loader is not None:
        ours, theirs = Tokenizer(init / TOKENIZER_NAME), Tokenizer(loader.tokenizer_path)
        if ours.sha256 != theirs.sha256:
            raise ValueError(
                f"--init {init} has another tokenizer (sha256 {ours.sha256[:12]}) than the data "
                f"(sha256 {theirs.sha256[:12]}); start from an export of a run on these data"
            )
    return _over({**base, "preset": None, "latent_cot": {}, "distillation": {}}, model)


def _over(base: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given` over `base`, section by section."""
    merged = dict(base)
    for key, value in given.items():
        below = base.get(key)
        merged[key] = _over(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged


def with_data(model: dict[str, Any], tokenizer: Tokenizer, max_steps: int) -> dict[str, Any]:
    """Fills in what distillation takes from the tokenizer, and Coconut's stages, of equal length.

    Raises:
        ValueError: the tokenizer has no <bot> and <eot>.
    """
    if tokenizer.bot_id is None:
        raise ValueError(
            "the data's tokenizer has no <bot> and <eot>; build the data with tokenizer.thought_pieces: true"
        )
    values = {
        **model["distillation"],
        "bot_id": tokenizer.bot_id,
        "eot_id": tokenizer.eot_id,
        "prefix_length": len(tokenizer.encode(ANSWER_PREFIX)),
        "step_id": tokenizer.step_separator_id,
    }
    if values["method"] == "coconut" and "stage_steps" not in values:
        each = max(1, values["latents_per_step"])  # DistillationConfig refuses less
        stages = model["latent_cot"]["num_latents"] // each + 1
        values["stage_steps"] = max(1, max_steps // stages)
    return {**model, "distillation": values}


def check_weights(path: Path, config: ModelConfig) -> None:
    """Raises ValueError or FileNotFoundError unless the file has all of the model's weights but new ones.

    That they are finite is checked when they are read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give --init the export/ folder of a run")
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
            types = {name: tensor.get_dtype() for name, tensor in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); export the checkpoint again") from None
    for name, kind in types.items():
        if kind not in FLOATING:
            raise ValueError(
                f"{path} is not a file of weights: {name} has type {kind}, expected one of "
                f"{', '.join(FLOATING)}; export the checkpoint again"
            )
    with torch.device("meta"):
        own = {name: tuple(value.shape) for name, value in Student(config).state_dict().items()}
    for name in sorted(own | found):
        if own.get(name) != found.get(name) and not (name.startswith(NEW) and name not in found):
            raise ValueError(
                f"{path} does not fit the model: {name} is {found.get(name, 'missing')}, expected "
                f"{own.get(name, 'no such tensor')}; leave the model's sizes to --init"
            )


if __name__ == "__main__":
    main()
