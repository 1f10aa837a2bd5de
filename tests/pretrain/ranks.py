"""Ranks on one node as DeepSpeed's launcher starts them, but without its two processes that import torch.

    python ranks.py

starts ranks for every line it reads: JSON with ranks, port, command, environment, and the files `out` and
`err`. It answers with their process ids, and when all have ended, with 1 if one failed, else 0. They are
forked from this process, which has imported everything: that saves 4 CPU-seconds per rank. Forks share their
hash seed, so the iteration order of sets of strings is left to the tests that use other launchers.
"""

import importlib
import json
import os
import random
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

LIMIT, GRACE = 400, 30  # seconds: per launch; for the other ranks after one has failed
IMPORTED = ("torch._dynamo", "pretrain.main", "pretrain.elastic", "pretrain.trainer", "distill.student")


def rank_variables(number: int, ranks: int, port: str) -> dict[str, str]:
    """The variables that the launcher sets for a rank; a single rank needs none."""
    if ranks == 1:
        return {}
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {**world, "RANK": str(number), "LOCAL_RANK": str(number)}


def words(number: int, ranks: int, command: list[str]) -> list[str]:
    script, *arguments = command
    return [script, *([f"--local_rank={number}"] if ranks > 1 else []), *arguments]


def wait(running: set[int]) -> int:
    """If a rank fails, terminates the others and kills them after a while. Returns 1 if one failed."""

    def kill(*_: Any) -> None:
        for pid in running:
            os.kill(pid, signal.SIGKILL)

    signal.signal(signal.SIGALRM, kill)
    signal.alarm(LIMIT)
    failed = 0
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if status and not failed:
            failed = 1
            signal.alarm(GRACE)
            for other in running:
                os.kill(other, signal.SIGTERM)
    signal.alarm(0)
    return failed


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # imports print
    for module in IMPORTED:
        importlib.import_module(module)
    for line in sys.stdin:
        asked = json.loads(line)
        pids = []
        for number in range(asked["ranks"]):
            pid = os.fork()
            if not pid:
                become(number, asked)
                return
            pids.append(pid)
        print(json.dumps(pids), file=answers, flush=True)
        print(wait(set(pids)), file=answers, flush=True)


def become(number: int, asked: dict[str, Any]) -> None:
    """Runs the script in this process, which ends with it."""
    os.environ.clear()
    os.environ.update(asked["environment"] | rank_variables(number, asked["ranks"], asked["port"]))
    for descriptor, path in ((0, os.devnull), (1, asked["out"]), (2, asked["err"])):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    random.seed()
    sys.argv = words(number, asked["ranks"], asked["command"])
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    serve()
