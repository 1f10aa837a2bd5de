"""The optimizer, and which of its steps under ZeRO are discarded."""

import math
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime import compiler
from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine
from deepspeed.runtime.utils import combine_grad_norm_groups
from torch import Tensor, nn

from pretrain.config import OptimizerConfig
from pretrain.init import Start
from pretrain.muon import MOMENTUM
from pretrain.optim import parameter_groups

# DeepSpeed imports its Muon for every optimizer and compiles it again for each shape: minutes on a CPU, and a
# resumed run would meet the shapes in another order and might round differently. Without compilation, the
# compiler, which takes seconds to import, is not imported at all.
compiler.compile = lambda: compiler.dummy_decorator
# For ZeRO-1 in bf16 with fp32 accumulation DeepSpeed would take another optimizer, in which judge_grad_norm
# cannot skip a step. Its optimizer of stages 1 and 2 accumulates in fp32 too.
DeepSpeedEngine._do_optimizer_sanity_check = lambda self, optimizer: ZERO_OPTIMIZATION


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
            return norm + infinite(refused).to(norm.device)  # with offload in host memory

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
