"""Describes a run without starting it: `pretrain/main.py --dry-run`."""

from dataclasses import asdict

from omegaconf import OmegaConf

from model.counts import flops_per_token, num_parameters, training_flops_per_token
from pretrain.config import check_layout
from pretrain.planning.communication import gather_schedule
from pretrain.planning.layout import Layout, model_parts
from pretrain.planning.memory import memory
from pretrain.setup import Run


def describe(run: Run) -> str:
    """The resolved config, parameters, FLOPs and memory per rank, part by part.

    Memory is predicted by planning/memory.py, for even expert loads in the precision of the DeepSpeed JSON.
    """
    config, model, state = run.config, run.model_config, run.state
    resolved = OmegaConf.to_yaml(OmegaConf.create({**asdict(config), "model": model.to_dict()}))
    micro, accumulation = check_layout(config, model, state.world_size)
    layout = Layout(
        gpus=state.world_size,
        ep=state.ep_size,
        stage=state.zero_stage,
        micro_batch_size=micro,
        accumulation=accumulation,
        sequence_length=config.data.sequence_length,
        checkpointing=config.execution.checkpointing,
        element_bytes=2 if run.ds_config.get("bf16", {}).get("enabled") else 4,
        gpus_per_node=state.world_size,
    )
    parts = model_parts(model)
    gathering = gather_schedule(model, parts, layout) if layout.stage == 3 else None
    predicted = memory(model, parts, layout, gathering, skew=1.0)
    length = config.data.sequence_length
    total, active = num_parameters(model), num_parameters(model, active=True)
    forward, training = flops_per_token(model, length), training_flops_per_token(model, length)
    source = "the first step" if run.resume_from is None else str(run.resume_from)
    adapters = "" if config.lora is None else " without lora, which needs less"
    lines = [
        resolved.rstrip(),
        "",
        f"starts from      {source}, ends after step {config.max_steps}",
        f"parameters       {total:,} ({active:,} active per token)",
        f"FLOPs per token  {forward:.4g} forward, {training:.4g} in training, "
        f"at {model.recurrence.num_steps} loop steps",
        f"per step         {layout.step_tokens:,} tokens, {layout.step_tokens * training:.4g} FLOPs",
        f"layout           {layout.gpus} ranks, ep_size {layout.ep}, ZeRO stage {layout.stage}, "
        f"{accumulation} micro-batches of {micro} rows per rank",
        f"memory per rank  {_megabytes(sum(predicted.values()))}, predicted{adapters}",
        *(f"  {part:24}{_megabytes(size)}" for part, size in predicted.items()),
    ]
    return "\n".join(lines)


def _megabytes(size: float) -> str:
    return f"{size / 1e6:12,.1f} MB"
