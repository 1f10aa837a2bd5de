"""Expert parallelism: everything that relies on private names of DeepSpeed's AutoEP, for one pinned version.

Our MoE layer keeps its own routing; marked as an AutoEP layer, it makes ZeRO-3 shard its experts over the
expert-data-parallel group, sum their gradients there and count them once in the gradient norm.

Shapes: n rows sent here, m rows received, D hidden, E experts, L = E / ep_size local experts.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.checkpoint import autoep_universal, ds_to_universal
from deepspeed.checkpoint.autoep_affine import (
    autoep_experts_for_rank,
    autoep_placement_to_affine_map,
    legacy_uniform_autoep_placement_descriptor,
)
from deepspeed.checkpoint.constants import (
    AFFINE_MAP,
    AUTOEP_EXPERT_PLACEMENT,
    AUTOEP_PARAM_EP_RANK,
    AUTOEP_PARAM_LOCAL_EXPERTS,
    AUTOEP_PARAM_LOGICAL_SHAPE,
    DS_AUTOEP_UC_META,
)
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import stage3
from deepspeed.utils import groups
from torch import Tensor, nn

from model.config.execution import ExecutionConfig
from model.config.model import ModelConfig
from model.dispatch import Dispatch, Permute, ToRows, inverse_permutation
from model.moe import Experts, MoE
from pretrain import heartbeat
from pretrain.transfer import Fetched

PINNED_VERSION = "0.19.8"


def check_version() -> None:
    """Raises RuntimeError under any DeepSpeed version except the one whose private names are used here."""
    found = deepspeed.__version__.split("+")[0]
    if found != PINNED_VERSION:
        raise RuntimeError(
            f"deepspeed {found} is installed, but expert parallelism is written for {PINNED_VERSION}; "
            f"run `pip install deepspeed=={PINNED_VERSION}`"
        )


def reduce_gradients_when_complete() -> None:
    """Makes ZeRO-3 reduce a leaf module's parameter when its gradient is complete; call before initialize.

    By default it reduces all of a leaf module's parameters after the backward pass of EVERY call of the
    module, with zeros for gradients still to come. A layer that a step runs in several parallel branches lost
    the gradients of its experts that way. Our modules need no zeros: every weight has a gradient whenever its
    layer runs.
    """
    stage3.z3_leaf_parameter = lambda parameter: False


def group_name(ep_size: int) -> str:
    return f"ep_size_{ep_size}"


def create_groups(ep_size: int) -> None:
    """Creates the expert-parallel groups; call after init_distributed and before the model is built."""
    check_version()
    groups._create_expert_and_data_parallel(ep_size)


def expert_parallel_class(ep_size: int) -> type[MoE]:
    """The MoE layer class for groups of ep_size ranks, to be passed to ZeroModel as moe_class."""
    return type("ExpertParallelMoE", (_ExpertParallelMoE,), {"ep_size": ep_size})


class _Exchange:
    """Rows on their way to other ranks of a group, and later their gradients on the way back.

    Args:
        send, receive: rows to and from each rank.
    """

    def __init__(self, send: list[int], receive: list[int], group: Any) -> None:
        self.send, self.receive, self.group = send, receive, group
        self._travelling: tuple[Tensor, Any] | None = None

    def start(self, rows: Tensor, back: bool = False) -> Tensor:
        """rows (n, ...) -> (m, ...), empty until finish(); back: the other way."""
        send, receive = (self.receive, self.send) if back else (self.send, self.receive)
        received = rows.new_empty(sum(receive), *rows.shape[1:])
        heartbeat.note("all-to-all of rows")
        work = dist.all_to_all_single(
            received, rows.contiguous(), receive, send, group=self.group, async_op=True
        )
        self._travelling = received, work
        return received

    def finish(self) -> Tensor:
        """What start() returned, filled. Waits on a CPU; on a GPU its queue waits, not the host."""
        assert self._travelling is not None
        (received, work), self._travelling = self._travelling, None
        work.wait()
        return received


class _Start(torch.autograd.Function):
    """Sends rows; the result is for _Finish alone. Backward takes what _Finish's has sent back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.start(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.finish(), None


class _Finish(torch.autograd.Function):
    """Waits for rows. Backward sends gradients back: what autograd runs between it and _Start's overlaps."""

    @staticmethod
    def forward(ctx: Any, received: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.finish()
        return received.view_as(received)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.start(grads[0], back=True)
        return grads[0], None  # for autograd, which wants the shape of what was received


class _AutoEPMarker(AutoEPMoELayer):
    """The type by which DeepSpeed recognises an AutoEP layer, without AutoEP's own constructor."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the groups exist before the model is built."""


# Where DeepSpeed lists the experts' tensors w1, w2 and w3, while it saves and converts checkpoints.
_LISTS = (
    (DeepSpeedEngine, "_autoep_expert_parameter_names"),
    (ds_to_universal, "_autoep_expert_param_info"),
    (autoep_universal, "get_autoep_zero12_expert_param_info"),
)


@contextmanager
def experts_in_checkpoints(hidden_act: str) -> Iterator[None]:
    """Inside, DeepSpeed saves and converts checkpoints of a model's experts, also if they have no w3."""

    def without_w3(original: Any) -> Any:
        def found(*arguments: Any) -> Any:
            names = original(*arguments)
            kept = [name for name in names if not name.endswith(".w3")]
            return {name: names[name] for name in kept} if isinstance(names, dict) else set(kept)

        return staticmethod(found)

    with ExitStack() as stack:
        for owner, name in () if hidden_act == "silu" else _LISTS:
            stack.enter_context(patch.object(owner, name, without_w3(getattr(owner, name))))
        yield


class _UngatedExperts(Experts):
    """Experts of two matrices. DeepSpeed's checkpoints name three, so that it finds an empty w3."""

    def __init__(self, config: ModelConfig, expert_ids: range, execution: ExecutionConfig) -> None:
        super().__init__(config, expert_ids, execution)
        # Neither parameter nor buffer; DeepSpeed takes what needs no gradient for frozen.
        self.w3 = torch.empty(len(expert_ids), 0, config.hidden_size, requires_grad=True)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.pop(f"{prefix}w3", None)  # what ZeRO-1 and 2 have saved of it
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _SpreadMoE(MoE):
    """MoE with its experts spread over the ranks of an expert-parallel group; only run_experts differs."""

    ep_size: int  # set by expert_parallel_class

    def __init__(self, config: ModelConfig, execution: ExecutionConfig) -> None:
        # DeepSpeed reads these names from its AutoEP layers.
        self.ep_group_name = group_name(self.ep_size)
        self.ep_rank = groups._get_expert_parallel_rank(self.ep_group_name)
        self.num_experts = config.n_routed_experts
        self.num_local_experts = config.n_routed_experts // self.ep_size
        self.expert_placement_descriptor = legacy_uniform_autoep_placement_descriptor(
            self.num_experts, self.num_local_experts, self.ep_size
        )
        super().__init__(config, execution)
        self.ep_group = groups._get_expert_parallel_group(self.ep_group_name)

    def build_experts(self) -> Experts:
        first = self.ep_rank * self.num_local_experts
        kind = Experts if self.config.hidden_act == "silu" else _UngatedExperts
        experts = kind(self.config, range(first, first + self.num_local_experts), self.execution)
        for stacked in (experts.w1, experts.w2, experts.w3):
            self._mark(stacked)
        return experts

    def _mark(self, parameter: Tensor) -> None:
        logical_shape = [self.num_experts, *parameter.shape[1:]]
        placement = self.expert_placement_descriptor
        marks = {
            "allreduce": False,
            "group_name": self.ep_group_name,
            "is_expert_group": True,
            "ds_zero_placement_family": "autoep_expert",
            "ds_zero_partition_group_name": self.ep_group_name,
            "ds_zero_partition_process_group": groups._get_expert_data_parallel_group(self.ep_group_name),
            DS_AUTOEP_UC_META: {
                AUTOEP_EXPERT_PLACEMENT: placement,
                AFFINE_MAP: autoep_placement_to_affine_map(placement, logical_shape).to_dict(),
                AUTOEP_PARAM_LOGICAL_SHAPE: logical_shape,
                AUTOEP_PARAM_EP_RANK: self.ep_rank,
                AUTOEP_PARAM_LOCAL_EXPERTS: list(autoep_experts_for_rank(placement, self.ep_rank)),
            },
        }
        for name, value in marks.items():
            setattr(parameter, name, value)

    def run_experts(
        self, tokens: Tensor, weights: Tensor | None, to: Dispatch, meanwhile: Callable[[], Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """See MoE; through the ranks that hold the experts, with `meanwhile` while rows travel there."""
        if self.ep_size == 1:
            return super().run_experts(tokens, weights, to, meanwhile)
        by_source, sizes = self._exchanged_counts(to.counts)
        rows = ToRows.apply(tokens, to.order, to.back)  # queued before the host waits
        send, receive = sizes.read()["rows"].tolist()
        given = [rows] if weights is None else [rows, weights]
        exchanges = [_Exchange(send, receive, self.ep_group) for _ in given]
        travelling = [_Start.apply(x, e) for x, e in zip(given, exchanges, strict=True)]
        always = meanwhile()
        # Rows arrive ordered by source rank, then expert; the experts take them ordered by expert.
        expert = torch.arange(self.num_local_experts, device=tokens.device).repeat(self.ep_size)
        order = expert.repeat_interleave(by_source.flatten(), output_size=sum(receive)).argsort(stable=True)
        back = inverse_permutation(order)
        arrived = [_Finish.apply(x, e) for x, e in zip(travelling, exchanges, strict=True)]
        arrived = [Permute.apply(x, order, back) for x in arrived]
        out = self.experts(arrived[0], by_source.sum(0), *arrived[1:])
        exchange = _Exchange(receive, send, self.ep_group)
        return _Finish.apply(_Start.apply(Permute.apply(out, back, order), exchange), exchange), always

    def _exchanged_counts(self, counts: Tensor) -> tuple[Tensor, Fetched]:
        """counts (E,) of the rows to send -> (ep_size, L) of those to receive, and on its way to the host
        "rows" (2, ep_size), sent to and received from each rank.

        all_to_all takes its sizes from the host, which must wait for them: a layer's one wait.
        """
        received = torch.empty_like(counts)
        heartbeat.note("all-to-all of counts")
        dist.all_to_all_single(received, counts, group=self.ep_group)
        both = torch.stack((counts, received)).view(2, self.ep_size, self.num_local_experts)
        return both[1], Fetched({"rows": both.sum(2)})


class _ExpertParallelMoE(_SpreadMoE, _AutoEPMarker):
    """The same, known to DeepSpeed."""


def unmark_frozen(model: nn.Module) -> None:
    """Makes layers with frozen experts unknown to DeepSpeed, which cannot save them; call before initialize.

    With one expert-parallel rank their experts become parameters like any other. With more, all of a layer's
    experts must be frozen (see init.fit); they stay spread over the ranks.
    """
    for layer in list(model.modules()):
        if not isinstance(layer, _ExpertParallelMoE):
            continue
        experts = list(layer.experts.named_parameters())
        if all(parameter.requires_grad for _, parameter in experts):
            continue
        layer.__class__ = type("SpreadMoE", (_SpreadMoE,), {"ep_size": layer.ep_size})
        if layer.ep_size == 1:
            for name, parameter in experts:  # without the marks
                setattr(layer.experts, name, nn.Parameter(parameter.detach(), parameter.requires_grad))


def is_expert(parameter: Tensor) -> bool:
    return getattr(parameter, "ds_zero_placement_family", "") == "autoep_expert"


def experts_by_rank(local: Tensor, ep_size: int) -> Iterator[Tensor]:
    """Every rank's (L, ...) of all experts (E, ...) in order, on every rank, one after another."""
    if ep_size == 1:
        yield local
        return
    group = groups._get_expert_parallel_group(group_name(ep_size))
    for source in range(ep_size):
        part = local.contiguous() if dist.get_rank(group) == source else torch.empty_like(local)
        dist.broadcast(part, dist.get_global_rank(group, source), group=group)
        yield part


def gather_experts(local: Tensor, ep_size: int) -> Tensor:
    """All experts (E, ...) from every rank's (L, ...), on every rank."""
    if ep_size == 1:
        return local
    group = groups._get_expert_parallel_group(group_name(ep_size))
    parts = [torch.empty_like(local) for _ in range(ep_size)]
    dist.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts)


def local_experts(full: Tensor, ep_size: int) -> Tensor:
    """This rank's (L, ...) of all experts (E, ...)."""
    return full.chunk(ep_size)[groups._get_expert_parallel_rank(group_name(ep_size))]
