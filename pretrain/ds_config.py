"""The DeepSpeed JSON: what it may set, and what the run's YAML fills in; config.py says who owns what."""

import json
from pathlib import Path
from typing import Any

from pretrain.config import OptimizerConfig, RunConfig

# Keys of the DeepSpeed JSON that are filled from the YAML, with the YAML's key.
_OWNED_BY_YAML = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "micro_batch_size",
    "gradient_clipping": "optimizer.clip",
}
_REFUSED = {
    "optimizer": "optimizer.*",
    "scheduler": "optimizer.schedule",
    "expert_parallel": "ep_size",
    "wandb": "wandb.mode",
}


def load_ds_config(path: str, config: RunConfig, micro: int, accumulation: int) -> dict[str, Any]:
    """Reads the DeepSpeed JSON and fills its "auto" values (DeepSpeed itself resolves none).

    Raises:
        ValueError: not JSON, or a key that the YAML owns is set there too.
        FileNotFoundError: no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--ds_config {path} does not exist; ds_configs/ has some to start from")
    try:
        values = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"--ds_config {path} is not valid JSON: {error}") from None
    stage = values.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise ValueError(
            f"zero_optimization.stage={stage} in {path} is not supported: without ZeRO DeepSpeed clips "
            "expert gradients wrongly and reports no gradient norm; choose 1, 2 or 3"
        )
    if values.get("fp16", {}).get("enabled"):
        raise ValueError(f"fp16 is enabled in {path}, but its loss scaling is not supported; enable bf16")
    for key, yaml_key in _OWNED_BY_YAML.items():
        if values.get(key, "auto") != "auto":
            raise ValueError(
                f"{key}={values[key]!r} in {path} is also set by {yaml_key} of the YAML; "
                'write "auto" in the JSON and set it in the YAML'
            )
    for key, yaml_key in _REFUSED.items():
        if key in values:
            raise ValueError(
                f"section {key!r} in {path} is also set by {yaml_key} of the YAML; delete it from the JSON"
            )
    values["train_batch_size"] = config.global_batch_size
    values["train_micro_batch_size_per_gpu"] = micro
    values["gradient_accumulation_steps"] = accumulation
    values["gradient_clipping"] = config.optimizer.clip
    values["zero_force_ds_cpu_optimizer"] = False  # the optimizer is ours, with offload too
    _fit_to_optimizer(values, config.optimizer, path)
    return values


def _fit_to_optimizer(values: dict[str, Any], optimizer: OptimizerConfig, path: str) -> None:
    """Checks what the optimizer requires of the ZeRO settings, and fills in reduce_scatter."""
    zero = values["zero_optimization"]
    stage, half = zero["stage"], values.get("bf16", {}).get("enabled")
    if stage == 1 and half and values.get("data_types", {}).get("grad_accum_dtype") == "fp32":
        # DeepSpeed uses a separate optimizer here, in which judge_grad_norm cannot skip a step.
        raise ValueError(
            f"data_types.grad_accum_dtype=fp32 with bf16 and stage 1 in {path} is not supported; "
            "set zero_optimization.stage to 2 or 3"
        )
    # Under ZeRO-3 a rank needs whole gradients to orthogonalise them; DeepSpeed refuses reduce_scatter.
    if optimizer.kind == "muon" and stage == 3 and zero.setdefault("reduce_scatter", False):
        raise ValueError(
            f"reduce_scatter=true in {path} does not go with optimizer.kind=muon under ZeRO-3; delete it"
        )
