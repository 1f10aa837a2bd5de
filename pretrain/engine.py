"""The DeepSpeed engine: process group, optimizer, one optimizer step, checkpoint files, full weights.

With expert_parallel.py the only file that imports deepspeed.
"""

import argparse
import atexit
import fcntl
import inspect
import io
import logging
import os
import resource
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint import ds_to_universal
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.runtime.zero.muon import original_muon
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
from deepspeed.utils import (
    logger,
    safe_get_full_fp32_param,
    safe_set_full_fp32_param,
    safe_set_local_fp32_param,
    set_z3_leaf_modules,
)
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model import ModelConfig, ModelOutput, ZeroModel
from model.decoder import DecoderLayer
from pretrain.checkpoint import EMA, read
from pretrain.config import OptimizerConfig, RunConfig
from pretrain.ema import MovingAverage
from pretrain.expert_parallel import (
    create_groups,
    expert_parallel_class,
    gather_experts,
    is_expert,
    local_experts,
    reduce_gradients_when_complete,
)
from pretrain.optim import parameter_groups

logger.setLevel(logging.WARNING)
# DeepSpeed's own calls, which a user can do nothing about.
warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
# DeepSpeed compiles Muon anew for shape after shape: minutes on a CPU, and a resumed run would meet the
# shapes in another order than the run it continues, so that it need not repeat its rounding.
for _name in ("zeropower_via_newtonschulz5", "muon_update"):
    setattr(original_muon, _name, inspect.unwrap(getattr(original_muon, _name)))


def init_process_group() -> None:
    """Joins the process group that the launcher describes (RANK, WORLD_SIZE, MASTER_ADDR, ...).

    Without a launcher this process is a group of its own.
    """
    prepare_extensions()
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    atexit.register(_remove_shared_memory)
    deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name(), verbose=False)


def _remove_shared_memory() -> None:
    """Deletes this rank's communication buffer, 66 MiB of memory that DeepSpeed leaves behind on a CPU."""
    parts = (os.getuid(), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], os.environ["RANK"])
    name = "_".join(map(str, ("deepspeed_allreduce_buffer", *parts)))
    Path("/dev/shm", name).unlink(missing_ok=True)


def prepare_extensions() -> None:
    """Builds DeepSpeed's CPU communication extension once, one process at a time.

    A process killed while building leaves torch's `lock` file behind, on which every later run would wait
    for ever. The operating system drops our own lock with its holder, so whoever has it may clear the other.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "zeromodel" / "torch_extensions"
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache)))
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if get_accelerator().device_name() != "cpu" or builder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    # The build calls `ninja`, which lies beside this python even where its environment is not activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with open(folder / "zeromodel.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in folder.glob("*/lock"):
            stale.unlink()
        builder.load(verbose=False)


def rank() -> int:
    return dist.get_rank()


def world_size() -> int:
    return dist.get_world_size()


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over all ranks, in place."""
    dist.all_reduce(values)
    return values


def device() -> torch.device:
    return torch.device(get_accelerator().current_device_name())


def peak_memory_bytes() -> int:
    """Peak device memory of this rank, on a CPU the peak resident size of its process."""
    if get_accelerator().device_name() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return get_accelerator().max_memory_allocated()


class Engine:
    """A ZeroModel under DeepSpeed."""

    def __init__(self, config: RunConfig, model_config: ModelConfig, ds_config: dict[str, Any]) -> None:
        self.ep_size = config.ep_size
        create_groups(config.ep_size)
        model = ZeroModel(model_config, expert_parallel_class(config.ep_size), config.seed, config.execution)
        # ZeRO-3 gathers a decoder layer at once instead of each of its modules: at small sizes the hooks of
        # single modules cost more than the arithmetic.
        set_z3_leaf_modules(model, [DecoderLayer])
        reduce_gradients_when_complete()
        optimizer = build_optimizer(model, config.optimizer)
        self.muon_lr_ratio = config.optimizer.muon_lr / config.optimizer.lr
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=ds_config, dist_init_required=False
        )
        self.model: ZeroModel = self.deepspeed.module
        decay = config.optimizer.ema_decay
        self.average = None if decay is None else MovingAverage(self._shards, decay)

    def close(self) -> None:
        """Frees DeepSpeed's resources and leaves the process group."""
        self.deepspeed.destroy()
        dist.destroy_process_group()

    def barrier(self) -> None:
        dist.barrier()

    def forward(self, **inputs: Any) -> ModelOutput:
        return self.deepspeed(**inputs)

    def backward(self, loss: Tensor) -> None:
        """`loss` is this rank's part of the global loss: parts of ranks and micro-batches ADD up to it."""
        # DeepSpeed averages gradients over ranks; the factor turns that mean into the sum.
        self.deepspeed.backward(loss * world_size(), scale_wrt_gas=False)

    def step(self, lr: float) -> None:
        """Ends a micro-batch; on the last one of the step clips and updates the weights.

        lr: of AdamW; Muon's is in proportion.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * self.muon_lr_ratio if group.get("use_muon") else lr
        self.deepspeed.step()
        if self.average is not None and self.step_applied():
            self.average.update()

    def step_applied(self) -> bool:
        """Whether the last step changed the weights: DeepSpeed skips one whose gradients are not finite."""
        return self.deepspeed.was_step_applied()

    def grad_norm(self) -> float:
        """Global gradient norm of the last optimizer step, before clipping."""
        norm = self.deepspeed.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def train(self) -> None:
        self.deepspeed.train()

    def eval(self) -> None:
        self.deepspeed.eval()

    def save(self, checkpoint: Path) -> None:
        """Writes DeepSpeed's files of all ranks into the folder; `latest` is checkpoint.py's to write."""
        self.deepspeed.save_checkpoint(str(checkpoint.parent), checkpoint.name, save_latest=False)
        if self.average is not None:
            self._save_average(checkpoint / EMA)
        self.barrier()

    def load(self, checkpoint: Path) -> None:
        """Loads what save wrote, under the same layout."""
        with no_pickle_code():
            loaded, _ = self.deepspeed.load_checkpoint(str(checkpoint.parent), checkpoint.name)
        if loaded is None:
            raise ValueError(f"checkpoint {checkpoint} cannot be loaded; resume from an older one")
        self.load_average(checkpoint)

    def _save_average(self, folder: Path) -> None:
        """Whole tensors by name, so that any layout can read them; rank 0 holds one at a time."""
        assert self.average is not None
        folder.mkdir(parents=True, exist_ok=True)
        with self.average.in_place():
            for name, value in self._full_parameters():
                if rank() == 0:
                    save_file({name: value.cpu().contiguous()}, folder / f"{name}.safetensors")

    def load_average(self, checkpoint: Path) -> None:
        """Takes the moving average from a checkpoint of any layout; if it has none, from the weights now."""
        if self.average is None:
            return
        self.average.restart()
        folder = checkpoint / EMA
        if not folder.is_dir():
            return
        with self.average.in_place():
            for name, parameter in self.model.named_parameters():
                value = load_file(folder / f"{name}.safetensors")[name]
                self._set_full_parameter(
                    parameter, local_experts(value, self.ep_size) if is_expert(parameter) else value
                )

    def _set_full_parameter(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Writes this rank's part of a parameter's fp32 value.

        DeepSpeed's own function for it fails under ZeRO-3 where a size does not divide among the ranks.
        """
        if not hasattr(parameter, "ds_tensor"):
            safe_set_full_fp32_param(parameter, value)
            return
        partition: Any = parameter
        size, group = partition.ds_tensor.numel(), partition.ds_process_group
        padded = F.pad(value.flatten(), (0, size * dist.get_world_size(group) - value.numel()))
        safe_set_local_fp32_param(parameter, padded[size * dist.get_rank(group) :][:size])

    def _shards(self) -> list[Tensor]:
        """This rank's fp32 weights, flat, where the ZeRO stage or its bf16 form keeps them."""
        kept_in = (
            "fp32_partitioned_groups_flat",
            "single_partition_of_fp32_groups",
            "fp32_groups_flat_partition",
        )
        return next(getattr(self.optimizer, name) for name in kept_in if hasattr(self.optimizer, name))

    def averaged_weights(self) -> Iterator[tuple[str, Tensor]]:
        """As full_weights, of the moving average; buffers as they are now."""
        assert self.average is not None
        with self.average.in_place():
            yield from self.full_weights()

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and full fp32 value of every tensor of the state dict, one at a time; all ranks take part."""
        yield from self._full_parameters()
        yield from self.buffers().items()

    def _full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            value = safe_get_full_fp32_param(parameter)
            if value is None:
                raise RuntimeError(f"ZeRO holds no fp32 copy of {name}")
            value = value.view(getattr(parameter, "ds_shape", parameter.shape))
            yield name, gather_experts(value, self.ep_size) if is_expert(parameter) else value

    def buffers(self) -> dict[str, Tensor]:
        """The buffers of the state dict, the same on every rank: the routers' balancing biases."""
        return {n: b for n, b in self.model.named_buffers() if n.endswith("e_score_correction_bias")}


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW, or DeepSpeed's Muon beside it; experts in groups of their own, as ZeRO asks.

    Muon (Jordan et al. 2024): Nesterov momentum, orthogonalised by 5 Newton-Schulz steps in bf16, times
    sqrt(max(1, rows / columns)). DeepSpeed puts that update in the gradient's place before it takes the
    norm: grad_norm is over Muon's updates and AdamW's gradients together.
    """
    groups = split_params_into_different_moe_groups_for_optimizer(parameter_groups(model, config))
    groups = [group for group in groups if group["params"]]
    if config.kind == "adamw":
        return torch.optim.AdamW(groups)
    return MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW)


def convert_to_universal(checkpoint: Path, folder: Path) -> None:
    """Rewrites a checkpoint of any layout as DeepSpeed's Universal Checkpoint: full tensors, by name.

    Raises:
        ValueError: the checkpoint is of a run with Muon; DeepSpeed converts the states of Adam only.
    """
    if read(checkpoint)[0].optimizer == "muon":
        raise ValueError(
            f"checkpoint {checkpoint} holds Muon's momentum, which DeepSpeed's Universal Checkpoint lacks; "
            "resume the run with the ranks, ep_size and ZeRO stage it has, and it exports at its end"
        )
    arguments = argparse.Namespace(
        input_folder=str(checkpoint),
        output_folder=str(folder),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with no_pickle_code(), redirect_stdout(io.StringIO()):
        ds_to_universal.main(arguments)


def universal_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and full fp32 value of every parameter of a Universal Checkpoint (flat, if ZeRO-3 wrote it)."""
    for path in sorted((folder / "zero").glob("*/fp32.pt")):
        stored = torch.load(path, map_location="cpu", weights_only=True)
        yield path.parent.name, stored["param"] if isinstance(stored, dict) else stored


@contextmanager
def no_pickle_code() -> Iterator[None]:
    """DeepSpeed's checkpoint files are read without executing pickled code.

    DeepSpeed asks for weights_only=False in many places; torch's own switch overrules it, and the few
    DeepSpeed classes its files really hold are allowed by name.
    """
    previous = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals(
            [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]
        ):
            yield
    finally:
        if previous is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = previous
