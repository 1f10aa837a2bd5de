"""The group of ranks: how a process joins it, uses it, and explains its failures."""

import fcntl
import hashlib
import logging
import os
import resource
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger
from torch import Tensor
from torch.distributed import distributed_c10d

from pretrain.config import RunConfig
from pretrain.launch import device_number, meeting_place, publish_port, published_port

logger.setLevel(logging.WARNING)
# Raised by DeepSpeed's own calls; users cannot act on them.
warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)


def init_process_group(timeout_minutes: float = RunConfig.communication_timeout_minutes) -> None:
    """Joins the process group that the launcher describes (RANK, WORLD_SIZE, MASTER_ADDR, ...).

    Without a launcher this process forms a group of one. Ranks of one machine for which no port was named
    meet on a free one, so that concurrent runs never meet.

    Args:
        timeout_minutes: that a rank waits for the others, in this group and in every later one.

    Raises:
        ValueError: this rank has no GPU of its own.
    """
    prepare_extensions()
    alone = "RANK" not in os.environ
    place = None if alone else meeting_place()
    if alone:
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, MASTER_ADDR="127.0.0.1")
    if get_accelerator().device_name() != "cpu":
        # DeepSpeed and torch, too, read from here which device is this rank's.
        os.environ["LOCAL_RANK"] = str(device_number(get_accelerator().device_count()))
    use_device()
    # fp32 means fp32: no product of it is rounded to TF32's 10 bits, neither a matrix's nor a convolution's.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    timeout = timedelta(minutes=timeout_minutes)
    # What torch gives to groups made without a time-out, as DeepSpeed makes those of experts and their
    # replicas: 10 minutes with NCCL, 30 with gloo.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    if alone or place is not None:
        _meet_on_a_free_port(place, timeout)
    backend = get_accelerator().communication_backend_name()
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    dist.barrier()
    _remove_shared_memory()


def use_device() -> None:
    """Makes this rank's device that of the calling thread; a new thread would begin with device 0."""
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))


def _meet_on_a_free_port(place: str | None, timeout: timedelta) -> None:
    """Forms torch's process group. The port also names DeepSpeed's buffer, which two runs must not share."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    port = 0 if rank == 0 or place is None else published_port(place)  # 0: any free one
    store = torch.distributed.TCPStore(
        "127.0.0.1", port, size, is_master=rank == 0, timeout=timeout, wait_for_workers=False
    )
    os.environ["MASTER_PORT"] = str(store.port)
    if rank == 0 and place is not None:
        publish_port(place, store.port)
    torch.distributed.init_process_group(
        get_accelerator().communication_backend_name(),
        store=store,
        rank=rank,
        world_size=size,
        timeout=timeout,
    )


def _remove_shared_memory() -> None:
    """Deletes the name of this rank's communication buffer, which all ranks have opened by now.

    DeepSpeed would leave its 66 MiB of memory behind on a CPU.
    """
    parts = (os.getuid(), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], os.environ["RANK"])
    name = "_".join(map(str, ("deepspeed_allreduce_buffer", *parts)))
    Path("/dev/shm", name).unlink(missing_ok=True)


def prepare_extensions() -> None:
    """Builds DeepSpeed's CPU communication extension once per environment, one process at a time.

    Each environment has its own folder: a build refers to its environment's torch, and another environment
    would rebuild it under processes that have the library open.

    A process killed while building leaves torch's `lock` file behind, on which every later run would wait
    forever. The operating system releases our own lock with its holder, so its holder may delete the other.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "zeromodel" / "torch_extensions"
    own = cache / hashlib.sha256(f"{sys.prefix} {torch.__version__}".encode()).hexdigest()[:12]
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(own)))
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if get_accelerator().device_name() != "cpu" or builder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    # The build calls `ninja`, which is next to this python even if its environment is not activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with open(folder / "zeromodel.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in folder.glob("*/lock"):
            stale.unlink()
        builder.load(verbose=False)


def communication_problem(error: RuntimeError) -> str | None:
    """In one line, why ranks cannot connect or have lost each other; None for any other error."""
    reason, rank = str(error).splitlines()[0], os.environ["RANK"]
    if "EADDRINUSE" in reason:
        port = os.environ["MASTER_PORT"]
        return (
            f"port {port} is in use, perhaps by another run; give the launcher another --master_port, "
            "or srun another MASTER_PORT"
        )
    if "Duplicate GPU" in str(error):  # of NCCL, which knows the GPUs of all ranks
        return (
            f"rank {rank} shares its GPU with another rank; start as many ranks per node as it has GPUs, or "
            "give each task its own (--gpus-per-task=1)"
        )
    if "gloo/transport" in reason and "Timed out" in reason:
        return (
            f"rank {rank} waited longer than communication_timeout_minutes for another rank; if that one was "
            f"still at work, raise it ({reason})"
        )
    if isinstance(error, torch.distributed.DistError) or "gloo/transport" in reason:
        return f"rank {rank} lost another rank, whose own error says why if it had one ({reason})"
    return None


def rank() -> int:
    return dist.get_rank()


def world_size() -> int:
    return dist.get_world_size()


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over all ranks, in place."""
    dist.all_reduce(values)
    return values


def on_any_rank(flag: bool) -> bool:
    """Whether the flag is set on some rank; all ranks take part."""
    return bool(all_reduce_sum(torch.tensor([int(flag)], device=device())))


def equal_on_all_ranks(text: str) -> bool:
    """Whether all ranks gave the same text; all ranks take part."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    extremes = torch.tensor([number, -number], device=device())
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    return bool(extremes[0] == -extremes[1])


def device() -> torch.device:
    return torch.device(get_accelerator().current_device_name())


def peak_memory_bytes() -> int:
    """Peak device memory of this rank; on a CPU the peak resident size of its process."""
    if get_accelerator().device_name() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return get_accelerator().max_memory_allocated()
