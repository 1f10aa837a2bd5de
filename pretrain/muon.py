"""Muon's momentum in checkpoints: stored as Adam's first moment, so that every layout can read it.

DeepSpeed converts only Adam's state between layouts. Each rank stores its part of the momentum, whatever it
holds while it trains: under ZeRO-1 and 2 without offload that is every matrix, whole, that reaches into its
partition. Where Adam has a second moment, a zero fills the place on disk.
"""

from typing import Any

import torch
import torch.distributed
from torch import Tensor

MOMENTUM = "momentum_buffer"  # as DeepSpeed names it in the optimizer's state
_MOMENT, _PLACE = "exp_avg", "exp_avg_sq"


def store_momentum(optimizer: Any, files: dict[str, Any]) -> None:
    """Rewrites the momentum in this rank's checkpoint files, which are copies.

    Args:
        optimizer: DeepSpeed's ZeRO optimizer over Muon.
        files: name -> contents.
    """
    for contents in files.values():
        zero = contents.get("optimizer_state_dict") if isinstance(contents, dict) else None
        if zero is None:
            continue
        states = optimizer_states(zero)
        step = next(state["step"] for state in states.values() if "step" in state)  # AdamW's
        for number, flat in _muon_partitions(optimizer):
            momentum = states.get(number, {}).get(MOMENTUM)
            part = torch.zeros(flat.shape) if momentum is None else _part(optimizer, number, momentum, flat)
            place = torch.zeros(1).expand(flat.shape)
            states[number] = {"step": step.clone(), _MOMENT: part, _PLACE: place}


def restore_momentum(optimizer: Any) -> None:
    """Turns a loaded first moment back into the momentum that this layout trains with; all ranks call it.

    Raises:
        ValueError: the checkpoint is of an older version, and its momentum of another offload setting.
    """
    for number, flat in _muon_partitions(optimizer):
        state = optimizer.optimizer.state[flat]
        if _MOMENT in state:
            part = state[_MOMENT]
            optimizer.optimizer.state[flat] = {MOMENTUM: _held(optimizer, number, part)}
        elif MOMENTUM in state and len(state[MOMENTUM]) != _held_length(optimizer, number, flat):
            raise ValueError(
                "the checkpoint was written by an older version with another offload_optimizer, which "
                "changes how Muon's momentum is stored; resume with the setting it was written with"
            )


def optimizer_states(zero: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The base optimizer's state of every group, in what a ZeRO optimizer saves as `optimizer_state_dict`."""
    base = zero["base_optimizer_state"] if "base_optimizer_state" in zero else zero["optimizer_state_dict"]
    states: dict[int, dict[str, Any]] = base["state"]
    return states


def _muon_partitions(optimizer: Any) -> list[tuple[int, Tensor]]:
    """Index in the optimizer's state, and this rank's flat fp32 weights, of every group that Muon updates."""
    if hasattr(optimizer, "sub_groups_using_muon"):  # ZeRO-3
        flats, chosen = optimizer.fp32_partitioned_groups_flat, optimizer.sub_groups_using_muon
    else:
        flats = optimizer.single_partition_of_fp32_groups
        chosen = [group["use_muon"] for group in optimizer.optimizer.param_groups]
    return [(number, flat) for number, flat in enumerate(flats) if chosen[number]]


def _holds_whole_matrices(optimizer: Any) -> bool:
    return not hasattr(optimizer, "sub_groups_using_muon") and not optimizer.cpu_offload


def _part(optimizer: Any, number: int, momentum: Tensor, flat: Tensor) -> Tensor:
    """This rank's part of the momentum, fp32 in host memory, laid out as its weights."""
    if not _holds_whole_matrices(optimizer):
        return momentum.float()
    part, offset = torch.zeros(flat.shape), 0
    for parameter in optimizer.params_in_partition[number]:
        whole = momentum[offset : offset + parameter.numel()]
        offset += parameter.numel()
        ours, at = _addresses(parameter)
        part[at] = whole[ours].float()
    return part


def _held(optimizer: Any, number: int, part: Tensor) -> Tensor:
    """The inverse of `_part`, from all ranks' parts."""
    if not _holds_whole_matrices(optimizer):
        return part
    wholes, held = [], {id(parameter) for parameter in optimizer.params_in_partition[number]}
    for parameter in optimizer.bit16_groups[number]:
        whole = part.new_zeros(parameter.numel())
        if parameter._hp_mapping is not None:
            ours, at = _addresses(parameter)
            whole[ours] = part[at]
        torch.distributed.all_reduce(whole, group=optimizer.real_dp_process_group[number])
        if id(parameter) in held:
            wholes.append(whole)
    return torch.cat(wholes) if wholes else part[:0]


def _held_length(optimizer: Any, number: int, flat: Tensor) -> int:
    if not _holds_whole_matrices(optimizer):
        return len(flat)
    return sum(parameter.numel() for parameter in optimizer.params_in_partition[number])


def _addresses(parameter: Any) -> tuple[slice, slice]:
    """What of a parameter lies in this rank's partition, and where there."""
    mapping = parameter._hp_mapping
    ours, at = mapping.lp_fragment_address, mapping.hp_fragment_address
    return slice(ours.start, ours.start + ours.numel), slice(at.start, at.start + at.numel)
