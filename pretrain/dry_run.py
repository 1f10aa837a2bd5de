"""Describes a run without starting it: `pretrain/main.py --dry-run`."""

from dataclasses import asdict

from omegaconf import OmegaConf

from model.config.unused import unused_keys
from model.counts import flops_per_token, num_parameters, training_flops_per_token
from pretrain.depths import deepest
from pretrain.planning.communication import gather_schedule
from pretrain.planning.layout import Layout, ZeroSettings, model_parts
from pretrain.planning.memory import host_start, memory, start_memory
from pretrain.setup import Outline, Run, host_memory

# Of a number, by a type of the DeepSpeed JSON; None: as of a weight.
BYTES = {None: None, "bf16": 2, "fp16": 2, "fp32": 4}


def describe(run: Outline) -> str:
    """The resolved config, parameters, FLOPs and memory per rank, part by part.

    Memory is predicted by planning/memory.py, on a GPU unless it says otherwise, for even expert loads in the
    precision of the DeepSpeed JSON.
    """
    config, model = run.config, run.model_config
    resolved = OmegaConf.to_yaml(OmegaConf.create({**asdict(config), "model": model.to_dict()}))
    layout = layout_of(run)
    parts, trained = model_parts(model), deepest(model)
    gathering = gather_schedule(trained, parts, layout) if layout.stage == 3 else None
    learned = model_parts(model, () if run.start is None else run.start.frozen)
    predicted = memory(trained, parts, layout, gathering, skew=1.0, trained=learned)
    given, room = run.start is not None, host_memory()
    start = start_memory(parts, layout, learned, given)
    on_cpus = [
        sum(bytes_of.values())
        for bytes_of in (
            start_memory(parts, layout, learned, given, cpu=True),
            memory(trained, parts, layout, gathering, skew=1.0, trained=learned, cpu=True),
        )
    ]
    length = config.data.sequence_length
    total, active = num_parameters(model), num_parameters(model, active=True)
    forward, training = flops_per_token(model, length), training_flops_per_token(trained, length)
    depth, most = model.recurrence.num_steps, trained.recurrence.num_steps
    depths = f"{depth} loop steps" if depth == most else f"{depth} and, the deepest, {most} loop steps"
    adapters = "" if config.lora is None else " without lora, which needs less"
    lines = [
        resolved.rstrip(),
        "",
        f"starts from      {_start(run)}, ends after step {config.max_steps}",
        *([] if run.start is None else [f"weights          {run.start.summary()}", *run.start.notes()[1:]]),
        f"data             {_data(run)}",
        *_unchecked(run),
        *(f"set but unused   {line}" for line in unused_keys(model)),
        f"parameters       {total:,} ({active:,} active per token)",
        f"FLOPs per token  {forward:.4g} forward, {training:.4g} in training, at {depths}",
        f"per step         {layout.step_tokens:,} tokens, {layout.step_tokens * training:.4g} FLOPs",
        f"layout           {layout.gpus} ranks, ep_size {layout.ep}, ZeRO stage {layout.stage}, "
        f"{run.accumulation} micro-batches of {run.micro_batch_size} rows per rank",
        f"memory per rank  {_megabytes(sum(predicted.values()))}, predicted{adapters}; the process itself "
        "comes on top",
        *(f"  {part:24}{_megabytes(size)}" for part, size in predicted.items()),
        f"before step 1    {_megabytes(sum(start.values()))} per rank, and while it makes the weights "
        f"{host_start(parts, layout, given) / 1e6:,.1f} MB of host memory",
        f"without GPUs     {_megabytes(on_cpus[0])} of host memory per rank before step 1, then "
        f"{on_cpus[1] / 1e6:,.1f} MB"
        + (f": MORE THAN THIS MACHINE'S {room / 1e6:,.1f} MB" if max(on_cpus) > room else ""),
    ]
    return "\n".join(lines)


def layout_of(run: Outline) -> Layout:
    """The run as the planner sees it, with all its ranks in one node."""
    config, zero, defaults = run.config, run.ds_config["zero_optimization"], ZeroSettings()
    return Layout(
        gpus=run.world_size,
        ep=config.ep_size,
        stage=run.zero_stage,
        micro_batch_size=run.micro_batch_size,
        accumulation=run.accumulation,
        sequence_length=config.data.sequence_length,
        checkpointing=config.execution.checkpointing,
        element_bytes=run.element_bytes,
        gradient_bytes=BYTES[run.ds_config.get("data_types", {}).get("grad_accum_dtype")],
        reduction_bytes=BYTES[run.ds_config.get("communication_data_type")],
        gpus_per_node=run.world_size,
        zero=ZeroSettings(
            zero.get("reduce_bucket_size", defaults.reduce_bucket_size),
            zero.get("stage3_max_reuse_distance", defaults.max_reuse_distance),
            zero.get("sub_group_size", defaults.sub_group_size),
        ),
    )


def _data(run: Outline) -> str:
    path, vocabulary = run.config.data.path, f"{run.model_config.vocab_size:,}"
    if isinstance(run, Run):
        return f"{path}, a vocabulary of {vocabulary}"
    given = "from model.vocab_size" if "vocab_size" in run.config.model else "assumed"
    return f"{path} IS NOT BUILT YET: a vocabulary of {vocabulary}, {given}"


def _unchecked(run: Outline) -> list[str]:
    """What only the data can tell."""
    if isinstance(run, Run):
        return []
    tokens = run.config.max_steps * run.config.tokens_per_step
    return [
        "not checked      whether the tokenizer has that vocabulary, how often the data hold the "
        f"{tokens:,} tokens of the run, and whether a checkpoint in output_dir fits them"
    ]


def _start(run: Outline) -> str:
    if not isinstance(run, Run):
        return "the first step, or a checkpoint in output_dir that fits the data"
    return "the first step" if run.resume_from is None else str(run.resume_from)


def _megabytes(size: float) -> str:
    return f"{size / 1e6:12,.1f} MB"
