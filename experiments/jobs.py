"""What the experiments share: commands with a log, training on one rank, pieces of work, settings."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
SETTINGS = "settings.json"  # what a folder's runs were told, see changed_setting


def call(log: Path, *command: Any) -> None:
    """Runs a command of one thread in the repository's root; its output goes to `log`.

    Raises:
        ValueError: it failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        done = subprocess.run(
            [str(part) for part in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
    if done.returncode:
        raise ValueError(f"{Path(str(command[1])).name} failed with code {done.returncode}: see {log}")


def train(run: Path, script: str, *arguments: Any) -> None:
    """Trains on one rank, unless `run` is DONE; `arguments` are all but output_dir.

    Raises:
        ValueError: it failed; the line names the log.
    """
    if (run / "DONE").is_file():
        return
    call(run / "train.log", sys.executable, script, *arguments, f"output_dir={run.absolute()}")


def run_all(
    work: Mapping[str, Callable[[], None]], jobs: int, after: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Does pieces of work, started in their order, `jobs` at once, with a progress bar.

    Args:
        after: a piece -> an earlier one, whose result it needs.

    Returns:
        The pieces that failed, by a ValueError or OSError, and why. Only what needs them is left out.
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
        pool.shutdown(cancel_futures=True)  # after an interrupt, what has not begun does not begin
    return {name: problem for name, future in futures.items() if (problem := future.result()) is not None}


def changed_setting(path: Path, settings: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first setting that a file, if there is one, notes otherwise: its name, the noted one, the new."""
    noted = json.loads(path.read_text()) if path.is_file() else settings
    return next(((k, noted.get(k), now) for k, now in settings.items() if noted.get(k) != now), None)
