"""Builds a run's model shard by shard: beside its shards, a rank holds one whole tensor at a time.

The model is built with shapes only. Then its parameters get their values one after another, in host memory
and in the precision of training; under ZeRO-3 each is sharded before the next one exists.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import deepspeed
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from model import ModelConfig, ZeroModel
from model.initialization import fill_initial
from model.moe import MoE
from pretrain.config import RunConfig
from pretrain.ds_config import training_dtype
from pretrain.expert_parallel import expert_parallel_class, is_expert, local_experts, unmark_frozen
from pretrain.init import Start, freeze, given_values
from pretrain.lora import adapt
from pretrain.process_group import device

M = TypeVar("M", bound=nn.Module)


def build_model(
    config: RunConfig,
    model_config: ModelConfig,
    ds_config: dict[str, Any],
    model_class: type[ZeroModel] = ZeroModel,
    start: Start | None = None,
) -> ZeroModel:
    """The model of a run with its initial values, as deepspeed.initialize takes it; all ranks take part.

    Under ZeRO-3 each rank holds its shards of every parameter, otherwise the experts of its place in the
    expert-parallel group and all else whole.

    Raises:
        ValueError, OSError: one line; see given_values.
    """
    # DeepSpeed cannot save frozen AutoEP experts.
    moe_class = MoE if config.lora else expert_parallel_class(config.ep_size)
    model = outlined(lambda: model_class(model_config, moe_class, config.seed, config.execution))
    if start is not None:
        freeze(model, start)
        unmark_frozen(model)
    dtype = training_dtype(ds_config)
    zero3 = ds_config["zero_optimization"]["stage"] == 3
    with given_values(start) as given:

        def write(value: Tensor, module: nn.Module, path: str, name: str, like: nn.Parameter) -> None:
            whole = given(f"{path}.{name}")
            if whole is None:
                fill_initial(value, module, path, name, model_config.initializer_range, config.seed)
            else:
                value.copy_(local_experts(whole, config.ep_size) if is_expert(like) else whole)

        materialize(model, write, _sharding(ds_config, dtype) if zero3 else lambda parameter: None, dtype)
        for name, buffer in model.named_buffers():
            value = given(name)
            if value is not None:
                buffer.copy_(value)
    for module in model.modules():  # DeepSpeed moves nothing of a model that is sharded already
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device())
    if config.lora is not None:
        adapt(model, config.lora, config.seed, start.missing if start is not None else ())
    return model


def outlined(build: Callable[[], M]) -> M:
    """What `build` returns, its parameters on the meta device; its buffers have their values."""

    def without_values(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook: Any = without_values  # torch declares that it returns nothing, and takes what it returns
    with register_module_parameter_registration_hook(hook):
        return build()


@torch.no_grad()
def materialize(
    model: nn.Module,
    write: Callable[[Tensor, nn.Module, str, str, nn.Parameter], None],
    keep: Callable[[nn.Parameter], None],
    dtype: torch.dtype,
) -> None:
    """Gives the parameters of an outlined model their values, one after another.

    Args:
        write: (value, module, its path, the parameter's name, the outlined parameter) writes the value.
        keep: gets each parameter on the rank's device; what it leaves of it is kept.
        dtype: of the values.
    """
    for path, module in model.named_modules():
        for name, outline in list(module.named_parameters(recurse=False)):
            value = torch.empty(outline.shape, dtype=dtype)
            write(value, module, path, name, outline)
            parameter = nn.Parameter(value.to(device()), outline.requires_grad)
            del value
            parameter.__dict__.update(outline.__dict__)  # what DeepSpeed reads of experts
            module.register_parameter(name, parameter)
            keep(parameter)


def _sharding(ds_config: dict[str, Any], dtype: torch.dtype) -> Callable[[nn.Parameter], None]:
    """A function that shards a parameter as ZeRO-3 would shard it; all ranks call it in the same order."""
    sharded: list[Any] = []

    def shard(parameter: nn.Parameter) -> None:
        if sharded:
            sharded[0].convert_to_zero_parameters([parameter])
            return
        deepspeed.zero.Init(nn.ParameterList([parameter]), dtype=dtype, config_dict_or_path=ds_config)
        sharded.append(parameter)

    return shard
