"""Starts or continues a training run.

    deepspeed --num_accelerators 2 pretrain/main.py --ds_config ds_configs/zero3_ep.json \\
        --config pretrain/configs/demo.yaml [--config pretrain/configs/groups/NAME.yaml] \\
        [--init DIR] [a.b=c ...]
"""

import argparse
import atexit
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from common.errors import user_errors
from common.files import write_file, write_json
from common.locks import FolderInUseError, FolderLock
from data_pipeline.errors import DataError
from model.config.unused import unused_keys
from model.counts import num_parameters
from model.export_files import TOKENIZER_NAME, TRAINING_DATA_NAME
from pretrain import checkpoint, heartbeat, init
from pretrain.checkpoint import CheckpointError, together
from pretrain.disk_space import require_room
from pretrain.dry_run import describe
from pretrain.export import describe_data, with_base, write_export
from pretrain.launch import join_slurm_step
from pretrain.metrics import environment, peak_tflops, say
from pretrain.parts import Part
from pretrain.setup import Outline, Run, choose_checkpoint, prepare
from pretrain.stopping import STOP_FILE, StopRequests

if TYPE_CHECKING:
    from pretrain.engine import Engine
    from pretrain.trainer import Trainer

WAITS_PER_TIMEOUT = 10  # of communication_timeout_minutes; after each a standstill is worth a line


def main() -> None:
    arguments = _parse()
    given = (arguments.config, arguments.ds_config, arguments.overrides)
    start(arguments, lambda: prepare(*given, init=arguments.init, dry_run=arguments.dry_run))


def start(arguments: argparse.Namespace, prepare_run: Callable[[], Outline]) -> None:
    """Prepares a run, then describes it (--dry-run) or trains it."""
    join_slurm_step()
    stop_requests = StopRequests(int(os.environ.get("RANK", "0")))
    stop_requests.install()  # before a large model's minutes of start-up
    with user_errors(ValueError, OSError):
        run = prepare_run()
    if arguments.dry_run:
        if run.rank == 0:
            print(describe(run))
        return
    assert isinstance(run, Run)
    stop_requests.begin(run.folder, run.config.time_limit_minutes)
    try:
        _train(run, stop_requests)
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
        "--init",
        type=Path,
        metavar="DIR",
        help="export/ folder of a run, or one that model.hf import wrote, whose weights this run starts from",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="describe the run and what it needs; do not start it"
    )
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="config keys to override")
    return parser


def _join(run: Run) -> None:
    """Joins the other ranks; rank 0 takes the run's folder and keeps it until its process ends.

    Raises:
        ValueError: on all ranks, if rank 0 cannot have the folder or the ranks differ in what they train.
    """
    from pretrain.process_group import equal_on_all_ranks, init_process_group, on_any_rank

    minutes = run.config.communication_timeout_minutes
    init_process_group(minutes)
    problem = _hold(run.folder) if run.rank == 0 else None
    if on_any_rank(problem is not None):
        raise ValueError(problem)
    heartbeat.start(run.folder, run.rank, run.state.world_size, 60 * minutes / WAITS_PER_TIMEOUT, say)
    heartbeat.note("start", run.state.step)
    for line in unused_keys(run.model_config) if run.rank == 0 else ():
        print(line)
    parts = (asdict(run.config), run.ds_config, asdict(run.state))
    if not equal_on_all_ranks(json.dumps(parts, sort_keys=True, default=str)):
        raise ValueError(
            "the ranks have different configs, data or DeepSpeed JSONs; give all machines the same files and "
            "arguments, and two runs different ports"
        )


def _hold(folder: Path) -> str | None:
    """Locks the run's folder; returns the problem, if there is one."""
    try:
        lock = FolderLock(folder, "a training run", "choose another output_dir")
    except FolderInUseError as error:
        return str(error)
    except OSError as error:
        return (
            f"output_dir={folder} cannot be used ({error.filename}: {error.strerror}); choose a folder that "
            "can be created and written"
        )
    atexit.register(lock.release)  # when the thread that writes checkpoints has ended
    heartbeat.clear(folder)
    if (folder / STOP_FILE).is_dir():
        return f"{folder / STOP_FILE} is a folder, but a file of that name stops the run; remove or rename it"
    return None


def _verified(run: Run, engine: "Engine") -> Path | None:
    """The checkpoint to resume from, its checksums verified; with resume=auto perhaps an older one.

    Rank 0 chooses: another run may have written to the folder until this one had it, and another machine may
    not see its newest files yet.

    Raises:
        ValueError: the checkpoint that the user named is damaged, or the newest does not fit the run.
    """
    choose = partial(choose_checkpoint, run.config, run.state, announce=True)
    folder = together(engine, choose if run.rank == 0 else lambda: None)[0]
    while folder is not None:
        problem = checkpoint.damage_on_any_rank(engine, folder, run.rank, run.state.world_size)
        if problem is None:
            return folder
        if run.config.resume != "auto":
            checkpoint.require_whole(folder, problem)
        if run.rank == 0:
            print(f"warning: {checkpoint.passed_over(folder, problem)}")
        choose_older = partial(choose, below=int(folder.name[5:]))
        folder = together(engine, choose_older if run.rank == 0 else lambda: None)[0]
    return None


def _train(run: Run, stop_requests: StopRequests) -> None:
    # Imported late: deepspeed takes seconds, and a misspelt key should fail sooner.
    from pretrain import elastic
    from pretrain.engine import Engine
    from pretrain.trainer import Trainer, TrainingError

    with user_errors(ValueError):
        _join(run)
    with user_errors(ValueError, OSError):
        engine = Engine(run.config, run.model_config, run.ds_config, run.model_class, run.start)
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
    heartbeat.note("load of a checkpoint")
    with user_errors(ValueError):
        resume_from = _verified(run, engine)
        if resume_from is not None:
            trainer.step = elastic.load(engine, resume_from, run.state, run.folder)
        elif run.start is not None and run.start.weights is None:
            raise ValueError(
                f"{run.folder} has no checkpoint any more, and --init is gone; restore one of them"
            )
        trained = sum(shape.numel() for shape in engine.full_shapes().values())
        together(engine, lambda: _begin(run, trainer, trained) if run.rank == 0 else None)
    stop_requests.stepping = True
    # All ranks raise the first two errors together, but one rank alone may read a damaged shard.
    with user_errors(TrainingError, CheckpointError), user_errors(DataError, from_every_rank=True):
        trainer.train()
        if trainer.complete:
            _finish(run, engine)
    if not trainer.complete and run.rank == 0:
        reason = stop_requests.reason() or "another rank's request"
        print(f"stopped after step {trainer.step} by {reason}; the same command continues")
    heartbeat.note("end")
    engine.barrier()
    heartbeat.stop()
    engine.close()
    trainer.close()
    stop_requests.done()


def _begin(run: Run, trainer: "Trainer", trained: int) -> None:
    """Everything that may still refuse the run, on rank 0; what an earlier run left is taken away last."""
    run.folder.mkdir(parents=True, exist_ok=True)
    require_room(run, trained, trainer.step)
    _write_run_folder(run, trained)
    if run.start is not None and trainer.step == 0:
        print(*run.start.notes(), sep="\n")
    trainer.open()


def _finish(run: Run, engine: "Engine") -> None:
    """Writes the exports and DONE of a run that reached its last step.

    Raises:
        CheckpointError: on all ranks, if they cannot be written.
    """
    heartbeat.note("export")
    _export(run, engine, "export", engine.weight_parts())
    if engine.average is not None:
        _export(run, engine, "export_ema", engine.averaged_parts())
    done = f"{run.config.max_steps}\n".encode()
    together(engine, lambda: write_file(run.folder / "DONE", done) if run.rank == 0 else None)
    if run.rank == 0:
        print(f"done: {run.config.max_steps} steps in {run.folder}, exported to {run.folder / 'export'}")


def _export(run: Run, engine: "Engine", name: str, parts: Iterator[Part]) -> None:
    """Gathers weights on all ranks, one part at a time, and exports them on rank 0 to a folder of the run."""

    def write() -> None:
        try:
            if run.rank == 0:
                weights = with_base(run.folder, parts, run.state)
                write_export(run.folder / name, run.model_config, weights, run.folder)
        finally:
            for _ in parts:  # also if rank 0 cannot write: no rank may wait for another
                pass

    together(engine, write)


def _write_run_folder(run: Run, trained: int) -> None:
    """config.yaml and ds_config.json as resolved, environment.json, the tokenizer; where the weights came
    from, and those that are not trained.

    Args:
        trained: number of trained parameters.
    """
    resolved = OmegaConf.create({**asdict(run.config), "model": run.model_config.to_dict()})
    write_file(run.folder / "config.yaml", OmegaConf.to_yaml(resolved).encode())
    write_json(run.folder / "ds_config.json", run.ds_config, indent=2)
    write_json(run.folder / "environment.json", environment(), indent=2)
    write_file(run.folder / TOKENIZER_NAME, run.loader.tokenizer_path.read_bytes())
    write_json(run.folder / TRAINING_DATA_NAME, describe_data(run.loader.manifest), indent=2)
    if run.start is not None:
        init.write_record(run.folder, run.start)
        if run.config.lora is not None or run.start.frozen:
            init.save_base(run.folder, run.start)
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
