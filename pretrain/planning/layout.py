"""What a plan is computed from: the model's tensors, the layout of the run, the hardware."""

import functools
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Annotated

import torch

from common.schema import Count, Limits, check_fields
from model import ModelConfig, ZeroModel

GPUs = Annotated[int, Limits(least=1, most=10**6)]
Figure = Annotated[float, Limits(least=1, most=10**30)]
Fraction = Annotated[float, Limits(above=0, most=1)]
Loads = list[list[float]]  # by MoE layer, each expert's share of the tokens


@dataclass(frozen=True)
class Hardware:
    """Stated figures of one kind of GPU and its links, and the fraction of each assumed to be achievable.

    The defaults are from the data sheet of the H100 SXM, with 8 GPUs per node and one 400 Gb/s InfiniBand
    port each. The fractions are assumptions that this project has not measured.
    """

    gpus_per_node: GPUs = 8
    peak_flops: Figure = 989e12  # dense bf16, FLOP/s
    memory_bytes: Figure = 80e9
    memory_bandwidth: Figure = 3.35e12  # bytes/s
    nvlink_bandwidth: Figure = 450e9  # bytes/s each way, within a node
    network_bandwidth: Figure = 50e9  # bytes/s each way, between nodes
    compute_fraction: Fraction = 0.4
    memory_fraction: Fraction = 0.9  # usable; the rest is CUDA context, NCCL and fragmentation
    memory_bandwidth_fraction: Fraction = 0.7
    nvlink_fraction: Fraction = 0.7
    network_fraction: Fraction = 0.7
    # Share of ZeRO's exchanges hidden, or of the arithmetic where that is shorter
    overlap: Annotated[float, Limits(least=0, most=1)] = 0.8
    # Seconds of a collective per doubling of its group
    hop_latency: Annotated[float, Limits(least=0, most=1)] = 10e-6

    @property
    def usable_bytes(self) -> float:
        return self.memory_bytes * self.memory_fraction


@dataclass(frozen=True)
class ZeroSettings:
    """DeepSpeed 0.19.8's defaults for what ds_configs/ omits, in elements (runtime/zero/config.py)."""

    reduce_bucket_size: float = 5e8
    max_reuse_distance: float = 1e9  # stage 3 keeps what is used again within this many parameters
    sub_group_size: float = 1e9  # stage 3 updates at most this many of a rank's elements at once


@dataclass(frozen=True)
class Layout:
    """How a run is distributed over the GPUs.

    Raises:
        ValueError: sizes that do not divide each other; the line names value, limit and fix.
    """

    gpus: GPUs
    ep: GPUs = 1
    stage: int = 3
    micro_batch_size: Count = 1  # rows
    accumulation: Count = 1  # micro-batches per step
    sequence_length: Count = 2048  # tokens
    checkpointing: str = "none"  # as execution.checkpointing
    element_bytes: int = 2  # of weights, gradients, activations: bf16
    # None: as element_bytes.
    gradient_bytes: int | None = None  # of accumulated gradients: grad_accum_dtype
    reduction_bytes: int | None = None  # of what ranks add up: communication_data_type
    gpus_per_node: GPUs = 8
    zero: ZeroSettings = field(default_factory=ZeroSettings)

    def __post_init__(self) -> None:
        check_fields(self, "")
        node = self.gpus_per_node
        if self.gpus > node and self.gpus % node:
            raise ValueError(f"gpus={self.gpus} does not fill nodes of {node}; choose a multiple of {node}")
        if self.gpus % self.ep:
            raise ValueError(f"ep={self.ep} does not divide the {self.gpus} GPUs; choose one of its divisors")
        if node % self.ep and self.ep % node:
            raise ValueError(
                f"ep={self.ep} neither divides nor is a multiple of the {node} GPUs of a node; "
                "choose one that does"
            )

    @property
    def micro_tokens(self) -> int:
        """Tokens that a GPU computes at once."""
        return self.micro_batch_size * self.sequence_length

    @property
    def step_tokens(self) -> int:
        """Tokens of the global batch."""
        return self.micro_tokens * self.accumulation * self.gpus

    def group(self, name: str) -> tuple[int, int]:
        """GPUs of a process group, and how many of them share a node.

        world: all. expert: ep consecutive ones. expert_data: every ep-th.
        """
        node = min(self.gpus, self.gpus_per_node)
        if name == "world":
            return self.gpus, node
        if name == "expert":
            return self.ep, min(self.ep, node)
        return self.gpus // self.ep, max(1, node // self.ep)


def check_experts(config: ModelConfig, ep: int) -> None:
    """Raises ValueError if ep GPUs cannot share the experts evenly."""
    if ep > 1 and not config.has_experts:
        raise ValueError(f"ep={ep}, but the model has no experts; choose ep=1")
    if ep > 1 and config.n_routed_experts % ep:
        raise ValueError(
            f"ep={ep} does not divide the {config.n_routed_experts} experts; choose one of their divisors"
        )


@dataclass(frozen=True)
class Part:
    """A module that ZeRO-3 gathers as a whole: elements of its tensors, experts counted over all ranks."""

    dense: tuple[int, ...]
    experts: tuple[int, ...]
    leaf: bool  # a decoder layer, made a leaf module by engine.py

    def held(self, ep: int) -> int:
        """Elements that one rank computes with."""
        return sum(self.dense) + sum(self.experts) // ep

    def shards(self, layout: Layout) -> dict[str, int]:
        """Elements that one rank keeps under ZeRO-3, which pads each tensor, by process group."""
        world, data = layout.group("world")[0], layout.group("expert_data")[0]
        return {
            "world": _sharded(self.dense, 1, world),
            "expert_data": _sharded(self.experts, layout.ep, data),
        }


@functools.cache
def _sharded(sizes: tuple[int, ...], ep: int, ranks: int) -> int:
    return sum(math.ceil(n // ep / ranks) for n in sizes)


def model_parts(config: ModelConfig, without: Collection[str] = ()) -> dict[str, Part]:
    """The modules of a model by name, from the model built without storage, without some of its tensors."""
    with torch.device("meta"):
        model = ZeroModel(config)
    tensors: dict[str, tuple[list[int], list[int]]] = {}
    for name, parameter in model.named_parameters():
        words = name.removeprefix("model.").split(".")
        part = ".".join(words[:2]) if words[0] in ("layers", "recurrence", "mtp") else words[0]
        if name not in without:
            tensors.setdefault(part, ([], []))[".experts." in name].append(parameter.numel())
    return {
        name: Part(tuple(dense), tuple(experts), name.startswith(("layers", "mtp")))
        for name, (dense, experts) in tensors.items()
    }
