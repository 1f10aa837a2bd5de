"""Resuming under any layout: another number of ranks, ep_size or ZeRO stage.

Everything a step sees is a function of (config, step), so the state to carry over is weights, optimizer and
router biases. DeepSpeed's own files fit one layout; for another they become a Universal Checkpoint.
"""

import shutil
from pathlib import Path

from common.errors import error_line
from pretrain import checkpoint
from pretrain.checkpoint import CheckpointError, TrainingState, together
from pretrain.engine import Engine
from pretrain.process_group import rank
from pretrain.universal import (
    convert_to_universal,
    load_universal,
    make_universal_complete,
    require_no_pickle_code,
)


def load(engine: Engine, folder: Path, wanted: TrainingState, run: Path) -> int:
    """Loads a whole, compatible checkpoint into the engine; all ranks call it together.

    Args:
        wanted: the state whose layout the engine has.
        run: the run's folder, which holds a conversion's files while they are loaded.

    Returns:
        Optimizer steps done.

    Raises:
        CheckpointError: the files hold pickled code, or the disk is too full to convert them.
    """
    found, buffers = checkpoint.read(folder)
    first = rank() == 0
    scratch = run / "checkpoints" / "converting"
    together(engine, lambda: _check(folder, scratch) if first else None)
    if checkpoint.layout_changes(found, wanted):
        together(engine, lambda: _convert(engine, folder, scratch) if first else None)
        load_universal(engine.deepspeed, scratch / "universal", found.step)
        engine.finish_loading(folder)
        engine.barrier()  # until every rank has read its part
        if first:
            shutil.rmtree(scratch, ignore_errors=True)  # what stays only wastes disk space
    else:
        engine.load(folder)
    for name, buffer in engine.checkpoint_buffers().items():
        if name not in buffers or buffers[name].shape[:-1] != buffer.shape[:-1]:
            raise CheckpointError(f"checkpoint {folder} does not hold the buffer {name}; choose another step")
        kept = min(buffer.shape[-1], buffers[name].shape[-1])  # the guard's window may have changed
        buffer[..., -kept:] = buffers[name][..., -kept:]
    if wanted.optimizer == "muon" and (found.zero_stage == 3) != (wanted.zero_stage == 3):
        engine.guard.forget()  # under ZeRO-3 its norms are of gradients, otherwise of Muon's updates
    return found.step


def _check(folder: Path, scratch: Path) -> None:
    require_no_pickle_code(folder)
    if scratch.exists():
        shutil.rmtree(scratch, ignore_errors=True)  # of a start that was killed while converting


def _convert(engine: Engine, folder: Path, scratch: Path) -> None:
    scratch.mkdir(parents=True)
    try:
        make_universal_complete(convert_to_universal(folder, scratch), engine.full_shapes())
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(scratch).free
        raise ValueError(
            f"{folder} could not be converted to another layout in {scratch}: {error_line(error)} ({free:,} "
            "bytes free); the checkpoint is untouched: free disk space, or resume with its ranks, ep_size "
            "and ZeRO stage"
        ) from error
    finally:
        if not (scratch / "universal" / "zero" / "optimizer_state.pt").exists():
            shutil.rmtree(scratch, ignore_errors=True)
