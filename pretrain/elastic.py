"""Resuming under any layout: another number of ranks, ep_size or ZeRO stage.

Everything a step sees is a function of (config, step), so the state to carry over is weights, optimizer and
routers' biases. DeepSpeed's own files fit one layout; for another they go through its Universal Checkpoint.
"""

import shutil
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from pretrain import checkpoint
from pretrain.checkpoint import TrainingState, together
from pretrain.engine import Engine, convert_to_universal, no_pickle_code
from pretrain.process_group import rank


def load(engine: Engine, folder: Path, wanted: TrainingState, run: Path) -> int:
    """Loads a whole, compatible checkpoint into the engine; all ranks call it together.

    Args:
        wanted: the state whose layout the engine has.
        run: the run's folder, where a conversion puts its files for the time of loading.

    Returns:
        Optimizer steps done.

    Raises:
        CheckpointError: the files hold pickled code, or there is no room to convert them.
    """
    found, buffers = checkpoint.read(folder)
    first = rank() == 0
    scratch = run / "checkpoints" / "converting"
    together(engine, lambda: _check(folder, scratch) if first else None)
    if checkpoint.layout_changes(found, wanted):
        together(engine, lambda: _convert(engine, folder, scratch) if first else None)
        engine.load_universal(scratch / "universal", found.step)
        engine.load_average(folder)
        engine.barrier()  # nobody reads any more
        if first:
            shutil.rmtree(scratch)
    else:
        engine.load(folder)
    for name, buffer in engine.checkpoint_buffers().items():
        kept = min(buffer.shape[-1], buffers[name].shape[-1])  # of the guard's history: its window may change
        buffer[..., -kept:] = buffers[name][..., -kept:]
    return found.step


def _check(folder: Path, scratch: Path) -> None:
    require_no_pickle_code(folder)
    if scratch.exists():
        shutil.rmtree(scratch)  # of a start that was killed while it converted


def _convert(engine: Engine, folder: Path, scratch: Path) -> None:
    scratch.mkdir(parents=True)
    try:
        make_universal_complete(convert_to_universal(folder, scratch), engine.full_shapes())
    except (OSError, RuntimeError):
        shutil.rmtree(scratch)  # it would only keep the disk full
        raise


def make_universal_complete(folder: Path, shapes: dict[str, torch.Size]) -> None:
    """Adds to a Universal Checkpoint what a ZeRO stage other than the one that wrote it reads.

    ZeRO-3 writes flat tensors and the optimizer's step only once, ZeRO-1 and 2 write shaped tensors and the
    step beside each. The options of the parameter groups are left out: they are those of the run that goes
    on, and ZeRO-3 would give those of the first group, its weight decay too, to all.
    """
    path = folder / "zero" / "optimizer_state.pt"
    with no_pickle_code():
        state = torch.load(path, map_location="cpu", weights_only=True)
        if "optimizer_state_dict" in state:
            step = state["optimizer_state_dict"]["state"][0]["step"]
        else:
            step = torch.load(folder / "zero" / next(iter(shapes)) / "step.pt", weights_only=True)
    for name, shape in shapes.items():
        for key in ("fp32", "exp_avg", "exp_avg_sq"):
            file = folder / "zero" / name / f"{key}.pt"
            stored = torch.load(file, map_location="cpu", weights_only=True)
            if not isinstance(stored, dict):
                torch.save({"param": stored.view(shape)}, file)
        torch.save(step, folder / "zero" / name / "step.pt")
    groups: list[dict[str, Any]] = [{}] * len(shapes)  # as many as there can be
    common = {
        "ds_version": version("deepspeed"),
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": groups},
        "param_groups": groups,
    }
    torch.save(common, path)


def require_no_pickle_code(checkpoint: Path) -> None:
    """Reads everything but the tensors' bytes.

    Raises:
        ValueError: a file holds more than tensors and plain values.
    """
    for path in sorted(checkpoint.glob("*.pt")):
        try:
            with no_pickle_code():
                torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except UnpicklingError as error:
            raise ValueError(
                f"{path} holds pickled code, which is never run; "
                f"delete {checkpoint} to go on from an older checkpoint"
            ) from error
