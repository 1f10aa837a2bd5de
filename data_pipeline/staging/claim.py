"""Whose an output folder is: who writes there now, and which build the unfinished work in it belongs to.

Until a build is whole, everything it writes lies in `work/`, behind a claim: what the bytes depend on. So it
takes nothing for its own that a user put into the folder, and never deletes or overwrites it.
"""

import hashlib
import os
import re
import sys
import unicodedata
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from common.files import sync_folder
from common.locks import LOCK_NAME, FolderLock
from data_pipeline.errors import DataError
from data_pipeline.shards.manifest import MANIFEST, TOKENIZER
from data_pipeline.staging.build_plan import BuildPlan
from data_pipeline.staging.sealed import read_sealed, write_sealed

WORK = "work"  # folder of what only the build needs
CLAIM = "claim.json"
REPORTS = ("cleaning.json", "cleaning.txt")  # of a build that cleans
PACKAGE = Path(__file__).parents[1]
# Their versions may decide bytes.
LIBRARIES = ("numpy", "pyarrow", "rensa", "sentencepiece", "tokenizers", "webdataset", "xxhash", "zstandard")
_UNIT = r"[a-z0-9_]+-\d{5}(\.tmp)?"
# Everything that a build writes below `work/`.
_OWN = re.compile(
    rf"{_UNIT}(/(texts\.bin|(documents|labels|steps|exact|near)\.npy|about\.json)(\.tmp)?)?"
    r"|((claim|plan|manifest)\.json|tokenizer\.model|cleaning\.(json|txt))(\.tmp)?"
    r"|[a-z0-9_]+-[a-z]+(\.order|-\d{5}\.(tar|idx|json))(\.tmp)?"
    r"|(task-\d+|tasks-of-\d+)\.lock"
)
_OTHER = "choose another --out, or move it away"

Task = tuple[int, int] | None  # (number, of) where several processes share a build


# ---- who writes now


@contextmanager
def held(out: Path, task: Task) -> Iterator[FolderLock]:
    """Holds `out`: a task together with other tasks, a build alone. Raises FolderInUseError."""
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file: give a folder")
    purpose = "a build" if task is None else _tasks(task)
    with FolderLock(out, purpose, "choose another --out", shared=task is not None) as lock:
        yield lock


@contextmanager
def held_by_task(work: Path, task: Task) -> Iterator[list[FolderLock]]:
    """Holds the share of a task, so that no two processes write the same files. Raises FolderInUseError."""
    if task is None:
        yield []
        return
    number, of = task
    with ExitStack() as stack:
        own, name = f"task {number} of {of} of a build", f"tasks-of-{of}.lock"
        locks = [
            FolderLock(work, own, "give every task its own --task", name=f"task-{number}.lock"),
            FolderLock(work, _tasks(task), "-", shared=True, name=name),
        ]
        for lock in locks:
            stack.enter_context(lock)
        for path in work.glob("tasks-of-*.lock"):
            if path.name != name:  # shares of another number of tasks overlap with this one
                FolderLock(work, own, "give every task the same --of", name=path.name).release()
        yield locks


def _tasks(task: tuple[int, int]) -> str:
    """Of a lock that many hold: it names the one that took it last, which may have ended."""
    return f"tasks of a build, the last to start being {task[0]} of {task[1]}"


# ---- whose the work is


def claim(out: Path, identity: Mapping[str, Any], may_clear: bool) -> None:
    """Makes `out` the build's that `identity` describes: empty, or holding its unfinished work.

    Args:
        identity: part -> what the bytes depend on, as JSON has it; the parts are named in errors.
        may_clear: delete the unfinished work of another build.

    Raises:
        DataError: `out` holds anything else.
    """
    work = out / WORK
    _refuse_others(out)
    if work.is_dir() and any(work.iterdir()):
        found = read_sealed(work / CLAIM)
        if found == identity:
            return
        differs = ", ".join(sorted(key for key in identity if found.get(key) != identity[key]))
        left = f"{out} holds a part of another build (different: {differs})"
        if not may_clear or any(work.glob("tasks-of-*.lock")):
            raise DataError(f"{left}: choose another --out, or delete {work}")
        if foreign := _foreign(work):
            raise DataError(f"{left} and {foreign[0]}, which is not its own: {_OTHER}")
        print(f"{left}: it is deleted, and this one starts from the beginning", file=sys.stderr)
        remove_work(work)
    _create(out, identity)


def _create(out: Path, identity: Mapping[str, Any]) -> None:
    """`work/` appears with its claim in it, or not at all; of several tasks one creates it."""
    new = out / f"{WORK}.{uuid.uuid4().hex}.tmp"
    new.mkdir()
    write_sealed(new / CLAIM, identity)
    try:
        os.rename(new, out / WORK)  # fails if another task's is there
    except OSError:
        (new / CLAIM).unlink()
        new.rmdir()
        if not (out / WORK).is_dir():
            raise
        claim(out, identity, may_clear=False)
    sync_folder(out)


def _refuse_others(out: Path) -> None:
    work = out / WORK
    own = {WORK, LOCK_NAME, *published(work)}
    for path in sorted(out.iterdir()):
        if path.name not in own and not _is_claim_in_progress(path):
            raise DataError(f"{out} holds {path.name!r} and no finished build: {_OTHER}")
    if work.is_symlink() or (work.exists() and not is_own(work)):
        raise DataError(f"{work} is not the work folder of a build: {_OTHER}")


def _is_claim_in_progress(path: Path) -> bool:
    """Of a task that creates `work/` now, or was killed while it did."""
    if not re.fullmatch(rf"{WORK}\.[0-9a-f]{{32}}\.tmp", path.name) or not path.is_dir():
        return False
    return {inside.name for inside in path.iterdir()} <= {CLAIM, f"{CLAIM}.tmp"}


def is_own(work: Path) -> bool:
    """Whether a build made the folder; an empty one belongs to nobody."""
    return work.is_dir() and not work.is_symlink() and ((work / CLAIM).is_file() or not any(work.iterdir()))


# ---- from work to result


def published(work: Path) -> list[str]:
    """Names of the files that a whole build moves out of `work`, once it has begun to; the manifest last."""
    if not (work / MANIFEST).is_file():
        return []
    shards = BuildPlan.load(work).shards
    names = [f"{shard.stem}.{suffix}" for shard in shards for suffix in ("tar", "idx")]
    return [TOKENIZER, *REPORTS, *names, MANIFEST]


def publish(out: Path) -> None:
    """Moves a whole build out of `work/`, the manifest last. Raises DataError where a user's file is."""
    work = out / WORK
    names = [name for name in published(work) if (work / name).is_file()]
    for name in names:
        if (out / name).exists() or (out / name).is_symlink():
            raise DataError(
                f"{out / name} is in the way of the build: move it away and start the build again"
            )
    for name in names:
        if name == MANIFEST:
            sync_folder(out)  # a folder with a manifest has everything else
        os.rename(work / name, out / name)
    sync_folder(out)
    for left in filter(_is_claim_in_progress, out.iterdir()):
        for path in left.iterdir():
            path.unlink()
        left.rmdir()
    remove_work(work)


def remove_work(work: Path) -> None:
    """Deletes what a build left in its work folder; what is not its own stays, and a warning names it."""
    for name in _foreign(work):
        print(f"warning: {work / name} is not the build's and stays there", file=sys.stderr)
    own = [name for name in _names(work) if _OWN.fullmatch(name) and name != CLAIM]
    for name in [*own, CLAIM]:  # the claim last: without it nothing is known to be the build's
        _remove(work / name)
    _remove(work)


def _names(folder: Path) -> list[str]:
    """Of everything below `folder`, what is in a folder before the folder."""
    found = [Path(top, name) for top, folders, files in os.walk(folder) for name in (*folders, *files)]
    return [path.relative_to(folder).as_posix() for path in sorted(found, reverse=True)]


def _foreign(work: Path) -> list[str]:
    return [name for name in _names(work) if not _OWN.fullmatch(name)]


def _remove(path: Path) -> None:
    """Deletes a file, or a folder if it is empty."""
    if path.is_dir() and not path.is_symlink():
        if not any(path.iterdir()):
            path.rmdir()
    else:
        path.unlink(missing_ok=True)


# ---- code


def code_identity() -> str:
    """Hash of this package's sources and the versions of what it calls: any of them may decide bytes."""
    digest = hashlib.sha256(f"{sys.version_info[:2]} {unicodedata.unidata_version}".encode())
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            digest.update(f"{name} {metadata.version(name)}\n".encode())
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(PACKAGE)}\n".encode() + path.read_bytes())
    return digest.hexdigest()
