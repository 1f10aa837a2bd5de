"""The DeepSpeed JSON: what it may set, and what the run's YAML fills in; config.py says who owns what."""

import json
from pathlib import Path
from typing import Any

import torch

from common.schema import from_plain
from pretrain.config import OptimizerConfig, RunConfig
from pretrain.ds_keys import REFUSED, STAGES, DeepSpeedJson

# Keys of the DeepSpeed JSON that are filled from the YAML, with the YAML's key.
_OWNED_BY_YAML = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "micro_batch_size",
    "gradient_clipping": "optimizer.clip",
}


def load_ds_config(path: str, config: RunConfig, micro: int, accumulation: int) -> dict[str, Any]:
    """Reads the DeepSpeed JSON and fills its "auto" values (DeepSpeed itself resolves none).

    Raises:
        ValueError: not JSON; a key that is unknown, not supported, set by the YAML or of a wrong type; keys
            that contradict each other.
        FileNotFoundError: no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--ds_config {path} does not exist; ds_configs/ has some to start from")
    try:
        read = json.loads(Path(path).read_text(), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--ds_config {path} is not valid JSON: {error}") from None
    try:
        values = _whole_numbers(read)
        for key, yaml_key in _OWNED_BY_YAML.items():
            if isinstance(values, dict) and values.get(key, "auto") != "auto":
                raise ValueError(
                    f"{key}={values[key]!r} is also set by {yaml_key} of the YAML; "
                    'write "auto" in the JSON and set it in the YAML'
                )
        _refuse(values)
        typed = from_plain(DeepSpeedJson, values, "")
        _check(typed, values, config.optimizer)
    except ValueError as error:
        raise ValueError(f"--ds_config {path}: {error}") from None
    if typed.bf16.enabled:  # DeepSpeed's default would add micro-batches up in 8 bits of mantissa
        values.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    values["train_batch_size"] = config.global_batch_size
    values["train_micro_batch_size_per_gpu"] = micro
    values["gradient_accumulation_steps"] = accumulation
    values["gradient_clipping"] = config.optimizer.clip
    values["zero_force_ds_cpu_optimizer"] = False  # the optimizer is ours, with offload too
    zero = values["zero_optimization"]
    # Under ZeRO-3 a rank needs whole gradients to orthogonalise them; DeepSpeed refuses reduce_scatter.
    if config.optimizer.kind == "muon" and zero["stage"] == 3:
        zero["reduce_scatter"] = False
    return values


def training_dtype(values: dict[str, Any]) -> torch.dtype:
    """Of the weights in the forward pass."""
    return torch.bfloat16 if values.get("bf16", {}).get("enabled") else torch.float32


def fit_buckets(values: dict[str, Any], parameters: int) -> None:
    """Lowers the default size of the gradient buckets to a model's number of parameters.

    DeepSpeed allocates them whole, 1 to 2 GB, however small the model. No bucket is cut differently by this.
    """
    default = from_plain(DeepSpeedJson, {"zero_optimization": {"stage": 1}}, "").zero_optimization
    smaller = min(default.reduce_bucket_size, parameters)
    values["zero_optimization"].setdefault("reduce_bucket_size", smaller)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict[str, Any]()
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands in one section twice; delete one of them")
        found[key] = value
    return found


def _whole_numbers(value: Any) -> Any:
    """The same values with integers for floats such as 5e8, the usual way to write sizes."""
    if isinstance(value, dict):
        return {key: _whole_numbers(item) for key, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _refuse(values: Any, section: str = "") -> None:
    """Raises ValueError for keys that DeepSpeed knows, or once knew, and this project does not support."""
    for key, value in values.items() if isinstance(values, dict) else ():
        name = f"{section}{key}"
        if name in REFUSED:
            raise ValueError(f"{name} is not supported: {REFUSED[name]}; delete it from the JSON")
        if value == "auto" and name not in _OWNED_BY_YAML and name != "data_types.keep_in_fp32_modules":
            raise ValueError(
                f'{name}="auto" is not filled in; write a value, or delete it for DeepSpeed\'s default'
            )
        _refuse(value, f"{name}.")


def _check(typed: DeepSpeedJson, values: dict[str, Any], optimizer: OptimizerConfig) -> None:
    """Raises ValueError for what does not go together, or with the optimizer."""
    zero, given, half = typed.zero_optimization, values["zero_optimization"], typed.bf16.enabled
    if zero.stage == 0:
        raise ValueError(
            "zero_optimization.stage=0 is not supported: without ZeRO DeepSpeed clips expert gradients "
            "wrongly and reports no gradient norm; choose 1, 2 or 3"
        )
    if typed.fp16.enabled:
        raise ValueError("fp16.enabled=true is not supported, for its loss scaling; enable bf16 instead")
    for key in given:
        stages = (3,) if key.startswith("stage3_") else STAGES.get(key, (1, 2, 3))
        if zero.stage not in stages:
            raise ValueError(
                f"zero_optimization.{key} is for stage {' and '.join(map(str, stages))}, but stage="
                f"{zero.stage}; delete it or change the stage"
            )
    precision = typed.data_types.grad_accum_dtype
    if precision == "bf16" and not half:
        raise ValueError("data_types.grad_accum_dtype=bf16 does not go with fp32 weights; enable bf16 too")
    if optimizer.kind == "muon" and zero.stage == 3 and given.get("reduce_scatter"):
        raise ValueError("reduce_scatter=true does not go with optimizer.kind=muon under ZeRO-3; delete it")
    if typed.zero_force_ds_cpu_optimizer:
        raise ValueError(
            "zero_force_ds_cpu_optimizer=true is not supported: the optimizer is torch's, with offload too; "
            "delete it"
        )
