"""Room for a run's files, before its first step: a full disk after hours would cost them."""

import json
import math
import shutil
from pathlib import Path

from model.counts import num_parameters
from model.export_files import FIX
from model.weight_files import weight_files, weights_path
from pretrain import checkpoint
from pretrain.ds_config import training_dtype
from pretrain.init import BASE
from pretrain.setup import Run


def require_room(run: Run, trained: int, step: int) -> None:
    """Compares the free space with what keep_last checkpoints and the exports still need.

    A checkpoint is written before the oldest one is deleted, so keep_last + 1 exist for a moment. Those of
    keep_every are not counted, nor are quotas, which only a write meets.

    Args:
        trained: number of trained parameters.
        step: optimizer steps done.

    Raises:
        ValueError: one line with the numbers.
    """
    config, exports = run.config, 4 * num_parameters(run.model_config)
    names = ["export"] if config.optimizer.ema_decay is None else ["export", "export_ema"]
    missing = _base_bytes(run) + exports * sum(not weights_path(run.folder / name).exists() for name in names)
    there = [size for size in map(_size, _folders(run.folder)) if size]
    each = there[0] if there else checkpoint_bytes(run, trained)
    saves = math.ceil((config.max_steps - step) / config.save_every)
    counted = min(len(there), config.keep_last)
    while_saving = each * min(saves, config.keep_last + 1 - counted)
    at_the_end = each * min(saves, config.keep_last - counted)
    place = run.folder / checkpoint.CHECKPOINTS
    if place.exists() and place.stat().st_dev != run.folder.stat().st_dev:  # linked to another disk
        needs = {place: while_saving, run.folder: missing}
    else:
        needs = {run.folder: max(while_saving, at_the_end + missing)}
    for folder, needed in needs.items():
        total, _, free = shutil.disk_usage(folder)
        if needed > free and total > 0:  # 0: a file system that does not know
            raise ValueError(
                f"{folder} has {free:,} bytes free, but the run needs {needed:,} more: checkpoints of "
                f"{each:,} bytes, of which keep_last={config.keep_last} and the one being written exist at "
                f"once and {counted} are there, and {missing:,} for exports and frozen weights; free "
                "disk space, lower keep_last or choose another output_dir"
            )


def checkpoint_bytes(run: Run, trained: int) -> int:
    """Of the large tensors: an fp32 weight and AdamW's two moments (Muon has one) per trained parameter, the
    moving average, and below ZeRO-3 the weights as the model computes with them.
    """
    moments = 2 if run.config.optimizer.kind == "adamw" else 1
    average = run.config.optimizer.ema_decay is not None
    computing = 0 if run.state.zero_stage == 3 else training_dtype(run.ds_config).itemsize
    return trained * (4 * (1 + moments + average) + computing)


def _base_bytes(run: Run) -> int:
    """Of the weights that no checkpoint will hold, if they are still to be copied."""
    start, keeps = run.start, run.config.lora is not None or run.config.init.frozen
    if not keeps or start is None or start.weights is None or (run.folder / BASE).exists():
        return 0
    return sum(path.stat().st_size for path in weight_files(start.weights, FIX))


def _folders(run: Path) -> list[Path]:
    return [run / checkpoint.CHECKPOINTS / f"step-{step}" for step in checkpoint.steps(run)]


def _size(folder: Path) -> int:
    """Bytes of a checkpoint that rotation counts, by its manifest; 0 for any other folder."""
    if folder.is_symlink() or checkpoint.damage(folder, checkpoint.NONE) is not None:
        return 0
    return sum(entry["bytes"] for entry in json.loads((folder / checkpoint.MANIFEST).read_bytes()).values())
