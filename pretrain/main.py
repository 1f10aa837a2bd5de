"""Starts or continues a training run.

    deepspeed --num_accelerators 2 pretrain/main.py --ds_config ds_configs/zero3_ep.json \\
        --config pretrain/configs/demo.yaml [--config pretrain/configs/groups/NAME.yaml] [a.b=c ...]
"""

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from common.errors import user_errors
from data_pipeline.errors import DataError
from data_pipeline.loading.loader import Loader
from data_pipeline.tokenization.tokenizer import Tokenizer
from model import ModelConfig, ZeroModel
from model.counts import num_parameters
from model.export_files import TOKENIZER_NAME, TRAINING_DATA_NAME
from pretrain import checkpoint, lora
from pretrain.checkpoint import CheckpointError, TrainingState
from pretrain.config import RunConfig, check_layout, load_ds_config, load_run_config
from pretrain.dry_run import describe
from pretrain.export import describe_data, write_export
from pretrain.launch import join_slurm_step
from pretrain.metrics import environment, peak_tflops
from pretrain.stopping import StopRequests

if TYPE_CHECKING:
    from pretrain.engine import Engine


@dataclass(frozen=True)
class Run:
    """Everything a run is made of, checked, before any process group exists."""

    config: RunConfig
    model_config: ModelConfig
    ds_config: dict[str, Any]
    loader: Loader
    validation: Loader | None
    micro_batch_size: int
    state: TrainingState  # of step 0; a checkpoint must agree with it
    resume_from: Path | None  # whole by its files' sizes
    model_class: type[ZeroModel] = ZeroModel
    weights: Path | None = None  # safetensors in place of initial weights; a checkpoint goes before them

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def rank(self) -> int:
        """As the launcher says, also before the process group exists."""
        return int(os.environ.get("RANK", "0"))


def main() -> None:
    arguments = _parse()
    start(arguments, lambda: prepare(arguments.config, arguments.ds_config, arguments.overrides))


def start(arguments: argparse.Namespace, prepare_run: Callable[[], Run]) -> None:
    """What follows the command line: prepares a run, then describes or trains it."""
    join_slurm_step()
    with user_errors(ValueError, OSError):
        run = prepare_run()
    if arguments.dry_run:
        if run.rank == 0:
            print(describe(run))
        return
    try:
        _train(run)
    except RuntimeError as error:
        from pretrain.process_group import communication_problem

        problem = communication_problem(error)
        if problem is None:
            raise
        sys.exit(f"error: {problem}")


def _parse() -> argparse.Namespace:
    return argument_parser("Train a ZeroModel with DeepSpeed.").parse_intermixed_args()


def argument_parser(description: str) -> argparse.ArgumentParser:
    """The flags that every command which trains has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--config",
        required=True,
        action="append",
        help="YAML of the run, see pretrain/configs/; given again, later files override earlier ones",
    )
    parser.add_argument("--ds_config", required=True, help="DeepSpeed JSON, see ds_configs/")
    parser.add_argument("--dry-run", action="store_true", help="say what the run would be and what it takes")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the deepspeed launcher")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="config keys to override")
    return parser


def prepare(
    config_paths: str | Sequence[str],
    ds_config_path: str,
    overrides: list[str],
    complete: Callable[[RunConfig, Loader], None] | None = None,
    weights: Path | None = None,
) -> Run:
    """Reads and checks configs, data and checkpoint for this rank.

    Args:
        complete: fills in what of the config's `model` follows from the data.
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
        raise ValueError("model.distillation is what distill/main.py trains; start that, or leave it out")
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
    resume_from = _choose_checkpoint(config, state, announce=rank == 0)
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
                f"data.tokenizer={config.data.tokenizer} (sha256 {ours.sha256[:12]}) did not write the "
                f"shards in {config.data.path} (sha256 {theirs.sha256[:12]}); leave data.tokenizer out"
            )
    return loader


def build_model_config(config: RunConfig, vocab_size: int) -> ModelConfig:
    """The model of a run: its vocabulary is the tokenizer's."""
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


def _choose_checkpoint(
    config: RunConfig, state: TrainingState, announce: bool, below: float = math.inf
) -> Path | None:
    """The checkpoint to continue from, compatible with this run; None: start from the first step.

    Its checksums are still to be compared, by all ranks together. Only steps below `below` count.
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
            f"output_dir={run} holds checkpoints of later steps ({later[0]}) than {folder}, from which "
            "resume=auto would go on next time; give another output_dir, or move them away"
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


def _verified(run: Run, engine: "Engine") -> Path | None:
    """The checkpoint to continue from, whole to the checksums; with resume=auto perhaps an older one.

    Raises:
        ValueError: the one that the user named is damaged.
    """
    folder = run.resume_from
    while folder is not None:
        problem = checkpoint.damage_on_any_rank(engine, folder, run.rank, run.state.world_size)
        if problem is None:
            return folder
        if run.config.resume != "auto":
            checkpoint.require_whole(folder, problem)
        if run.rank == 0:
            print(f"warning: {checkpoint.passed_over(folder, problem)}")
        step = int(folder.name[5:])
        folder = _choose_checkpoint(run.config, run.state, announce=run.rank == 0, below=step)
    return None


def _train(run: Run) -> None:
    # Imported late: deepspeed takes seconds, which a user with a misspelt key should not wait for.
    from pretrain import elastic
    from pretrain.engine import Engine
    from pretrain.process_group import init_process_group, rank
    from pretrain.trainer import Trainer, TrainingError

    stop_requests = StopRequests(run.folder, run.config.time_limit_minutes, watches_file=run.rank == 0)
    stop_requests.install()  # before the minutes that a large model takes to start
    init_process_group()
    weights = None if run.weights is None else load_file(run.weights)
    engine = Engine(run.config, run.model_config, run.ds_config, run.model_class, weights)
    trainer = Trainer(
        run.config,
        run.model_config,
        engine,
        run.loader,
        run.validation,
        run.micro_batch_size,
        run.state,
        stop_requests,
    )
    with user_errors(ValueError):
        resume_from = _verified(run, engine)
        if resume_from is not None:
            trainer.step = elastic.load(engine, resume_from, run.state, run.folder)
    if rank() == 0:
        with user_errors(OSError):
            _write_run_folder(run, sum(shape.numel() for shape in engine.full_shapes().values()))
            if run.config.lora is not None and weights is not None:
                lora.save_base(run.folder, weights)
    engine.barrier()
    # All ranks judge the training and its checkpoints alike, but one alone may read a damaged shard.
    with user_errors(TrainingError, CheckpointError), user_errors(DataError, from_every_rank=True):
        trainer.train()
    if trainer.step == run.config.max_steps:
        _finish(run, engine)
    elif rank() == 0:
        reason = stop_requests.reason() or "another rank's request"
        print(f"stopped after step {trainer.step} by {reason}; the same command continues")
    engine.barrier()
    engine.close()
    trainer.close()


def _finish(run: Run, engine: "Engine") -> None:
    """The export and the marker of a run that reached its last step."""
    from pretrain.process_group import rank

    _export(run, "export", engine.full_weights())
    if engine.average is not None:
        _export(run, "export_ema", engine.averaged_weights())
    if rank() == 0:
        (run.folder / "DONE").write_text(f"{run.config.max_steps}\n")
        print(f"done: {run.config.max_steps} steps in {run.folder}, exported to {run.folder / 'export'}")


def _export(run: Run, name: str, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Gathers tensors on all ranks and writes them on the first as a folder of the run."""
    from pretrain.process_group import rank

    weights = {}
    for key, value in tensors:
        if rank() == 0:
            weights[key] = value.cpu()
    if rank() == 0:
        if run.config.lora is not None:
            weights = lora.merged(run.folder, weights, run.config.lora.alpha / run.config.lora.r)
        write_export(run.folder / name, run.model_config, weights, run.folder)


def _write_run_folder(run: Run, trained: int) -> None:
    """config.yaml and ds_config.json as resolved, environment.json, the tokenizer.

    Args:
        trained: parameters that are.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "DONE").unlink(missing_ok=True)
    resolved = {**asdict(run.config), "model": run.model_config.to_dict()}
    OmegaConf.save(OmegaConf.create(resolved), run.folder / "config.yaml")
    (run.folder / "ds_config.json").write_text(json.dumps(run.ds_config, indent=2))
    (run.folder / "environment.json").write_text(json.dumps(environment(), indent=2))
    shutil.copyfile(run.loader.tokenizer_path, run.folder / TOKENIZER_NAME)
    described = json.dumps(describe_data(run.loader.manifest), indent=2)
    (run.folder / TRAINING_DATA_NAME).write_text(described + "\n")
    counts = num_parameters(run.model_config), num_parameters(run.model_config, active=True)
    peak, how = peak_tflops(run.config, run.model_config), "" if run.config.lora is None else " (LoRA)"
    unknown = "no MFU" if run.config.peak_tflops else "no MFU: set peak_tflops"
    print(
        f"{run.folder}: {counts[0]:,} parameters ({counts[1]:,} active a token), "
        f"{trained:,} trained{how}, "
        f"{run.state.world_size} ranks, ep_size {run.config.ep_size}, ZeRO stage {run.state.zero_stage}, "
        f"{run.config.global_batch_size} x {run.config.data.sequence_length} tokens a step, "
        + (unknown if peak is None else f"MFU and HFU of {peak:g} TFLOP/s a device")
    )


if __name__ == "__main__":
    main()
