"""How ranks are started: by which processes, with which numbers, and where they meet.

Rank numbers and the rendezvous address come in the variables that `deepspeed` and `torchrun` set: RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. srun starts one process per task and describes it in its
own variables:
https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES
"""

import os
import re
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# Ports below those that Linux assigns by itself (net.ipv4.ip_local_port_range starts at 32768).
FIRST_PORT, NUM_PORTS = 15000, 15000
STEP_STRIDE = 1009  # between the ports of two steps of one job; a prime, so that steps and next jobs differ
DEEPSPEED_PORT = "29500"  # what the deepspeed launcher passes if its user names no port
# Scripts and modules that start ranks and wait for them.
LAUNCHERS = {
    "deepspeed",
    "ds",
    "deepspeed.launcher.runner",
    "deepspeed.launcher.launch",
    "torchrun",
    "torch.distributed.run",
    "torch.distributed.launch",
}


@dataclass(frozen=True)
class Process:
    pid: int
    started: str  # in clock ticks since boot: tells it from a later process with the same pid

    def runs(self) -> bool:
        """Whether it has not ended; one whose parent has not fetched its exit status yet has."""
        try:
            found = _stat(self.pid)
        except OSError:  # too many open files, for example: no reason to end a run
            return True
        return found is not None and found.started == self.started and found.state not in "ZX"


@dataclass(frozen=True)
class _Stat:
    state: str
    parent: int
    started: str


def _stat(pid: int) -> _Stat | None:
    """From /proc/PID/stat, see proc(5); None: no such process. Raises OSError if it cannot be read."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return _Stat(fields[0], int(fields[1]), fields[19])


def launchers() -> list[Process]:
    """The ancestors of this process that are launchers, nearest first.

    The deepspeed command starts deepspeed.launcher.launch, which starts the ranks; torchrun starts them
    itself; srun's are started by slurmstepd. Shells and other ancestors may end without ending a run.
    """
    found, pid = [], os.getppid()
    with suppress(PermissionError):  # other users' processes may be hidden
        while (status := _stat(pid)) is not None:
            if _is_launcher(pid):
                found.append(Process(pid, status.started))
            pid = status.parent
    return found


def _is_launcher(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # it has ended, or belongs to another user and is hidden
        return False
    if words[0].startswith("slurmstepd:"):
        return True
    script = next((word for word in words[1:] if not word.startswith("-")), "")
    return Path(words[0]).name.startswith("python") and Path(script).name in LAUNCHERS


def join_slurm_step() -> None:
    """Sets the five variables from SLURM's, if srun started this process and no other launcher did.

    Existing values are kept: RANK from another launcher (then nothing changes), MASTER_ADDR or MASTER_PORT
    from the user. Only a job step counts: the batch shell's SLURM_PROCID=0 and SLURM_NTASKS=N describe the
    whole job, and a process that trusted them would wait forever for ranks that are never started. In a step
    of one task, such as a shell that starts several runs, each run forms its own group. A step on one node
    needs no port in advance, see `meeting_place`.
    """
    given = os.environ
    if "SLURM_STEP_ID" not in given or given["SLURM_STEP_NUM_TASKS"] == "1" or "RANK" in given:
        return
    given["RANK"] = given["SLURM_PROCID"]
    given["WORLD_SIZE"] = given["SLURM_STEP_NUM_TASKS"]
    given["LOCAL_RANK"] = given["SLURM_LOCALID"]
    given.setdefault("MASTER_ADDR", first_host(given["SLURM_STEP_NODELIST"]))
    if given.get("SLURM_STEP_NUM_NODES") != "1":
        own = int(given["SLURM_JOB_ID"]) + STEP_STRIDE * int(given["SLURM_STEP_ID"])
        given.setdefault("MASTER_PORT", str(FIRST_PORT + own % NUM_PORTS))


def device_number(visible: int) -> int:
    """Which of the `visible` devices is this rank's.

    Where every task sees only its own GPU, as with srun --gpus-per-task=1, that is number 0 for all of them.

    Raises:
        ValueError: there are fewer devices than ranks on this machine, but more than one.
    """
    local = int(os.environ["LOCAL_RANK"])
    if visible == 1:
        return 0
    if local >= visible:
        raise ValueError(
            f"LOCAL_RANK={local} has no GPU of its own, since this process sees {visible} "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}); start at most "
            f"{visible} ranks per node, or give each task one GPU (--gpus-per-task=1)"
        )
    return local


def meeting_place() -> str | None:
    """A name that the ranks of this launch share with no other, if they may meet on any free port.

    None if the user or the launcher named a port, or the ranks are on several machines.
    """
    given = os.environ
    if "MASTER_PORT" not in given and "SLURM_STEP_ID" in given:
        return f"{given['SLURM_JOB_ID']}.{given['SLURM_STEP_ID']}.{given.get('SLURM_RESTART_COUNT', '0')}"
    if given.get("MASTER_PORT") == DEEPSPEED_PORT and given.get("CROSS_SIZE") == "1":  # one node
        return next((f"{launcher.pid}-{launcher.started}" for launcher in launchers()), None)
    return None


def publish_port(place: str, port: int) -> None:
    """Tells the port to every process of this machine that asks at `place`, until this process ends."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(_address(place))
    listener.listen(socket.SOMAXCONN)

    def answer() -> None:
        while True:
            with listener.accept()[0] as connection:
                connection.sendall(str(port).encode())

    threading.Thread(target=answer, daemon=True).start()


def published_port(place: str) -> int:
    """The port published at `place`; waits until it is, or until this process is ended with its launch."""
    while True:
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(_address(place))
                return int(connection.makefile().read())
            except (ConnectionError, ValueError):  # not there yet, or just ended
                time.sleep(0.05)


def _address(place: str) -> str:
    return f"\0zeromodel-{place}"  # in Linux's abstract namespace: no file, and gone with its process


def free_port() -> int:
    """A free port of this machine; another process may take it before it is used."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def first_host(node_list: str) -> str:
    """The first host of a SLURM node list: `gpu[07-09,12],login` -> `gpu07`. It holds rank 0."""
    # Keep the first number of every bracket, then everything up to the first comma outside brackets.
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", node_list).split(",")[0]
