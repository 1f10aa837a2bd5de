"""Rank numbers and rendezvous address, under SLURM too, in the variables that `deepspeed` and `torchrun` set.

srun starts one process per task and describes it in its own variables; torch reads RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Meanings: https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES
"""

import os
import re
import socket

# Ports below those that Linux assigns by itself (net.ipv4.ip_local_port_range starts at 32768).
FIRST_PORT, NUM_PORTS = 15000, 15000


def join_slurm_step() -> None:
    """Sets the five variables from SLURM's, if srun started this process and no other launcher did.

    Existing values are kept: RANK from another launcher (then nothing changes), MASTER_ADDR or MASTER_PORT
    from the user. Only a job step counts: the batch shell's SLURM_PROCID=0 and SLURM_NTASKS=N describe the
    whole job, and a process that trusted them would wait forever for ranks that are never started. In a step
    of one task, such as a shell that starts several runs, each run forms its own group.
    """
    given = os.environ
    if "SLURM_STEP_ID" not in given or given["SLURM_STEP_NUM_TASKS"] == "1" or "RANK" in given:
        return
    given["RANK"] = given["SLURM_PROCID"]
    given["WORLD_SIZE"] = given["SLURM_STEP_NUM_TASKS"]
    given["LOCAL_RANK"] = given["SLURM_LOCALID"]
    given.setdefault("MASTER_ADDR", first_host(given["SLURM_STEP_NODELIST"]))
    given.setdefault("MASTER_PORT", str(FIRST_PORT + int(given["SLURM_JOB_ID"]) % NUM_PORTS))


def free_port() -> int:
    """A free port of this machine; another process may take it before it is used."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def first_host(node_list: str) -> str:
    """The first host of a SLURM node list: `gpu[07-09,12],login` -> `gpu07`. It holds rank 0."""
    # Keep the first number of every bracket, then everything up to the first comma outside brackets.
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", node_list).split(",")[0]
