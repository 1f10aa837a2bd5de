"""The keys of DeepSpeed 0.19.8's JSON: what this project supports, with types and limits, and the rest.

tests/pretrain/test_ds_config.py compares both with all that the installed DeepSpeed reads.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from common.schema import Count, CountOrZero, Limits

# What this project does not support of what DeepSpeed reads or has removed, with the reason.
REFUSED = {
    "activation_checkpointing": "execution.checkpointing of the YAML does this",
    "aio": "it configures NVMe, whose optimizer states DeepSpeed cannot save with experts",
    "autotuning": "runs are planned by pretrain/plan.py",
    "bfloat16": "it is the old name of bf16; use that",
    "checkpoint": "checkpoints are written and converted by pretrain/checkpoint.py",
    "comet": "wandb of the YAML reports runs",
    "compile": "execution.compile of the YAML does this",
    "data_efficiency": "data.stages of the YAML orders the data",
    "dataloader_drop_last": "the data come from data_pipeline, not from DeepSpeed's loader",
    "datastates_ckpt": "checkpoints are written by pretrain/checkpoint.py",
    "disable_allgather": "no run was ever tested with it",
    "expert_parallel": "it is also set by ep_size of the YAML",
    "fp8": "DeepSpeed has no such section; enable bf16",
    "gradient_allreduce_op": "losses are scaled for the mean of gradients",
    "gradient_predivide_factor": "losses are scaled for the mean of gradients",
    "hybrid_engine": "it serves reinforcement learning",
    "managed_gradient_accumulation": "the trainer ends steps by DeepSpeed's own count of micro-batches",
    "optimizer": "it is also set by optimizer.* of the YAML",
    "pipeline": "pipeline parallelism is not supported; use ZeRO-3 and ep_size",
    "prescale_gradients": "losses are scaled for the mean of gradients",
    "scheduler": "it is also set by optimizer.schedule of the YAML",
    "seq_parallel_communication_data_type": "sequence parallelism is not supported",
    "tensor_parallel": "tensor parallelism is not supported; use ZeRO-3 and ep_size",
    "timers": "metrics.jsonl has the time of every step",
    "torch_autocast": "its precision would not be the exports'; enable bf16",
    "use_data_before_expert_parallelism": "experts are spread over consecutive ranks",
    "vocabulary_size": "it is the tokenizer's",
    "wandb": "it is also set by wandb.mode of the YAML",
    "weight_quantization": "it serves inference",
    "zero_optimization.compute_grad_norm": "the limits on spikes need the norm",
    "zero_optimization.cpu_offload": "it is the old name of offload_optimizer; use that",
    "zero_optimization.cpu_offload_param": "it is the old name of offload_param; use that",
    "zero_optimization.cpu_offload_use_pin_memory": "offload_optimizer.pin_memory does this",
    "zero_optimization.elastic_checkpoint": "a run resumes on any number of ranks without it",
    "zero_optimization.leaf_module": "the decoder layers are leaf modules already",
    "zero_optimization.legacy_stage1": "no run was ever tested with it",
    "zero_optimization.pipeline_loading_checkpoint": "pipeline parallelism is not supported",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "it is for NVMe, which is not supported",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "exports gather their weights themselves",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "exports gather their weights themselves",
    "zero_optimization.stage3_module_granularity_threshold": "the decoder layers are leaf modules already",
    "zero_optimization.zenflow": "its optimizer cannot skip a step",
    "zero_optimization.zero_hpz_partition_size": "DeepSpeed refuses it together with experts",
    "zero_optimization.zero_quantized_gradients": "DeepSpeed refuses it together with experts",
    "zero_optimization.zero_quantized_nontrainable_weights": "it would change the results",
    "zero_optimization.zero_quantized_weights": "it would change the results",
    **{
        key: "DeepSpeed has removed it"
        for key in (
            *("amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity"),
            *("graph_harvesting", "nebula", "progressive_layer_drop", "quantize_training"),
            *("sparse_attention", "sparse_gradients", "zero_optimization.mics_shard_size"),
            *("zero_optimization.mics_hierarchical_params_gather", "zero_optimization.zeropp_loco_param"),
        )
    },
    "bf16.bf16_master_weights_and_grads": "exports and averages need fp32 weights",
    "bf16.bf16_optimizer_states": "exports and averages need fp32 weights",
    "fp16.fp16_master_weights_and_grads": "exports and averages need fp32 weights",
    "data_types.buffer_dtype": "the router's balancing bias needs fp32",
    "data_types.param_dtype": "bf16.enabled sets it",
    **{
        f"zero_optimization.offload_{what}.{key}": "it is for NVMe, which is not supported"
        for what, keys in {
            "param": ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu"),
            "optimizer": ("nvme_path", "buffer_count", "pipeline_read", "pipeline_write", "fast_init"),
        }.items()
        for key in keys
    },
    **{
        f"zero_optimization.offload_optimizer.{key}": "it needs DeepSpeed's own optimizer"
        for key in ("ratio", "super_offload", "cpuadam_cores_perc")
    },
}
# Of zero_optimization: keys that only some stages read, beside those that begin with stage3_.
STAGES = {
    "offload_param": (3,),
    "sub_group_size": (3,),
    "memory_efficient_linear": (3,),
    "override_module_apply": (3,),
    "allgather_partitions": (1, 2),
    "use_multi_rank_bucket_allreduce": (1, 2),
    "round_robin_gradients": (1, 2),
}

Elements = Annotated[int, Limits(least=0, most=2**63 - 1)]
Precision = Literal["fp32", "bf16"]


@dataclass
class Offload:
    device: Literal["none", "cpu"] = "none"
    pin_memory: bool = True


@dataclass
class ZeroOptimization:
    stage: Literal[0, 1, 2, 3]  # 0 is refused, with its reason
    contiguous_gradients: bool = True
    overlap_comm: bool | None = None
    reduce_scatter: bool = True
    reduce_bucket_size: Annotated[int, Limits(least=1, most=2**63 - 1)] = 5 * 10**8
    allgather_bucket_size: Elements = 5 * 10**8
    allgather_partitions: bool = True
    use_multi_rank_bucket_allreduce: bool = True
    round_robin_gradients: bool = False
    parameter_alignment: bool = False
    ignore_unused_parameters: bool = True
    load_from_fp32_weights: bool = True
    offload_optimizer: Offload | None = None
    offload_param: Offload | None = None
    sub_group_size: Elements = 10**9
    memory_efficient_linear: bool = True
    override_module_apply: bool = True
    log_trace_cache_warnings: bool = False
    enable_sanity_checks: bool = False
    stage3_prefetch_bucket_size: Elements = 5 * 10**7
    stage3_param_persistence_threshold: Elements = 10**5
    stage3_model_persistence_threshold: Elements = 2**63 - 1
    stage3_max_live_parameters: Elements = 10**9
    stage3_max_reuse_distance: Elements = 10**9
    stage3_use_all_reduce_for_fetch_params: bool = False
    stage3_allgather_sequential: bool = False


@dataclass
class Bf16:
    enabled: bool = False
    immediate_grad_update: bool = False
    # False would also ignore the steps that stability.py refuses: it makes their norm infinite.
    check_grad_overflow: Literal[True] = True


@dataclass
class Fp16:
    """Accepted while it is off, as many files have it."""

    enabled: bool = False
    auto_cast: bool = False
    loss_scale: Annotated[float, Limits(least=0)] = 0.0
    initial_scale_power: CountOrZero = 16
    loss_scale_window: Count = 1000
    hysteresis: CountOrZero = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: Count = 1


@dataclass
class DataTypes:
    grad_accum_dtype: Precision | None = None
    keep_in_fp32_modules: list[str] | Literal["auto"] = "auto"


@dataclass
class Monitor:
    enabled: bool = False
    output_path: str = ""
    job_name: str = "DeepSpeedJobName"


@dataclass
class CommsLogger:
    enabled: bool = False
    prof_all: bool = True
    prof_ops: list[str] = field(default_factory=list)
    verbose: bool = False
    debug: bool = False


@dataclass
class FlopsProfiler:
    enabled: bool = False
    recompute_fwd_factor: Annotated[float, Limits(least=0, most=100)] = 0.0
    profile_step: Count = 1
    module_depth: int = -1
    top_modules: Count = 1
    detailed: bool = True
    output_file: str | None = None


@dataclass
class DeepSpeedJson:
    zero_optimization: ZeroOptimization
    # Filled in from the YAML
    train_batch_size: Literal["auto"] = "auto"
    train_micro_batch_size_per_gpu: Literal["auto"] = "auto"
    gradient_accumulation_steps: Literal["auto"] = "auto"
    gradient_clipping: Literal["auto"] = "auto"
    bf16: Bf16 = field(default_factory=Bf16)
    fp16: Fp16 = field(default_factory=Fp16)
    data_types: DataTypes = field(default_factory=DataTypes)
    communication_data_type: Literal["fp32", "bf16", "fp16"] | None = None
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = False  # true is refused, with its reason
    steps_per_print: Count | None = None
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    disable_python_gc: bool = False
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = None
    comms_logger: CommsLogger = field(default_factory=CommsLogger)
    flops_profiler: FlopsProfiler = field(default_factory=FlopsProfiler)
    tensorboard: Monitor = field(default_factory=Monitor)
    csv_monitor: Monitor = field(default_factory=Monitor)
