"""Worker processes of a build."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

from tqdm import tqdm

from common.locks import FolderLock

B = TypeVar("B")
J = TypeVar("J")


class Processes:
    """Does jobs in this process or in worker processes, which hold the build's locks and end with it."""

    def __init__(self, workers: int, locks: Sequence[FolderLock]) -> None:
        self._workers, self._locks = workers, locks

    def map(
        self, function: Callable[[B, J], None], build: B, jobs: Sequence[J], what: str, unit: str
    ) -> None:
        """function(build, job) for every job."""
        if not jobs:
            return
        workers = min(self._workers, len(jobs))
        with tqdm(total=len(jobs), desc=what, unit=unit, disable=None) as bar:
            if workers == 1:
                for job in jobs:
                    function(build, job)
                    bar.update()
                return
            with self._pool(workers) as pool:
                running = [pool.submit(function, build, job) for job in jobs]
                try:
                    for done in as_completed(running):
                        done.result()
                        bar.update()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise

    def _pool(self, workers: int) -> ProcessPoolExecutor:
        # Spawned: a fork would copy the locks of this process's threads.
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(workers, context, initializer=_end_with_parent, initargs=(self._locks,))


def _end_with_parent(locks: Any) -> None:
    """In a worker, which would wait for jobs forever after its parent was killed; `locks` hold the folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
