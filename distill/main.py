"""Teaches a model latent chain of thought from its own explicit chain of thought.

    deepspeed --num_accelerators 2 distill/main.py --ds_config ds_configs/zero2.json \\
        --config distill/configs/kava.yaml --init runs/NAME/export [a.b=c ...]

The run uses the configs, data, engine, checkpoints, metrics and export of pretrain/. `--init` gives the
weights to start from, and the values of `model` keys that the config leaves out.
"""

import argparse
from pathlib import Path
from typing import Any

from data_pipeline.loading.loader import Loader
from data_pipeline.sources.documents import ANSWER_PREFIX
from data_pipeline.tokenization.tokenizer import Tokenizer
from distill.methods import with_method
from distill.student import Student
from model.export_files import TOKENIZER_NAME, TRAINING_ONLY
from pretrain.config import RunConfig
from pretrain.main import argument_parser, start
from pretrain.setup import Outline, Run, prepare

NEW = ("latent_thoughts.", TRAINING_ONLY)  # the parameters that the given weights may lack


def main() -> None:
    arguments = argument_parser("Teach a ZeroModel latent chain of thought.").parse_intermixed_args()
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
        if init is not None and init.is_dir():
            Tokenizer(init / TOKENIZER_NAME)  # a folder without one is refused here
        config.model = with_method(config.model)
        if loader is not None:
            config.model = with_data(config.model, Tokenizer(loader.tokenizer_path), config.max_steps)

    given = (arguments.config, arguments.ds_config, arguments.overrides)
    run = prepare(*given, complete, init, arguments.dry_run, Student, NEW)
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
    return run


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


if __name__ == "__main__":
    main()
