"""The DeepSpeed engine: one optimizer step, checkpoint files, full weights.

Only this file, building.py, zero_optimizer.py, universal.py, process_group.py and expert_parallel.py import
deepspeed.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import deepspeed.comm as dist
import torch
import torch.nn.functional as F
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_set_full_fp32_param,
    safe_set_local_fp32_param,
    set_z3_leaf_modules,
)
from torch import Tensor, nn

from model import ModelConfig, ModelOutput, ZeroModel
from model.config.execution import check_precision
from model.decoder import DecoderLayer
from pretrain.building import build_model
from pretrain.checkpoint import EMA, CheckpointError
from pretrain.config import RunConfig
from pretrain.ds_config import training_dtype
from pretrain.ema import MovingAverage, average_files, read_average
from pretrain.expert_parallel import (
    create_groups,
    experts_by_rank,
    experts_in_checkpoints,
    gather_experts,
    is_expert,
    local_experts,
    reduce_gradients_when_complete,
)
from pretrain.init import Start
from pretrain.lora import seed_dropout
from pretrain.muon import restore_momentum, store_momentum
from pretrain.optim import choose_adamw_kernel
from pretrain.parts import Part
from pretrain.process_group import all_reduce_sum, device, rank, use_device, world_size
from pretrain.snapshot import HostCopies
from pretrain.stability import SpikeGuard
from pretrain.universal import no_pickle_code
from pretrain.zero_optimizer import build_optimizer, judge_grad_norm

T = TypeVar("T")


class _Snapshots(CheckpointEngine):
    """Copies to memory what DeepSpeed would write to files; saver.py writes it in the background."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.copies = HostCopies(device, reuse=device.type == "cuda")
        self.files: dict[str, Any] = {}

    def create(self, info: CheckpointCommitInfo) -> None:
        self.files = {}
        self.copies.begin()

    def save(self, state_dict: Any, path: str) -> None:
        self.files[Path(path).name] = self.copies.deep(state_dict)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing goes to disk here."""

    def load(self, path: str, map_location: Any = None) -> Any:
        return torch.load(path, map_location=map_location, weights_only=True)

    def commit(self, info: CheckpointCommitInfo) -> None:
        """`latest` is written when the files are."""

    def preserves_storage_sharing(self) -> bool:
        return False  # every tensor is copied by itself, so DeepSpeed need not copy views first


class Engine:
    """A ZeroModel under DeepSpeed.

    Args:
        model_class: ZeroModel or a subclass with the same parameters.
        start: weights that replace initial ones, and what of them is trained; None: all are initial.
    """

    def __init__(
        self,
        config: RunConfig,
        model_config: ModelConfig,
        ds_config: dict[str, Any],
        model_class: type[ZeroModel] = ZeroModel,
        start: Start | None = None,
    ) -> None:
        check_precision(config.execution.precision, device().type, training_dtype(ds_config))
        self.ep_size = config.ep_size
        create_groups(config.ep_size)
        model = build_model(config, model_config, ds_config, model_class, start)
        self.lora, self.seed = config.lora, config.seed
        self.freezes = not all(parameter.requires_grad for parameter in model.parameters())
        # ZeRO-3 gathers a whole decoder layer at once: at small sizes, hooks on every module cost more than
        # the arithmetic.
        set_z3_leaf_modules(model, [DecoderLayer])
        reduce_gradients_when_complete()
        optimizer = build_optimizer(model, config.optimizer, start)
        self.muon = config.optimizer.kind == "muon"
        self.muon_lr_ratio = config.optimizer.muon_lr / config.optimizer.lr
        choose_adamw_kernel(optimizer, device().type)
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=ds_config, dist_init_required=False
        )
        self.model: ZeroModel = self.deepspeed.module
        self.snapshots = self.deepspeed.checkpoint_engine = _Snapshots(device())
        self.deepspeed._copy_recovery_script = lambda folder: None  # a script that reads pickles
        # For the thread that writes checkpoints: its messages must not mix with those of training.
        self.saving_group = torch.distributed.new_group(backend="gloo")
        self.guard = SpikeGuard(config.stability, device())
        self._loss = self._grad_norm = torch.zeros((), device=device())
        self._comparable: Tensor | bool = True
        judge_grad_norm(self.deepspeed.optimizer, self._judge)
        decay = config.optimizer.ema_decay
        self.average = None if decay is None else MovingAverage(self._shards, decay)

    def _own_part(self, parameter: Tensor, value: Tensor) -> Tensor:
        """What this rank's parameter holds of a whole tensor: of the experts, only its own."""
        return local_experts(value, self.ep_size) if is_expert(parameter) else value

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

    def step(self, lr: float, loss: Tensor | None = None, comparable: Tensor | bool = True) -> None:
        """Ends a micro-batch; on the last one of the step clips and updates the weights, unless `guard`
        refuses.

        Args:
            lr: of AdamW's new parameters; Muon's, and those of given weights, scale with it.
            loss: of the global batch, a scalar on the device; the guard needs it on the last micro-batch.
            comparable: see SpikeGuard.refuses.
        """
        for group in self.optimizer.param_groups:
            ratio = self.muon_lr_ratio if group.get("use_muon") else 1.0
            group["lr"] = lr * ratio * group.get("lr_scale", 1.0)
        if loss is not None:
            self._loss, self._comparable = loss, comparable
        self.snapshots.copies.hold()
        self.deepspeed.step()
        if self.average is not None and self.step_applied():
            self.average.update()

    def step_applied(self) -> bool:
        """Whether the last step changed the weights."""
        return self.deepspeed.was_step_applied()

    def grad_norm(self) -> Tensor:
        """Global gradient norm of the last optimizer step, before clipping; a scalar on the device."""
        return self._grad_norm

    def _judge(self, grad_norm: Tensor) -> Tensor:
        self._grad_norm = grad_norm
        return self.guard.refuses(self._loss, grad_norm, self._comparable)

    def train(self, step: int = 0) -> None:
        """Enters training mode for optimizer step `step` (from 0), which a model with a curriculum reads."""
        self.model.training_step = step
        if self.model.starts_stage:
            self.guard.forget()
        if self.lora is not None:
            seed_dropout(self.seed, step, rank())
        self.deepspeed.train()

    def eval(self) -> None:
        self.deepspeed.eval()

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks; all ranks take part, from the same kind of thread."""
        values: list[Any] = [None] * world_size()
        torch.distributed.all_gather_object(values, value, group=self.saving_group)
        return values

    def snapshot(self) -> dict[str, Any]:
        """This rank's files, name -> contents, in memory once `copied` returns; all ranks take part.

        Raises:
            CheckpointError: a weight is not finite; on all ranks.
        """
        broken = self.not_finite()
        if broken is not None:
            raise CheckpointError(
                f"nothing is saved any more, since {broken} holds NaN or infinity; the older checkpoints are "
                "untouched: lower optimizer.lr, then run the same command again"
            )
        with experts_in_checkpoints(self.model.config.hidden_act):
            self.deepspeed.save_checkpoint(
                ".", "snapshot", save_latest=False, exclude_frozen_parameters=self.freezes
            )
        files, self.snapshots.files = self.snapshots.files, {}
        self.snapshots.copies.end()
        self.snapshots.copies.hold()  # the average takes the weights' place below
        if self.muon:
            self.copied()
            store_momentum(self.deepspeed.optimizer, files)
        if self.average is not None:
            files.update(average_files(self.average, self._full_parameters, rank(), world_size()))
        return files

    def copied(self) -> None:
        """Returns when the last snapshot is in memory; any thread may call it."""
        use_device()
        self.snapshots.copies.wait()

    def load(self, checkpoint: Path) -> None:
        """Loads a checkpoint of the same layout."""
        with no_pickle_code():
            loaded, _ = self.deepspeed.load_checkpoint(
                str(checkpoint.parent), checkpoint.name, load_module_strict=not self.freezes
            )
        if loaded is None:
            raise ValueError(f"checkpoint {checkpoint} cannot be loaded; resume from an older one")
        self.finish_loading(checkpoint)

    def finish_loading(self, checkpoint: Path) -> None:
        """Loads of a checkpoint of any layout what DeepSpeed does not, or stores otherwise than it trains."""
        choose_adamw_kernel(self.optimizer.optimizer, device().type)
        if self.muon:
            restore_momentum(self.deepspeed.optimizer)
        self.load_average(checkpoint)
        broken = self.not_finite()
        if broken is not None:
            raise ValueError(
                f"{broken} holds NaN or infinity in checkpoint {checkpoint}; resume from an older one "
                "(resume=PATH, with another output_dir)"
            )

    def not_finite(self) -> str | None:
        """Name of the first trained parameter that holds NaN or infinity; all ranks take part."""
        # A sum is the quickest pass: finite only if every term is, and otherwise every value is looked at.
        total = torch.stack([shard.sum().to(device(), torch.float64) for shard in self._shards()]).sum()
        if math.isfinite(all_reduce_sum(total.detach())):
            return None
        return next((name for name, value in self._full_parameters() if not value.isfinite().all()), None)

    def load_average(self, checkpoint: Path) -> None:
        """Loads the moving average from a checkpoint of any layout; without one it starts at the weights."""
        if self.average is None:
            return
        self.average.restart()
        if not (checkpoint / EMA).is_dir():
            return
        with self.average.in_place():
            for name, parameter in self._trained():
                value = read_average(checkpoint, name)
                self._set_full_parameter(parameter, self._own_part(parameter, value))

    def _set_full_parameter(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Writes this rank's part of a parameter's fp32 value.

        DeepSpeed's own function fails under ZeRO-3 if a size is not divisible by the number of ranks.
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
        """full_weights of the moving average; buffers as they are now."""
        assert self.average is not None
        with self.average.in_place():
            yield from self.full_weights()

    def full_shapes(self) -> dict[str, torch.Size]:
        """Shape of every trained parameter over all ranks."""
        shapes = {}
        for name, parameter in self._trained():
            shape = torch.Size(getattr(parameter, "ds_shape", parameter.shape))
            shapes[name] = (
                torch.Size((shape[0] * self.ep_size, *shape[1:])) if is_expert(parameter) else shape
            )
        return shapes

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and full fp32 value of everything that training changes, one at a time; all ranks take part.

        This is the state dict without what is frozen.
        """
        yield from self._full_parameters()
        yield from self.buffers().items()

    def weight_parts(self) -> Iterator[Part]:
        """full_weights in parts: of the experts, those of one rank at a time; all ranks take every part."""
        for name, parameter in self._trained():
            value = self._full_value(name, parameter)
            if not is_expert(parameter):
                yield Part(name, value)
                continue
            for number, rows in enumerate(experts_by_rank(value, self.ep_size)):
                yield Part(name, rows, number * len(rows))
        for name, buffer in self.buffers().items():
            yield Part(name, buffer)

    def averaged_parts(self) -> Iterator[Part]:
        """weight_parts of the moving average; buffers as they are now."""
        assert self.average is not None
        with self.average.in_place():
            yield from self.weight_parts()

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def _full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._trained():
            value = self._full_value(name, parameter)
            yield name, gather_experts(value, self.ep_size) if is_expert(parameter) else value

    def _full_value(self, name: str, parameter: nn.Parameter) -> Tensor:
        """The fp32 value of a parameter; of experts, those of this rank."""
        value = safe_get_full_fp32_param(parameter)
        if value is None:
            raise RuntimeError(f"ZeRO holds no fp32 copy of {name}")
        return value.view(getattr(parameter, "ds_shape", parameter.shape))

    def checkpoint_buffers(self) -> dict[str, Tensor]:
        """What DeepSpeed's files do not hold (a universal load restores no buffers), equal on every rank."""
        return {**self.buffers(), "spike_guard.history": self.guard.history}

    def buffers(self) -> dict[str, Tensor]:
        """The buffers of the state dict, the same on every rank: the routers' balancing biases."""
        return {n: b for n, b in self.model.named_buffers() if n.endswith("e_score_correction_bias")}
