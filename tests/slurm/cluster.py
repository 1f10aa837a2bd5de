"""A private SLURM of two nodes on the loopback interface: real daemons, no system service, no root needed."""

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from ..conftest import ROOT

NODES = ("127.0.0.1", "127.0.0.2")  # names of nodes must resolve, and these resolve everywhere
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
SBIN = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"  # where Debian installs daemons; not in every user's PATH
DEADLINE = 300.0  # seconds, far more than anything here takes
ENDED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "BOOT_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
}

# No cgroups and no accounting database in a container. GPUs are empty regular files and `config_overrides`
# pretends to the cores, so that the shipped scripts' requests fit. A job of `low` must make way for one of
# `urgent`: USR1 at once, the end after GraceTime. cred_expire is how long a requeued job waits. Job ids start
# at a free port, so that two clusters on one machine give their jobs different MASTER_PORTs.
SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
FirstJobId={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={state}/munge.socket,cred_expire=5
StateSaveLocation={state}/controller
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/slurmd-%n.pid
SlurmdSpoolDir={state}/spool-%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PreemptExemptTime=0
GresTypes=gpu
PartitionName=low Nodes=ALL Default=YES MaxTime=UNLIMITED PriorityTier=1 GraceTime=300
PartitionName=urgent Nodes=ALL MaxTime=UNLIMITED PriorityTier=2
"""
NODE = "NodeName={name} NodeAddr={name} NodeHostname={host} Port={port} CPUs=64 Gres=gpu:8 State=UNKNOWN\n"


def missing() -> list[str]:
    return [name for name in NEEDED if shutil.which(name, path=SBIN) is None]


class Cluster:
    """Commands for a running cluster, and its jobs' output (`job-ID.out`, both streams)."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))},
            "SLURM_CONF": str(state / "slurm.conf"),
            "PATH": SBIN,
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
        }

    def run(self, *command: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def submit(self, *arguments: object) -> str:
        """sbatch with these arguments; the job's id."""
        return self.run(
            "sbatch", "--parsable", "--output", self.state / "job-%A.out", *arguments
        ).stdout.strip()

    def fields(self, job: str, name: str) -> list[str]:
        """A field of `scontrol show job`: of the job, or of every job of the array."""
        shown = self.run("scontrol", "show", "job", job, "--oneliner").stdout.split()
        return [field.removeprefix(f"{name}=") for field in shown if field.startswith(f"{name}=")]

    def restarts(self, job: str) -> int:
        return int(*self.fields(job, "Restarts"))

    def output(self, job: str) -> str:
        path = self.state / f"job-{job}.out"
        return path.read_text() if path.exists() else ""

    def ends(self, job: str, state: str) -> str:
        """What the job wrote, once it has ended; AssertionError if not in this state."""
        self.until(lambda: ENDED.issuperset(self.fields(job, "JobState")), f"job {job} has ended")
        states = set(self.fields(job, "JobState"))
        assert states == {state}, f"job {job} is {states}\n{self.logs()}"
        return self.output(job)

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Polls until the condition holds; AssertionError with all logs if it does not within DEADLINE."""
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < deadline, f"not within {DEADLINE} s: {what}\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        """The end of every log file of the daemons and of every job."""
        paths = (*sorted(self.state.glob("*.log")), *sorted(self.state.glob("job-*.out")))
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in paths)


@contextmanager
def start(state: Path) -> Iterator[Cluster]:
    """Starts the daemons, yields the cluster when its nodes are idle, and leaves no process behind."""
    cluster = Cluster(state)
    _configure(state)
    munge = [f"--{name}={state}/munge.{name.split('-')[0]}" for name in ("key-file", "socket", "pid-file")]
    munge += [f"--{name}-file={state}/munge.{name}" for name in ("log", "seed")]
    with ExitStack() as daemons:

        def daemon(*command: str) -> None:
            log = daemons.enter_context((state / f"{command[0]}.log").open("a"))
            process = subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=log)
            daemons.callback(process.wait, 30)
            daemons.callback(process.terminate)

        daemon("munged", "--foreground", "--force", *munge)
        cluster.until((state / "munge.socket").exists, "munged listens")
        daemon("slurmctld", "-D")
        for node in NODES:
            daemon("slurmd", "-D", "-N", node)
        ready = ("sinfo", "--noheader", "--Node", "--partition=low", "--format=%T")
        states = ["idle"] * len(NODES)
        cluster.until(lambda: cluster.run(*ready, check=False).stdout.split() == states, "idle nodes")
        try:
            yield cluster
        finally:
            cluster.run("scancel", "--user", getpass.getuser())
            cluster.until(lambda: not cluster.run("squeue", "--noheader").stdout, "all jobs have ended")


def _configure(state: Path) -> None:
    for name in ("controller", *(f"spool-{node}" for node in NODES)):
        (state / name).mkdir()
    (state / "munge.key").touch(0o600)
    (state / "munge.key").write_bytes(secrets.token_bytes(128))
    for gpu in range(8):
        (state / f"gpu{gpu}").touch()
    ports = free_ports(1 + len(NODES))
    host = socket.gethostname().split(".")[0]
    conf = SLURM_CONF.format(host=host, controller_port=ports[0], user=getpass.getuser(), state=state)
    for name, port in zip(NODES, ports[1:], strict=True):
        conf += NODE.format(name=name, host=host, port=port)
    (state / "slurm.conf").write_text(conf)
    (state / "gres.conf").write_text(f"Name=gpu File={state}/gpu[0-7]\n")


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(closing(socket.socket())) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
