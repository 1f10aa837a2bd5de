"""The DeepSpeed engine: optimizer, one optimizer step, checkpoint files, full weights.

Only this file, universal.py, process_group.py and expert_parallel.py import deepspeed.
"""

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import deepspeed.comm as dist
import torch
import torch.nn.functional as F
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime import compiler
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_set_full_fp32_param,
    safe_set_local_fp32_param,
    set_z3_leaf_modules,
)
from torch import Tensor, nn

from model import ModelConfig, ModelOutput, ZeroModel
from model.config.execution import require_fp8
from model.decoder import DecoderLayer
from model.moe import MoE
from pretrain.checkpoint import EMA, CheckpointError
from pretrain.config import OptimizerConfig, RunConfig
from pretrain.ema import MovingAverage, average_files, read_average
from pretrain.expert_parallel import (
    create_groups,
    expert_parallel_class,
    experts_in_checkpoints,
    gather_experts,
    is_expert,
    local_experts,
    reduce_gradients_when_complete,
    unmark_frozen,
)
from pretrain.init import Start, copy_into
from pretrain.lora import adapt, seed_dropout
from pretrain.muon import MOMENTUM, restore_momentum, store_momentum
from pretrain.optim import parameter_groups
from pretrain.process_group import all_reduce_sum, device, rank, world_size
from pretrain.stability import SpikeGuard
from pretrain.universal import no_pickle_code

T = TypeVar("T")

# DeepSpeed imports its Muon for every optimizer and compiles it again for each shape: minutes on a CPU, and a
# resumed run would meet the shapes in another order and might round differently. Without compilation, the
# compiler, which takes seconds to import, is not imported at all.
compiler.compile = lambda: compiler.dummy_decorator


class _Snapshots(CheckpointEngine):
    """Copies to memory what DeepSpeed would write to files; checkpoint.py writes it in the background."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, Any] = {}

    def create(self, info: CheckpointCommitInfo) -> None:
        self.files = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.files[Path(path).name] = _copied(state_dict)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing goes to disk here."""

    def load(self, path: str, map_location: Any = None) -> Any:
        return torch.load(path, map_location=map_location, weights_only=True)

    def commit(self, info: CheckpointCommitInfo) -> None:
        """`latest` is written when the files are."""

    def preserves_storage_sharing(self) -> bool:
        return False  # every tensor is copied by itself, so DeepSpeed need not copy views first


def _copied(value: Any) -> Any:
    """A deep copy with its tensors in CPU memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    return copy.deepcopy(value)


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
        if config.execution.precision == "fp8":
            half = ds_config.get("bf16", {}).get("enabled", False)
            require_fp8(device().type, torch.bfloat16 if half else torch.float32)
        self.ep_size = config.ep_size
        create_groups(config.ep_size)
        # DeepSpeed cannot save frozen AutoEP experts.
        moe_class = MoE if config.lora else expert_parallel_class(config.ep_size)
        model = model_class(model_config, moe_class, config.seed, config.execution)
        if start is not None:
            copy_into(model, start, self._own_part)
            unmark_frozen(model)
        self.lora, self.seed = config.lora, config.seed
        if config.lora is not None:
            adapt(model, config.lora, config.seed, start.missing if start is not None else ())
        self.freezes = not all(parameter.requires_grad for parameter in model.parameters())
        # ZeRO-3 gathers a whole decoder layer at once: at small sizes, hooks on every module cost more than
        # the arithmetic.
        set_z3_leaf_modules(model, [DecoderLayer])
        reduce_gradients_when_complete()
        optimizer = build_optimizer(model, config.optimizer, start)
        self.muon = config.optimizer.kind == "muon"
        self.muon_lr_ratio = config.optimizer.muon_lr / config.optimizer.lr
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=ds_config, dist_init_required=False
        )
        self.model: ZeroModel = self.deepspeed.module
        self.snapshots = self.deepspeed.checkpoint_engine = _Snapshots()
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
        """This rank's checkpoint files, name -> contents copied to memory; all ranks take part.

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
        if self.muon:
            store_momentum(self.deepspeed.optimizer, files)
        if self.average is not None:
            files.update(average_files(self.average, self._full_parameters, kept=rank() == 0))
        return files

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

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def _full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._trained():
            value = safe_get_full_fp32_param(parameter)
            if value is None:
                raise RuntimeError(f"ZeRO holds no fp32 copy of {name}")
            value = value.view(getattr(parameter, "ds_shape", parameter.shape))
            yield name, gather_experts(value, self.ep_size) if is_expert(parameter) else value

    def checkpoint_buffers(self) -> dict[str, Tensor]:
        """What DeepSpeed's files do not hold (a universal load restores no buffers), equal on every rank."""
        return {**self.buffers(), "spike_guard.history": self.guard.history}

    def buffers(self) -> dict[str, Tensor]:
        """The buffers of the state dict, the same on every rank: the routers' balancing biases."""
        return {n: b for n, b in self.model.named_buffers() if n.endswith("e_score_correction_bias")}


def judge_grad_norm(optimizer: Any, refuses: Callable[[Tensor], Tensor]) -> None:
    """Makes DeepSpeed discard the ZeRO optimizer steps that `refuses` refuses.

    DeepSpeed reads from the device, once per step, whether the norm is finite, and discards the step if not.
    A refused step gets an infinite norm, so that nothing more needs to be read, except for Muon under ZeRO-3:
    there gradients enter the momentum before DeepSpeed looks at a norm, so the decision, made on the
    gradients' own norm, is read first. With Muon, offload and ZeRO-1 or 2 they do too, but the norm covers
    Muon's updates, as without offload: a refused step gets its old momentum back.
    """

    def infinite(refused: Tensor) -> Tensor:
        return torch.where(refused, math.inf, 0.0)

    if not hasattr(optimizer, "_get_norm_groups"):  # stages 1 and 2
        total_norm, offloaded_muon = optimizer.scaled_global_norm, optimizer._apply_muon_updates_cpu_offload
        before: dict[int, Tensor] = {}

        def momenta() -> dict[int, Tensor]:
            states = enumerate(optimizer.optimizer.state.values())
            return {number: state[MOMENTUM] for number, state in states if MOMENTUM in state}

        def kept_momentum() -> None:
            before.clear()
            before.update((number, momentum.clone()) for number, momentum in momenta().items())
            offloaded_muon()

        def judged_norm() -> Tensor:
            norm = total_norm()
            refused = refuses(norm)
            if optimizer.cpu_offload and momenta() and bool(refused):
                for number, momentum in momenta().items():
                    momentum.copy_(before.get(number, torch.zeros(())))
            return norm + infinite(refused)

        optimizer.scaled_global_norm, optimizer._apply_muon_updates_cpu_offload = judged_norm, kept_momentum
        return

    norm_groups, apply_muon = optimizer._get_norm_groups, optimizer._apply_muon_to_accumulated_grads
    judgement: list[Tensor] = []

    def judge() -> Tensor:
        refused = refuses(combine_grad_norm_groups([norm.float() for norm in norm_groups()]))
        judgement.append(infinite(refused))
        return refused

    def judged_muon() -> None:
        if optimizer.use_muon and not bool(judge()):
            apply_muon()

    def judged_groups() -> list[Tensor]:
        if not judgement:
            judge()
        norms = [norm.float() for norm in norm_groups()]  # with offload in host memory
        return [*norms, judgement.pop().to(norms[0].device)]

    optimizer._get_norm_groups, optimizer._apply_muon_to_accumulated_grads = judged_groups, judged_muon


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, start: Start | None = None
) -> torch.optim.Optimizer:
    """AdamW, or DeepSpeed's Muon together with AdamW; experts in separate groups, as ZeRO requires.

    Muon (Jordan et al. 2024): Nesterov momentum, orthogonalised by 5 Newton-Schulz steps in bf16, times
    sqrt(max(1, rows / columns)). DeepSpeed replaces the gradient with that update before it takes
    the norm: under ZeRO-1 and 2 grad_norm covers Muon's updates and AdamW's gradients together, under ZeRO-3
    the gradients, see judge_grad_norm.

    Raises:
        ValueError: Muon would have nothing to train, or nothing else to train would be left.
    """
    groups = split_params_into_different_moe_groups_for_optimizer(parameter_groups(model, config, start))
    groups = [group for group in groups if group["params"]]
    if config.kind == "adamw":
        return torch.optim.AdamW(groups)
    if len({group["use_muon"] for group in groups}) < 2:
        raise ValueError(
            "optimizer.kind=muon needs hidden matrices for Muon and other parameters for AdamW, but "
            "init.frozen leaves only one of the two to train; freeze less, or set optimizer.kind=adamw"
        )
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam  # after compiler.compile is set

    return MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW)
