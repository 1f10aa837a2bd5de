"""Checkpoints: whole or absent.

checkpoints/step-N/ holds DeepSpeed's files, buffers.safetensors, state.json, ema/ if the run averages its
weights and, written last, manifest.json; `latest` names the newest. A folder without a matching manifest is
not a checkpoint.

Training pauses while the state is copied to memory; a background thread on each rank writes the files.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO, Protocol, TypeVar

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from common.files import sync_folder, write_file
from model import ModelConfig

T = TypeVar("T")
STATE, BUFFERS, MANIFEST = "state.json", "buffers.safetensors", "manifest.json"
EMA = "ema"  # folder of the moving average, if the run keeps one: NAME.safetensors for every parameter
Manifest = dict[str, dict[str, Any]]  # file -> bytes, sha256
ALL, NONE = slice(None), slice(0)  # parts of a checkpoint's files


class Checkpointed(Protocol):
    """What is saved, and the ranks that save it: an Engine."""

    def snapshot(self) -> dict[str, Any]:
        """This rank's checkpoint files, name -> contents copied to memory; all ranks take part."""

    def checkpoint_buffers(self) -> dict[str, Tensor]:
        """Tensors that are equal on every rank and in none of those files."""

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written or loaded: one line, the same on all ranks."""


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
    lora: dict[str, Any] | None = None  # see lora.identity; None: all weights are trained


class Saver:
    """Writes the checkpoints of a run in the background, one at a time; all ranks call it together.

    Args:
        run: the run's folder.
        keep_last: newest checkpoints to keep; older ones are deleted once a new one is whole.
        keep_every: also keep checkpoints whose step is a multiple of this; 0: none.
    """

    def __init__(self, engine: Checkpointed, run: Path, keep_last: int, keep_every: int, rank: int) -> None:
        self.engine, self.run, self.rank = engine, run, rank
        self.keep_last, self.keep_every = keep_last, keep_every
        # Python waits for the thread at exit, whatever ended the run, so a save that has begun finishes.
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None
        self.in_use: int | None = None  # step of a checkpoint being read, which is kept as well

    def save(self, state: TrainingState) -> None:
        """Copies the training state and returns; the checkpoint is whole some time later.

        Raises:
            CheckpointError: the previous checkpoint could not be written.
        """
        self.wait()
        files = self.engine.snapshot()
        if self.rank == 0:
            buffers = {
                name: b.detach().cpu().contiguous() for name, b in self.engine.checkpoint_buffers().items()
            }
            files[BUFFERS] = to_safetensors(buffers)
            files[STATE] = json.dumps(asdict(state), indent=2).encode()
        self.pending = self.thread.submit(self._write, state.step, files)

    def wait(self) -> None:
        """Returns when the last checkpoint is whole.

        Raises:
            CheckpointError: it could not be written, on some rank.
        """
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def idle(self) -> bool:
        """Whether the last checkpoint is whole."""
        return self.pending is None or (self.pending.done() and self.pending.exception() is None)

    def _write(self, step: int, files: dict[str, Any]) -> None:
        folder = self.run / "checkpoints" / f"step-{step}"
        first = self.rank == 0
        try:
            together(self.engine, lambda: _recreate(folder) if first else None)
            written = together(
                self.engine, lambda: {name: _write_digested(folder / name, files[name]) for name in files}
            )
            manifest = {name: entry for part in written for name, entry in part.items()}
            together(self.engine, lambda: self._seal(folder, manifest) if first else None)
        except CheckpointError as error:
            if first and not (folder / MANIFEST).exists():
                shutil.rmtree(folder, ignore_errors=True)  # a partial checkpoint only wastes disk space
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written: {error}; older ones are untouched: "
                "free disk space or make the folder writable, then run the same command again"
            ) from error

    def _seal(self, folder: Path, manifest: Manifest) -> None:
        """Makes a folder whose files are on disk a checkpoint."""
        seal(folder, manifest)
        write_file(folder.parent / "latest", f"{folder.name}\n".encode())
        rotate(self.run, int(folder.name[5:]), self.keep_last, self.keep_every, self.in_use)


def together(engine: Checkpointed, work: Callable[[], T]) -> list[T]:
    """Runs `work`, which must not communicate, on every rank and returns all ranks' results.

    Raises:
        CheckpointError: on all ranks if it failed on one, so that no rank is left waiting.
    """
    result: Any = None
    problem, cause = None, None
    try:
        result = work()
    except (OSError, ValueError, RuntimeError, UnpicklingError) as error:
        problem, cause = (str(error) or repr(error)).splitlines()[0], error
    outcomes = engine.gather((result, problem))
    problems = [text for _, text in outcomes if text is not None]
    if problems:
        raise CheckpointError(problems[0]) from cause
    return [value for value, _ in outcomes]


def _recreate(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)  # an earlier attempt at this step, or from before a resume
    folder.mkdir(parents=True)


class _Digesting:
    """A file that hashes what is written to it.

    An error is kept until the end: torch's writer crashes on one in the middle.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self.bytes = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
            self.sha256.update(data)
            self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        """torch calls this; _write_digested flushes at the end."""


def _write_digested(path: Path, content: Any) -> dict[str, Any]:
    """Writes bytes as they are and anything else with torch.save; on disk on return.

    Returns:
        Its entry in the manifest.
    """
    try:
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            target: Any = _Digesting(file)
            if isinstance(content, bytes):
                target.write(content)
            else:
                torch.save(content, target)
            if target.error is not None:
                raise target.error
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    return {"bytes": target.bytes, "sha256": target.sha256.hexdigest()}


def seal(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest: from here on the folder is a checkpoint, if its files match it."""
    write_file(folder / MANIFEST, json.dumps(manifest, indent=2).encode())
    sync_folder(folder.parent)


def rotate(run: Path, step: int, keep_last: int, keep_every: int, in_use: int | None = None) -> None:
    """Deletes checkpoints older than the newest keep_last up to `step`, and leftovers older than `step`.

    The checkpoint of step `in_use` stays until a later call.
    """
    folders = [run / "checkpoints" / f"step-{n}" for n in steps(run) if n <= step]
    sealed = [folder for folder in folders if (folder / MANIFEST).exists()]
    for folder in folders:
        number = int(folder.name[5:])
        stays = number == in_use or (keep_every > 0 and number % keep_every == 0)
        if folder in sealed[:keep_last] or (stays and folder in sealed):
            continue
        (folder / MANIFEST).unlink(missing_ok=True)  # first: a half-deleted folder must not look whole
        shutil.rmtree(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def damage(folder: Path, part: slice = ALL) -> str | None:
    """Why the folder is not a whole checkpoint, in a few words; None if it is one.

    Args:
        part: the files, in name order, whose checksums are compared, besides the small files that are read
            first; sizes are always compared.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except ValueError:
        return f"{MANIFEST} is not valid JSON"
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        return f"{MANIFEST} is not a table of files"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected.get("bytes"):
            return f"{name} has {path.stat().st_size} bytes instead of {expected.get('bytes')}"
    names = sorted(files)
    for name in {*names[part], *(small for small in (STATE, BUFFERS) if small in files)}:
        if _sha256(folder / name) != files[name].get("sha256"):
            return f"{name} does not match its checksum"
    return None


def damage_on_any_rank(engine: Checkpointed, folder: Path, rank: int, world_size: int) -> str | None:
    """`damage` with each file read by one rank only: large checkpoints are terabytes. All ranks call it."""
    found = together(engine, lambda: damage(folder, slice(rank, None, world_size)))
    return next((problem for problem in found if problem is not None), None)


def steps(run: Path) -> list[int]:
    """Steps for which a folder exists, newest first, whole or not."""
    folders = (run / "checkpoints").glob("step-*")
    return sorted((int(f.name[5:]) for f in folders if f.name[5:].isdigit()), reverse=True)


def newest(run: Path, below: float = math.inf, part: slice = ALL) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, and a warning for every newer folder that is damaged.

    Args:
        below: only earlier steps.
        part: see `damage`.
    """
    skipped: list[str] = []
    for step in steps(run):
        folder = run / "checkpoints" / f"step-{step}"
        if step >= below:
            continue
        problem = damage(folder, part)
        if problem is None:
            return folder, skipped
        skipped.append(passed_over(folder, problem))
    return None, skipped


def passed_over(folder: Path, problem: str) -> str:
    """The warning for a damaged checkpoint that resume=auto skips."""
    return f"{folder} is not whole ({problem}); trying an older one"


def require_whole(folder: Path, problem: str | None) -> None:
    """Raises ValueError if a checkpoint that the user named has a problem, see `damage`."""
    if problem is not None:
        raise ValueError(f"{folder} is not a whole checkpoint: {problem}; choose another step")


def read(folder: Path) -> tuple[TrainingState, dict[str, Tensor]]:
    """State and buffers of a checkpoint known to be whole."""
    state = TrainingState(**json.loads((folder / STATE).read_text()))
    return state, load_file(folder / BUFFERS)


def check_compatible(folder: Path, found: TrainingState, wanted: TrainingState) -> None:
    """Raises ValueError for the first difference between the checkpoint and this run.

    A model key that is newer than the checkpoint has its default there.
    """
    recorded = ModelConfig.from_dict(found.model).to_dict()
    for key, ours in wanted.model.items():
        theirs = recorded[key]
        if theirs != ours and key != "preset":
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


def layout_changes(found: TrainingState, wanted: TrainingState) -> list[str]:
    """The differences in layout that need a conversion, as `name old -> new`."""
    pairs = (
        (key, getattr(found, key), getattr(wanted, key)) for key in ("world_size", "ep_size", "zero_stage")
    )
    return [f"{key} {old} -> {new}" for key, old, new in pairs if old != new]
