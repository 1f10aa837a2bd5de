"""Starts or continues a training run.

    deepspeed --num_accelerators 2 pretrain/main.py --ds_config ds_configs/zero3_ep.json \\
        --config pretrain/configs/demo.yaml [--config pretrain/configs/groups/NAME.yaml] [a.b=c ...]
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from common.errors import user_errors
from data_pipeline.errors import DataError
from model.counts import num_parameters
from model.export_files import TOKENIZER_NAME, TRAINING_DATA_NAME
from pretrain import checkpoint, lora
from pretrain.checkpoint import CheckpointError
from pretrain.dry_run import describe
from pretrain.export import describe_data, write_export
from pretrain.launch import join_slurm_step
from pretrain.metrics import environment, peak_tflops
from pretrain.setup import Run, choose_checkpoint, prepare
from pretrain.stopping import StopRequests

if TYPE_CHECKING:
    from pretrain.engine import Engine


def main() -> None:
    arguments = _parse()
    start(arguments, lambda: prepare(arguments.config, arguments.ds_config, arguments.overrides))


def start(arguments: argparse.Namespace, prepare_run: Callable[[], Run]) -> None:
    """Prepares a run, then describes it (--dry-run) or trains it."""
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
        # Imported late, as in _train.
        from pretrain.process_group import communication_problem

        problem = communication_problem(error)
        if problem is None:
            raise
        sys.exit(f"error: {problem}")


def _parse() -> argparse.Namespace:
    return argument_parser("Train a ZeroModel with DeepSpeed.").parse_intermixed_args()


def argument_parser(description: str) -> argparse.ArgumentParser:
    """The flags of every command that trains."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--config",
        required=True,
        action="append",
        help="YAML of the run, see pretrain/configs/; repeatable, later files override earlier ones",
    )
    parser.add_argument("--ds_config", required=True, help="DeepSpeed JSON, see ds_configs/")
    parser.add_argument(
        "--dry-run", action="store_true", help="describe the run and what it needs; do not start it"
    )
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="config keys to override")
    return parser


def _verified(run: Run, engine: "Engine") -> Path | None:
    """The checkpoint to resume from, its checksums verified; with resume=auto perhaps an older one.

    Raises:
        ValueError: the checkpoint that the user named is damaged.
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
        folder = choose_checkpoint(run.config, run.state, announce=run.rank == 0, below=step)
    return None


def _train(run: Run) -> None:
    # Imported late: deepspeed takes seconds, and a misspelt key should fail sooner.
    from pretrain import elastic
    from pretrain.engine import Engine
    from pretrain.process_group import init_process_group
    from pretrain.trainer import Trainer, TrainingError

    stop_requests = StopRequests(run.folder, run.config.time_limit_minutes, watches_file=run.rank == 0)
    stop_requests.install()  # before a large model's minutes of start-up
    init_process_group()
    weights = None if run.weights is None else load_file(run.weights)
    with user_errors(ValueError):
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
    if run.rank == 0:
        with user_errors(OSError):
            _write_run_folder(run, sum(shape.numel() for shape in engine.full_shapes().values()))
            if run.config.lora is not None and run.weights is not None:
                lora.save_base(run.folder, run.weights)
    engine.barrier()
    # All ranks raise the first two errors together, but one rank alone may read a damaged shard.
    with user_errors(TrainingError, CheckpointError), user_errors(DataError, from_every_rank=True):
        trainer.train()
    if trainer.step == run.config.max_steps:
        with user_errors(ValueError, OSError):
            _finish(run, engine)
    elif run.rank == 0:
        reason = stop_requests.reason() or "another rank's request"
        print(f"stopped after step {trainer.step} by {reason}; the same command continues")
    engine.barrier()
    engine.close()
    trainer.close()


def _finish(run: Run, engine: "Engine") -> None:
    """Writes the exports and DONE of a run that reached its last step."""
    _export(run, "export", engine.full_weights())
    if engine.average is not None:
        _export(run, "export_ema", engine.averaged_weights())
    if run.rank == 0:
        (run.folder / "DONE").write_text(f"{run.config.max_steps}\n")
        print(f"done: {run.config.max_steps} steps in {run.folder}, exported to {run.folder / 'export'}")


def _export(run: Run, name: str, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Gathers tensors on all ranks and exports them on rank 0 to a folder of the run."""
    weights = {}
    for key, value in tensors:
        if run.rank == 0:
            weights[key] = value.cpu()
    if run.rank == 0:
        if run.config.lora is not None:
            assert run.state.lora is not None
            weights = lora.merged(run.folder, weights, run.state.lora)
        write_export(run.folder / name, run.model_config, weights, run.folder)


def _write_run_folder(run: Run, trained: int) -> None:
    """config.yaml and ds_config.json as resolved, environment.json, the tokenizer.

    Args:
        trained: number of trained parameters.
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
        f"{run.folder}: {counts[0]:,} parameters ({counts[1]:,} active per token), "
        f"{trained:,} trained{how}, "
        f"{run.state.world_size} ranks, ep_size {run.config.ep_size}, ZeRO stage {run.state.zero_stage}, "
        f"{run.config.global_batch_size} x {run.config.data.sequence_length} tokens per step, "
        + (unknown if peak is None else f"MFU and HFU of {peak:g} TFLOP/s per device")
    )


if __name__ == "__main__":
    main()
