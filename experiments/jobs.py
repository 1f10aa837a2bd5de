"""What is run for a cell of any matrix: a job builds data, trains, evaluates and writes the cell's record."""

import fcntl
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from common.files import json_object, write_file, write_json
from data_pipeline.shards.held_out import texts
from experiments.record import FAILED, RECORD
from experiments.settings import DS_CONFIG
from model.export_files import CONFIG_NAME

ROOT = Path(__file__).parents[1]
SETTINGS = "settings.json"  # of a cell's folder: what it was run with
DATA = "DATA"  # stands for the data folder among the flags of an evaluation
TEXT = "TEXT"  # stands for a file of its training texts among those of a conversion
TEXT_CHARACTERS = 2_000_000


@dataclass(frozen=True)
class Data:
    """Training data; jobs may share it."""

    name: str  # its folder below OUT/data
    recipe: str  # data_pipeline/recipes/NAME.yaml
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Start:
    """The model that a job trains on: a base and the conversions that make it."""

    base: Path  # export/ folder
    conversions: tuple[tuple[str, ...], ...]  # arguments of `python -m model.convert`, with TEXT


@dataclass(frozen=True)
class Job:
    """All that is run for one cell of a matrix."""

    name: str  # the cell's, and its folder below OUT/cells
    max_steps: int
    script: str  # the training script
    training: tuple[str, ...]  # its arguments, except --init, data.path and output_dir
    data: Data
    evaluations: dict[str, list[str]]  # name -> script and flags, except checkpoint and output
    results: str = "eval/{name}"  # folder of an evaluation's results, below the cell's
    teacher: str | None = None  # the job whose export this one starts from
    start: Start | None = None  # evaluated before the training as well
    record: Callable[[Path], dict[str, Any]] | None = None  # from the cell's folder; None: no record
    settings: dict[str, Any] | None = None  # which a resumed cell must equal; None: the arguments above


def cell_folder(name: str, out: Path) -> Path:
    return out / "cells" / name


def run_job(job: Job, out: Path) -> None:
    """Runs what is not done yet. Another process that runs the same job, on any machine, waits.

    Raises:
        ValueError: a step failed; the line names its log and is kept in `failed.json`.
    """
    folder = cell_folder(job.name, out)
    settings = job.settings or {
        "training": list(job.training),
        "data": list(job.data.overrides),
        "evaluations": job.evaluations,
    }
    if job.start is not None:
        settings["start"] = [str(job.start.base), *map(list, job.start.conversions)]
    with locked(folder / "lock") as lock:
        keep_settings(folder / SETTINGS, settings)
        if (folder / RECORD).is_file():
            return
        try:
            _train_and_evaluate(job, folder, out, lock)
        except (ValueError, OSError) as error:
            write_json(folder / FAILED, {"cell": job.name, "problem": str(error)})
            raise
        (folder / FAILED).unlink(missing_ok=True)


def _train_and_evaluate(job: Job, folder: Path, out: Path, lock: IO[str]) -> None:
    """Writes the record last."""
    data = build_data(job.data, out)
    init = None if job.teacher is None else cell_folder(job.teacher, out).absolute() / "export"
    evaluations = {
        name: (script, *(str(data) if flag == DATA else flag for flag in flags))
        for name, (script, *flags) in job.evaluations.items()
    }
    if job.start is not None:
        init = _converted(job.start, folder, data, lock)
        for name, evaluation in evaluations.items():
            _evaluate(folder, init, f"start/{name}", job.results, evaluation, lock)
    start = [] if init is None else ["--init", init]
    # Groups are compared in fp32, on a GPU too.
    precision = ["execution.precision=fp32"] if DS_CONFIG in job.training else []
    train(folder, job.script, *start, *job.training, *precision, f"data.path={data}", lock=lock)
    for name, evaluation in evaluations.items():
        _evaluate(folder, folder / "export", name, job.results, evaluation, lock)
    if job.record is not None:
        write_json(folder / RECORD, job.record(folder))


def _converted(start: Start, folder: Path, data: Path, lock: IO[str]) -> Path:
    """The folder of the model that a job starts from. What a conversion left half-way is made again."""
    source = start.base
    if any(TEXT in conversion for conversion in start.conversions) and not (folder / "text.txt").is_file():
        write_file(folder / "text.txt", _beginning(texts(data, "train")).encode())
    for number, conversion in enumerate(start.conversions):
        last = number == len(start.conversions) - 1
        made = (folder / ("start" if last else f"start-{number}")).absolute()
        if not (made / CONFIG_NAME).is_file():
            given = [str(folder.absolute() / "text.txt") if part == TEXT else part for part in conversion]
            command = (sys.executable, "-m", "model.convert", *given)
            call(folder / "convert.log", *command, "--checkpoint", source, "--out", made, lock=lock)
        if source != start.base:
            shutil.rmtree(source)
        source = made
    return source


def _beginning(documents: Iterable[str]) -> str:
    """The first documents, up to about TEXT_CHARACTERS."""
    chosen, length = list[str](), 0
    for document in documents:
        chosen.append(document)
        length += len(document)
        if length >= TEXT_CHARACTERS:
            break
    return "\n\n".join(chosen)


def build_data(data: Data, out: Path) -> Path:
    """The data's folder, built if missing. Another process that needs it, on any machine, waits.

    Raises:
        ValueError: the build failed; the line names its log.
    """
    folder = (out / "data" / data.name).absolute()
    with locked(folder.with_suffix(".lock")) as lock:
        keep_settings(folder.with_suffix(".json"), {"recipe": data.recipe, "overrides": list(data.overrides)})
        if not (folder / "manifest.json").is_file():
            recipe = f"data_pipeline/recipes/{data.recipe}.yaml"
            command = (sys.executable, "data_pipeline/build.py", "--recipe", recipe, "--out", folder)
            call(folder.with_suffix(".log"), *command, *data.overrides, lock=lock)
    return folder


@contextmanager
def locked(path: Path) -> Iterator[IO[str]]:
    """One process at a time, on any machine that shares the file system.

    The lock lasts as long as any process has the file: a command that is still running when this process is
    killed keeps it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def train(run: Path, script: str, *arguments: Any, lock: IO[str] | None = None) -> None:
    """Trains on one rank, unless `run` is DONE; `arguments` are all but output_dir.

    Raises:
        ValueError: it failed; the line names the log.
    """
    if (run / "DONE").is_file():
        return
    output = f"output_dir={run.absolute()}"
    call(run / "train.log", sys.executable, script, *arguments, output, lock=lock)


def _evaluate(
    folder: Path, checkpoint: Path, name: str, results: str, command: Sequence[str], lock: IO[str]
) -> None:
    """Once: the mark of a finished evaluation is written last.

    Args:
        name: of the evaluation.
        results: see Job.
        command: script and flags, except checkpoint and output.
    """
    mark = folder / "eval" / f"{name}.done"
    if mark.is_file():
        return
    script, *flags = command
    output = (folder / results.format(name=name)).absolute()
    paths = ("--checkpoint", checkpoint.absolute(), "--output_path", output)
    call(folder / f"eval {name.replace('/', ' ')}.log", sys.executable, script, *paths, *flags, lock=lock)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


class StoppedError(Exception):
    """The runner was told to stop, so a command ended early or did not start."""


_running: set["subprocess.Popen[bytes]"] = set()
_stopping = threading.Event()


def stop_commands() -> None:
    """Sends SIGTERM to every command that `call` runs, in any thread, and lets none start; training ends with
    a checkpoint.
    """
    _stopping.set()
    for process in tuple(_running):
        process.terminate()


def call(log: Path, *command: Any, lock: IO[str] | None = None) -> None:
    """Runs a single-threaded command in the repository's root; its output is appended to `log`.

    Args:
        lock: an open file that stays locked while the command runs, even if this process is killed.

    Raises:
        ValueError: it failed.
        StoppedError: see `stop_commands`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    if _stopping.is_set():
        raise StoppedError
    with log.open("a") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            pass_fds=() if lock is None else (lock.fileno(),),
            start_new_session=True,  # Ctrl-C reaches the runner alone, which ends it with SIGTERM
        )
        _running.add(process)
        if _stopping.is_set():
            process.terminate()
        code = process.wait()
        _running.discard(process)
    if _stopping.is_set():
        raise StoppedError
    if code:
        name = command[2] if command[1] == "-m" else Path(str(command[1])).name
        raise ValueError(f"{name} failed with code {code}: see {log}")


def keep_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Stores the settings of a cell or of its data. Raises ValueError if other ones are stored."""
    stored = _stored_settings(path) if path.is_file() else settings
    for key, now in settings.items():
        before = stored.get(key)
        if before != now:
            name, before, now = _difference(key, before, now)
            raise ValueError(
                f"{path.parent} was made with {name} {before}, but {now} is asked for; give another --out or "
                "move it away"
            )
    if not path.is_file():
        write_json(path, settings)


def _stored_settings(path: Path) -> dict[str, Any]:
    stored = json_object(path.read_bytes())
    if stored is None:
        raise ValueError(
            f"{path} is damaged, so nobody knows what {path.parent} was made with; move that folder away"
        )
    return stored


def _difference(name: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """The first entry in which two settings differ: its name, with all keys down to it, and both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            if before.get(key) != now.get(key):
                return _difference(f"{name} {key}", before.get(key), now.get(key))
    if isinstance(before, list) and isinstance(now, list):
        for a, b in zip(before, now, strict=False):
            if a != b:
                return name, a, b
    return name, before, now


def run_all(
    work: Mapping[str, Callable[[], None]], jobs: int, after: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Runs pieces of work in their order, `jobs` at once, with a progress bar.

    Args:
        after: piece -> the earlier piece whose result it needs.

    Returns:
        The pieces that failed with a ValueError or OSError, and why. Only pieces that need them are skipped.
    """
    after, futures = after or {}, dict[str, Future[str | None]]()

    def attempt(name: str) -> str | None:
        needed = after.get(name)
        if needed is not None and futures[needed].result() is not None:
            return f"needs {needed}, which failed"
        try:
            work[name]()
        except (ValueError, OSError) as error:
            return str(error)
        return None

    pool = ThreadPoolExecutor(jobs)
    try:
        for name in work:
            futures[name] = pool.submit(attempt, name)
        names = {future: name for name, future in futures.items()}
        with tqdm(total=len(work), unit="cell", disable=None) as bar:
            for future in as_completed(names):
                problem = future.result()
                bar.write(f"{names[future]}: {problem or 'done'}")
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)  # after an interrupt, nothing more is started
    return {name: problem for name, future in futures.items() if (problem := future.result()) is not None}
