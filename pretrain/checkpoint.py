"""Checkpoints: whole or absent.

checkpoints/step-N/ holds DeepSpeed's files, buffers.safetensors, state.json, ema/ if the run averages its
weights and, written last, manifest.json; `latest` names the newest. A folder without a manifest that fits is
not a checkpoint.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:  # the offline export reads checkpoints without an engine
    from pretrain.engine import Engine

STATE, BUFFERS, MANIFEST = "state.json", "buffers.safetensors", "manifest.json"
EMA = "ema"  # folder of the moving average, if the run keeps one: NAME.safetensors for every parameter


@dataclass(frozen=True)
class TrainingState:
    """What a resumed run must agree with, and where it goes on."""

    step: int  # optimizer steps done
    model: dict[str, Any]  # ModelConfig.to_dict()
    data_fingerprint: str  # of shards, tokenizer, sequence length and order
    seed: int
    global_batch_size: int
    world_size: int
    ep_size: int
    zero_stage: int
    optimizer: str = "adamw"  # optimizer.kind


def save(engine: "Engine", run: Path, state: TrainingState, rank: int) -> Path:
    """Writes checkpoints/step-N on all ranks together and then points `latest` at it."""
    folder = run / "checkpoints" / f"step-{state.step}"
    if rank == 0 and folder.exists():
        shutil.rmtree(folder)  # an earlier attempt that never got its manifest
    engine.barrier()
    engine.save(folder)
    if rank == 0:
        buffers = {name: b.detach().cpu().contiguous() for name, b in engine.buffers().items()}
        save_file(buffers, folder / BUFFERS)
        (folder / STATE).write_text(json.dumps(asdict(state), indent=2))
        _seal(folder)
        _write_atomically(folder.parent / "latest", folder.name + "\n")
    engine.barrier()
    return folder


def _seal(folder: Path) -> None:
    """Forces the files to disk and writes their sizes and checksums."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        with path.open("rb") as f:
            os.fsync(f.fileno())
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": digest}
    _write_atomically(folder / MANIFEST, json.dumps(files, indent=2))


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def damage(folder: Path) -> str | None:
    """What keeps the folder from being a whole checkpoint, in a few words; None if nothing does."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except ValueError:
        return f"{MANIFEST} is not valid JSON"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        with path.open("rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != expected["sha256"]:
                return f"{name} does not have its checksum"
    return None


def steps(run: Path) -> list[int]:
    """Steps for which a folder exists, newest first, whole or not."""
    folders = (run / "checkpoints").glob("step-*")
    return sorted((int(f.name[5:]) for f in folders if f.name[5:].isdigit()), reverse=True)


def newest(run: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, and a line for every newer folder that is damaged."""
    skipped: list[str] = []
    for step in steps(run):
        folder = run / "checkpoints" / f"step-{step}"
        problem = damage(folder)
        if problem is None:
            return folder, skipped
        skipped.append(f"{folder} is not whole ({problem}); trying an older one")
    return None, skipped


def require_whole(folder: Path) -> None:
    """Raises ValueError if a checkpoint that the user named is damaged; `newest` checks its own."""
    problem = damage(folder)
    if problem is not None:
        raise ValueError(f"{folder} is not a whole checkpoint: {problem}; choose another step")


def read(folder: Path) -> tuple[TrainingState, dict[str, Tensor]]:
    """State and buffers of a checkpoint known to be whole."""
    state = TrainingState(**json.loads((folder / STATE).read_text()))
    return state, load_file(folder / BUFFERS)


def check_compatible(folder: Path, found: TrainingState, wanted: TrainingState) -> None:
    """Raises ValueError for the first thing in which the checkpoint and this run differ."""
    for key in sorted(found.model | wanted.model):
        theirs, ours = found.model.get(key), wanted.model.get(key)
        if theirs != ours and key != "preset":
            raise ValueError(
                f"checkpoint {folder} is of another model: its {key} is {theirs}, the config's is {ours}; "
                "use the same model or another output_dir"
            )
    mends = {
        "seed": "use the same seed or another output_dir",
        "data_fingerprint": "use the same data.path and data.sequence_length, or another output_dir",
        "global_batch_size": "use the same value or another output_dir",
        "world_size": "start the same number of ranks",
        "ep_size": "use the same ep_size",
        "zero_stage": "use the same ZeRO stage",
        "optimizer": "use the same optimizer.kind",
    }
    for key, mend in mends.items():
        theirs, ours = getattr(found, key), getattr(wanted, key)
        if theirs != ours:
            raise ValueError(f"checkpoint {folder} has {key}={theirs}, this run has {ours}; {mend}")


def load(engine: "Engine", folder: Path) -> int:
    """Loads a whole, compatible checkpoint into the engine and returns the optimizer steps done."""
    found, buffers = read(folder)
    engine.load(folder)
    for name, buffer in engine.buffers().items():
        buffer.copy_(buffers[name])
    return found.step
