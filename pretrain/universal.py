"""DeepSpeed's checkpoint files, read without running pickled code, and its Universal Checkpoint.

A Universal Checkpoint holds full tensors by name: a run with another number of ranks, ep_size or ZeRO stage
resumes from it, and the offline export reads it.
"""

import argparse
import copy
import copyreg
import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor
from torch.utils.serialization import config as load_options

from common.files import writing_failed
from pretrain.checkpoint import read
from pretrain.expert_parallel import experts_in_checkpoints
from pretrain.muon import MOMENTUM, optimizer_states

# Python 3.11.2 (Debian 12) would pickle an enumeration as a call to getattr, which no reader should allow.
copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))


@contextmanager
def no_pickle_code() -> Iterator[None]:
    """Inside, DeepSpeed's checkpoint files are read without executing pickled code.

    DeepSpeed passes weights_only=False in many places; torch's own switch overrides it, and the few
    DeepSpeed classes that its files hold are allowed by name.
    """
    previous = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals(
            [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]
        ):
            yield
    finally:
        if previous is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = previous


def require_no_pickle_code(checkpoint: Path) -> None:
    """Reads every file of a checkpoint, except the tensors' bytes.

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
                f"delete {checkpoint} to resume from an older checkpoint"
            ) from error


def convert_to_universal(checkpoint: Path, scratch: Path) -> Path:
    """Rewrites a checkpoint of any layout as DeepSpeed's Universal Checkpoint: full tensors, by name.

    Returns:
        The folder, inside scratch.

    Raises:
        ValueError: an older version stored Muon's momentum, which DeepSpeed does not convert.
        OSError: the disk is full.
    """
    state = read(checkpoint)[0]
    if state.optimizer == "muon" and _holds_momentum(checkpoint):
        raise ValueError(
            f"checkpoint {checkpoint} of an older version stores Muon's momentum for one layout; resume the "
            "run with the same ranks, ep_size and ZeRO stage: its next checkpoint can be converted"
        )
    folder = scratch / "universal"
    arguments = argparse.Namespace(
        input_folder=str(checkpoint),
        output_folder=str(folder),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    mapped = patch.object(load_options.load, "mmap", True)  # or DeepSpeed would read whole files
    experts = experts_in_checkpoints(state.model.get("hidden_act", "silu"))
    try:
        with (
            mapped,
            experts,
            no_pickle_code(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            ds_to_universal.main(arguments)
    except RuntimeError as error:
        if "inline_container" not in str(error):
            raise
        failed = OSError(errno.EIO, "torch could not write all of it")  # it does not say why
        raise writing_failed(failed, folder, "the checkpoint is untouched") from error
    return folder


def _holds_momentum(checkpoint: Path) -> bool:
    [zero, *_] = sorted(checkpoint.glob("*_optim_states.pt"))
    with no_pickle_code():
        held = torch.load(zero, map_location="cpu", mmap=True, weights_only=True)["optimizer_state_dict"]
    return any(MOMENTUM in state for state in optimizer_states(held).values())


def make_universal_complete(folder: Path, shapes: dict[str, torch.Size]) -> None:
    """Adds to a Universal Checkpoint what ZeRO stages other than the one that wrote it read.

    ZeRO-3 writes flat tensors and the optimizer's step once; ZeRO-1 and 2 write shaped tensors, each with its
    step. The options of the parameter groups are left out: the resumed run sets them, and ZeRO-3 would apply
    those of the first group, including its weight decay, to all.
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


def load_universal(engine: Any, folder: Path, step: int) -> None:
    """Loads a complete Universal Checkpoint under any layout, as DeepSpeed's load_checkpoint does.

    load_checkpoint itself can read weights and optimizer from the folder, but expects files that only one
    ZeRO stage writes.

    Args:
        engine: DeepSpeed's.
        step: optimizer steps done.
    """
    zero3 = engine.zero_optimization_partition_weights()
    if zero3:
        engine.optimizer.checkpoint_event_prologue()
    with no_pickle_code():
        engine.optimizer.load_state_dict(None, checkpoint_folder=str(folder))
    if zero3:
        engine.optimizer.checkpoint_event_epilogue()
    else:
        engine.optimizer.update_lp_params()
    for state in engine.optimizer.state.values():
        # ZeRO-3 gives all parameters the same tensor, to which each would add its own 1 in every step.
        state["step"] = copy.deepcopy(state["step"])
    engine.global_steps = step


def universal_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and full fp32 value of every parameter of a Universal Checkpoint (flat, if ZeRO-3 wrote it)."""
    for path in sorted((folder / "zero").glob("*/fp32.pt")):
        stored = torch.load(path, map_location="cpu", weights_only=True)
        yield path.parent.name, stored["param"] if isinstance(stored, dict) else stored
