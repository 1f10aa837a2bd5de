"""Prepares a Run from configs, data and checkpoint: everything checked before a process group exists."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.loading.loader import Loader
from data_pipeline.tokenization.tokenizer import Tokenizer
from model import ModelConfig, ZeroModel
from pretrain import checkpoint, lora
from pretrain.checkpoint import TrainingState
from pretrain.config import RunConfig, check_layout
from pretrain.ds_config import load_ds_config
from pretrain.run_config import load_run_config


@dataclass(frozen=True)
class Run:
    """Everything a run consists of, checked before any process group exists."""

    config: RunConfig
    model_config: ModelConfig
    ds_config: dict[str, Any]
    loader: Loader
    validation: Loader | None
    micro_batch_size: int
    state: TrainingState  # of step 0; a checkpoint must agree with it
    resume_from: Path | None  # its files' sizes are right; checksums are still to be compared
    model_class: type[ZeroModel] = ZeroModel
    weights: Path | None = None  # safetensors to start from; a checkpoint takes precedence

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def rank(self) -> int:
        """As set by the launcher, so known before the process group exists."""
        return int(os.environ.get("RANK", "0"))


def prepare(
    config_paths: str | Sequence[str],
    ds_config_path: str,
    overrides: list[str],
    complete: Callable[[RunConfig, Loader], None] | None = None,
    weights: Path | None = None,
) -> Run:
    """Reads and checks configs, data and checkpoint for this rank.

    Args:
        complete: fills in the keys of the config's `model` that follow from the data.
        weights: see Run.

    Raises:
        ValueError, OSError: one line for the user.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    config = load_run_config(config_paths, overrides)
    loader = _loader(config, "train", rank, world_size)
    if complete is not None:
        complete(config, loader)
    model_config = build_model_config(config, loader.vocab_size)
    if complete is None and model_config.distillation is not None:
        raise ValueError("model.distillation is for distill/main.py; start that, or leave it out")
    micro, accumulation = check_layout(config, model_config, world_size)
    ds_config = load_ds_config(ds_config_path, config, micro, accumulation)
    state = TrainingState(
        step=0,
        model=model_config.to_dict(),
        data_fingerprint=loader.fingerprint,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        world_size=world_size,
        ep_size=config.ep_size,
        zero_stage=ds_config.get("zero_optimization", {}).get("stage", 0),
        optimizer=config.optimizer.kind,
        lora=None if config.lora is None else lora.identity(config.lora, weights),
    )
    validation = _loader(config, "validation", rank, world_size) if config.eval_every else None
    resume_from = choose_checkpoint(config, state, announce=False)  # again when the folder is locked
    return Run(
        config, model_config, ds_config, loader, validation, micro, state, resume_from, weights=weights
    )


def _loader(config: RunConfig, split: str, rank: int, world_size: int) -> Loader:
    loader = Loader(
        config.data.path,
        config.data.sequence_length,
        config.global_batch_size,
        config.seed,
        rank,
        world_size,
        split,
        packing=config.data.packing,
        stages=config.data.stages if split == "train" else (),
        shuffle_shards=config.data.shuffle_shards,
        max_damaged_rows=config.data.max_damaged_rows,
        cache=config.data.cache,
        cache_bytes=config.data.cache_bytes,
    )
    if config.data.tokenizer is not None:
        ours, theirs = Tokenizer(Path(config.data.tokenizer)), Tokenizer(loader.tokenizer_path)
        if ours.sha256 != theirs.sha256:
            raise ValueError(
                f"data.tokenizer={config.data.tokenizer} (sha256 {ours.sha256[:12]}) did not encode the "
                f"shards in {config.data.path} (sha256 {theirs.sha256[:12]}); leave data.tokenizer out"
            )
    return loader


def build_model_config(config: RunConfig, vocab_size: int) -> ModelConfig:
    """The model of a run; its vocab_size is the tokenizer's."""
    given = config.model.get("vocab_size", vocab_size)
    if given != vocab_size:
        raise ValueError(
            f"model.vocab_size={given} is not the tokenizer's {vocab_size}; leave it out of the config"
        )
    model_config = ModelConfig.from_dict({**config.model, "vocab_size": vocab_size})
    if config.data.sequence_length > model_config.max_position_embeddings:
        raise ValueError(
            f"data.sequence_length={config.data.sequence_length} exceeds model.max_position_embeddings="
            f"{model_config.max_position_embeddings}; raise the latter"
        )
    return model_config


def choose_checkpoint(
    config: RunConfig, state: TrainingState, announce: bool, below: float = math.inf
) -> Path | None:
    """The checkpoint to resume from, compatible with this run; None: start at the first step.

    Its checksums are not compared yet: all ranks do that together. Only steps below `below` count.
    """
    run = Path(config.output_dir)
    if config.resume == "none":
        if checkpoint.steps(run):
            raise ValueError(
                f"output_dir={run} already holds checkpoints and resume=none would overwrite them; "
                "use resume=auto or another output_dir"
            )
        return None
    if config.resume == "auto":
        folder, skipped = checkpoint.newest(run, below, part=checkpoint.NONE)
        for line in skipped if announce else ():
            print(f"warning: {line}")
    else:
        folder = Path(config.resume)
        if not folder.is_dir():
            raise FileNotFoundError(f"resume={folder} does not exist; give a checkpoints/step-N folder")
        checkpoint.require_whole(folder, checkpoint.damage(folder, part=checkpoint.NONE))
    if folder is None:
        return None
    found, _ = checkpoint.read(folder)
    checkpoint.check_compatible(folder, found, state)
    later = [step for step in checkpoint.steps(run) if step > found.step]
    if later and config.resume != "auto":
        raise ValueError(
            f"output_dir={run} holds checkpoints of later steps ({later[0]}) than {folder}, which "
            "resume=auto would use next time; give another output_dir, or move them away"
        )
    if found.step > config.max_steps:
        raise ValueError(
            f"checkpoint {folder} is at step {found.step}, beyond max_steps={config.max_steps}; "
            "raise max_steps"
        )
    if announce:
        changes = checkpoint.layout_changes(found, state)
        print(f"resuming from {folder}" + (f", converted: {', '.join(changes)}" if changes else ""))
    return folder
