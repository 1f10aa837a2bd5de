"""Starts ranks on one node as DeepSpeed's launcher does: python ranks.py RANKS PORT SCRIPT [ARGUMENT ...].

Each of the two processes of that launcher takes seconds to import torch; this one imports nothing.
"""

import os
import subprocess
import sys
import threading


def main(ranks: int, port: str, script: str, *arguments: str) -> int:
    """When a rank fails, the others are told to end, and killed after 30 seconds. Returns its exit status."""
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = {}
    for number in range(ranks):
        place = {"RANK": str(number), "LOCAL_RANK": str(number)}
        command = [sys.executable, "-u", script, f"--local_rank={number}", *arguments]
        process = subprocess.Popen(command, env={**os.environ, **world, **place})
        started[process.pid] = process
    failed = 0
    while started:
        pid, status = os.wait()
        del started[pid]
        if status and not failed:
            failed = 1
            for other in started.values():
                other.terminate()
                kill = threading.Timer(30, other.kill)
                kill.daemon = True
                kill.start()
    return failed


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
