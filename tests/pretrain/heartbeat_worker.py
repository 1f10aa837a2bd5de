"""Three ranks of a real process group: busy longer than its time-out, and stopped in the middle of a step.

    heartbeat_worker.py RUN LIMIT

The test wakes each stopped rank when the others have named it.
"""

import os
import signal
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from pretrain import heartbeat
from pretrain.expert_parallel import create_groups
from pretrain.patience import gather_when_done
from pretrain.process_group import all_reduce_sum, init_process_group, rank, world_size

STOPPED_AT = {2: 2, 4: 0}  # step: rank
TIMEOUT, PATIENCE = 1.5, 0.2  # seconds
ROUNDS = 9  # for which rank 0 is busy, longer than the time-out


def main() -> None:
    run, limit = Path(sys.argv[-2]), float(sys.argv[-1])
    init_process_group(timeout_minutes=2)
    create_groups(1)
    dist.new_group(backend="gloo")
    groups = dist.distributed_c10d._world.pg_map
    timeouts = {group._get_backend(torch.device("cpu")).options._timeout for group in groups}
    assert timeouts == {timedelta(minutes=2)}, timeouts
    assert len(groups) > 2, "DeepSpeed made no group"
    busy_longer_than_the_timeout()
    heartbeat.start(run, rank(), world_size(), limit, say)
    steps()
    heartbeat.stop()


def say(line: str) -> None:
    print(f"rank {rank()}: {line}", flush=True)


def busy_longer_than_the_timeout() -> None:
    group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=TIMEOUT))
    asked = threading.Semaphore(0)

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * world_size()
        dist.all_gather_object(values, value, group=group)
        asked.release()
        return values

    def work() -> int:
        for _ in range(ROUNDS if rank() == 0 else 0):
            asked.acquire()
        return rank()

    assert gather_when_done(gather, work, PATIENCE) == [0, 1, 2]


def steps() -> None:
    for step in range(1, 6):
        heartbeat.note("forward", step)
        if STOPPED_AT.get(step) == rank():
            os.kill(os.getpid(), signal.SIGSTOP)
        heartbeat.note("sum of losses")
        all_reduce_sum(torch.ones(1))


if __name__ == "__main__":
    main()
