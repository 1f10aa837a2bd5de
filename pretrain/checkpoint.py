"""Checkpoints: whole or absent. saver.py writes them.

checkpoints/step-N/ holds DeepSpeed's files, buffers.safetensors, state.json, ema/ if the run averages its
weights and, written last, manifest.json; `latest` names the newest. A folder without a matching manifest is
not a checkpoint. Folders with other names (step-07) and files are nobody's business here.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from common.errors import error_line
from common.files import sync_folder, write_file, writing_failed
from common.schema import from_plain
from model import ModelConfig
from model.weight_files import read_tensors
from pretrain.patience import gather_when_done

T = TypeVar("T")
CHECKPOINTS, LATEST = "checkpoints", "latest"  # folder of a run, and the file in it
STATE, BUFFERS, MANIFEST = "state.json", "buffers.safetensors", "manifest.json"
EMA = "ema"  # folder of the moving average, if the run keeps one: NAME.safetensors for every parameter
STEP_NAME = re.compile("step-(0|[1-9][0-9]*)")
Manifest = dict[str, dict[str, Any]]  # file -> bytes, sha256
ALL, NONE = slice(None), slice(0)  # parts of a checkpoint's files


class Checkpointed(Protocol):
    """What is saved, and the ranks that save it: an Engine."""

    def snapshot(self) -> dict[str, Any]:
        """This rank's files, name -> contents, in memory once `copied` returns; all ranks take part."""

    def copied(self) -> None:
        """Returns when the last snapshot is in memory; any thread may call it."""

    def checkpoint_buffers(self) -> dict[str, Tensor]:
        """Tensors that are equal on every rank and in none of those files."""

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written or loaded: one line, the same on all ranks."""


@dataclass(frozen=True)
class Origin:
    """The weights that a run began with, and which of them it trains how; see init.Start."""

    sha256: str
    missing: tuple[str, ...]
    frozen: tuple[str, ...]
    old_lr_scale: float


@dataclass(frozen=True)
class TrainingState:
    """What a resumed run must agree with, and the step it resumes at."""

    step: int  # optimizer steps done
    model: dict[str, Any]  # ModelConfig.to_dict()
    data_fingerprint: str  # of shards, tokenizer, sequence length and order
    seed: int
    global_batch_size: int
    world_size: int
    ep_size: int
    zero_stage: int
    optimizer: str = "adamw"  # optimizer.kind
    lora: dict[str, Any] | None = None  # see lora.identity; None: no adapters
    origin: Origin | None = None  # None: the run began with initial weights


def together(engine: Checkpointed, work: Callable[[], T]) -> list[T]:
    """Runs `work`, which must not communicate, on every rank and returns all ranks' results.

    It may take longer on one rank than communication_timeout_minutes, see patience.py.

    Raises:
        CheckpointError: on all ranks if it failed on one, so that no rank is left waiting.
    """
    causes: list[Exception] = []

    def attempt() -> tuple[Any, str | None]:
        try:
            return work(), None
        except (OSError, ValueError, RuntimeError, MemoryError, UnpicklingError, SafetensorError) as error:
            causes.append(error)
            return None, error_line(error)

    outcomes = gather_when_done(engine.gather, attempt)
    problems = [text for _, text in outcomes if text is not None]
    if problems:
        raise CheckpointError(problems[0]) from (causes[0] if causes else None)
    return [value for value, _ in outcomes]


def seal(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest: from here on the folder is a checkpoint, if its files match it."""
    write_file(folder / MANIFEST, json.dumps(manifest, indent=2).encode())
    try:
        sync_folder(folder.parent)
    except OSError as error:
        raise writing_failed(error, folder) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def damage(folder: Path, part: slice = ALL) -> str | None:
    """Why the folder is not a whole checkpoint, in a few words; None if it is one. Raises nothing.

    Args:
        part: the files, in name order, whose checksums are compared, besides the small files that are read
            first; sizes are always compared.
    """
    try:
        return _damage(folder, part)
    except OSError as error:  # a failing disk damages a file as a flipped bit does
        return f"{Path(error.filename or folder).name} cannot be read: {error.strerror or error}"


def _damage(folder: Path, part: slice) -> str | None:
    try:
        files = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, RecursionError):
        return f"{MANIFEST} is not valid JSON"
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        return f"{MANIFEST} is not a table of files"
    small = (STATE, BUFFERS)
    for name in small:
        if name not in files:
            return f"{MANIFEST} does not list {name}"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected.get("bytes"):
            return f"{name} has {path.stat().st_size} bytes instead of {expected.get('bytes')}"
    for name in {*sorted(files)[part], *small}:
        if _sha256(folder / name) != files[name].get("sha256"):
            return f"{name} does not match its checksum"
    return None


def damage_on_any_rank(engine: Checkpointed, folder: Path, rank: int, world_size: int) -> str | None:
    """`damage` with each file read by one rank only: large checkpoints are terabytes. All ranks call it."""
    found = together(engine, lambda: damage(folder, slice(rank, None, world_size)))
    return next((problem for problem in found if problem is not None), None)


def steps(run: Path) -> list[int]:
    """Steps for which a folder exists, newest first, whole or not.

    Raises:
        OSError: the folder of checkpoints cannot be read, or is a link to nothing, such as an unmounted disk.
    """
    folder = run / CHECKPOINTS
    if not os.path.lexists(folder):
        return []
    if not folder.exists():
        raise FileNotFoundError(f"{folder} is a link to nothing; mount what it links to, or delete the link")
    with os.scandir(folder) as entries:
        names = [STEP_NAME.fullmatch(entry.name) for entry in entries if entry.is_dir()]
    return sorted((int(name[1]) for name in names if name), reverse=True)


def newest(run: Path, below: float = math.inf, part: slice = ALL) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint of a run, and the damage of every newer folder.

    Args:
        below: only earlier steps.
        part: see `damage`.
    """
    damaged: dict[Path, str] = {}
    for step in steps(run):
        folder = run / CHECKPOINTS / f"step-{step}"
        if step >= below:
            continue
        problem = damage(folder, part)
        if problem is None:
            return folder, damaged
        damaged[folder] = problem
    return None, damaged


def passed_over(folder: Path, problem: str) -> str:
    """The warning for a damaged checkpoint that resume=auto skips."""
    return f"{folder} is not whole ({problem}); trying an older one"


def never_saved(run: Path) -> bool:
    """Whether no checkpoint has ever been whole: at most the first save was interrupted."""
    sealed = (run / CHECKPOINTS / f"step-{step}" / MANIFEST for step in steps(run))
    return not (run / CHECKPOINTS / LATEST).exists() and not any(path.exists() for path in sealed)


def require_whole(folder: Path, problem: str | None) -> None:
    """Raises ValueError if a checkpoint that the user named has a problem, see `damage`."""
    if problem is not None:
        raise ValueError(f"{folder} is not a whole checkpoint: {problem}; choose another step")


def averages(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of the moving average in a whole checkpoint that holds one, one after another."""
    for path in sorted((folder / EMA).iterdir()):
        yield from read_tensors(path, "choose another step")


def read(folder: Path) -> tuple[TrainingState, dict[str, Tensor]]:
    """State and buffers of a checkpoint known to be whole.

    Raises:
        ValueError: one line; another version of the code may have written them.
    """
    try:
        state = from_plain(TrainingState, json.loads((folder / STATE).read_bytes()), STATE)
        return state, load_file(folder / BUFFERS)
    except (ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"checkpoint {folder} cannot be used: {error_line(error)}") from None


def _difference(key: str, theirs: Any, ours: Any) -> tuple[str, Any, Any]:
    """The first key of a section that differs, with the keys down to it; a plain value is its own."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        name = next(name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name))
        return _difference(f"{key}.{name}", theirs.get(name), ours.get(name))
    return key, theirs, ours


def check_compatible(folder: Path, found: TrainingState, wanted: TrainingState) -> None:
    """Raises ValueError for the first difference between the checkpoint and this run.

    A model key that is newer than the checkpoint has its default there.
    """
    if found.origin is not None and wanted.origin is None:
        raise ValueError(
            f"checkpoint {folder} began with given weights, but this run has no --init; give the same --init "
            "or another output_dir"
        )
    recorded = ModelConfig.from_stored(found.model).to_dict()
    for key, ours in wanted.model.items():
        theirs = recorded[key]
        if theirs != ours and key != "preset":
            key, theirs, ours = _difference(key, theirs, ours)
            raise ValueError(
                f"checkpoint {folder} is of another model: its {key} is {theirs}, the config's is {ours}; "
                "use the same model or another output_dir"
            )
    fixes = {
        "seed": "use the same seed or another output_dir",
        "data_fingerprint": "use the same data.path and data.sequence_length, or another output_dir",
        "global_batch_size": "use the same value or another output_dir",
        "optimizer": "use the same optimizer.kind",
        "lora": "use the same lora.r, lora.alpha and --init, or another output_dir",
    }
    for key, fix in fixes.items():
        theirs, ours = getattr(found, key), getattr(wanted, key)
        if theirs != ours:
            raise ValueError(f"checkpoint {folder} has {key}={theirs}, this run has {ours}; {fix}")
    if wanted.origin is not None:
        plain = not wanted.origin.frozen and wanted.origin.old_lr_scale == 1
        if found.origin is None and recorded["distillation"] and plain:
            return  # an older version, where distillation recorded no start
        _check_origin(folder, found.origin, wanted.origin)


def _check_origin(folder: Path, found: Origin | None, wanted: Origin) -> None:
    if found is None:
        raise ValueError(
            f"checkpoint {folder} began with initial weights; leave --init out or use another output_dir"
        )
    if found.sha256 != wanted.sha256:
        raise ValueError(
            f"checkpoint {folder} began with other weights (sha256 {found.sha256[:12]}) than those of --init "
            f"({wanted.sha256[:12]}); give the same --init or another output_dir"
        )
    if found.old_lr_scale != wanted.old_lr_scale:
        raise ValueError(
            f"checkpoint {folder} has init.old_lr_scale={found.old_lr_scale}, this run has "
            f"{wanted.old_lr_scale}; use the same value or another output_dir"
        )
    differ = sorted(set(found.frozen) ^ set(wanted.frozen))
    if differ:
        held = "frozen" if differ[0] in found.frozen else "not frozen"
        raise ValueError(
            f"{differ[0]} is {held} in checkpoint {folder}, but not in this run; use the same init.frozen or "
            "another output_dir"
        )


def layout_changes(found: TrainingState, wanted: TrainingState) -> list[str]:
    """The differences in layout that need a conversion, as `name old -> new`."""
    pairs = (
        (key, getattr(found, key), getattr(wanted, key)) for key in ("world_size", "ep_size", "zero_stage")
    )
    return [f"{key} {old} -> {new}" for key, old, new in pairs if old != new]
