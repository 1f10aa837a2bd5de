"""RunConfig, the whole description of a training run: its keys and their defaults; run_config.py reads it.

The YAML owns the model, the data, batch sizes, optimizer, schedule, clipping and ep_size. The DeepSpeed JSON
(ds_config.py) owns ZeRO stage, precision, offload and communication, and says "auto" for the rest.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

from common.schema import Count, CountOrZero, Limits, Share, Weight
from data_pipeline.loading.sample_order import Stage
from model.config.execution import ExecutionConfig
from model.config.model import ModelConfig

Rate = Annotated[float, Limits(above=0, most=100)]  # of learning
Beta = Annotated[float, Limits(least=0, below=1)]
Time = Annotated[float, Limits(above=0, most=10**9)]
Rows = Annotated[int, Limits(least=1, most=10**6)]


@dataclass
class DataConfig:
    path: str = "???"  # folder that data_pipeline/build.py wrote, or its URL
    sequence_length: Annotated[int, Limits(least=2, most=10**7)] = 512  # tokens per row
    packing: str = "concat"  # concat: cut every sequence_length tokens | best_fit: documents whole, padded
    # Source weights, each list entry from a token count of the run onwards:
    # [{tokens: 0, weights: {SOURCE: WEIGHT}}, ...]; default: the recipe's, which validation always uses.
    stages: list[Stage] = field(default_factory=list)
    shuffle_shards: CountOrZero = 0  # shards shuffled together, for a data.path that is a URL; 0: all
    max_damaged_rows: CountOrZero = 0  # rows of damaged shards that a rank may skip; one more is an error
    cache: str | None = None  # local folder for the shards of a URL
    cache_bytes: Annotated[int, Limits(least=1, most=2**63 - 1)] | None = (
        None  # limit above which its oldest shards are deleted; default: no limit
    )
    tokenizer: str | None = None  # sentencepiece model; default: the one in `path`


@dataclass
class OptimizerConfig:
    """AdamW or Muon, warm-up and decay; defaults after DeepSeek-V3 (arXiv 2412.19437, 4.2)."""

    kind: str = "adamw"  # adamw | muon: Muon for hidden matrices, AdamW for the rest
    lr: Rate = 1e-3  # peak learning rate
    # Peak learning rate of Muon's matrices, in units of spectral norm; follows the schedule of lr. The
    # default is the reference implementation's (Jordan et al. 2024).
    muon_lr: Rate = 0.02
    min_lr: Annotated[float, Limits(least=0, most=100)] = 1e-4  # learning rate at the end of the decay
    warmup_steps: CountOrZero = 50
    schedule: str = "cosine"  # cosine | wsd | constant, after the warm-up
    decay_steps: Count | None = None  # step at which min_lr is reached (cosine, wsd); default: max_steps
    wsd_decay_steps: Count | None = None  # length of wsd's decay, up to decay_steps; default: a tenth of them
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: Annotated[float, Limits(above=0, most=1)] = 1e-8
    weight_decay: Annotated[float, Limits(least=0, most=100)] = (
        0.1  # on matrices; norms, biases and embeddings are not decayed
    )
    clip: Weight = 1.0  # limit of the global gradient norm; 0: no clipping
    # Share of the past in an exponential moving average of the weights, exported to export_ema/; null: none.
    # Resumed from a checkpoint without an average, a run starts one at that checkpoint's weights.
    ema_decay: Share | None = None

    def decay_length(self, max_steps: int) -> int:
        """Steps of wsd's decay; a tenth of a run is what MiniCPM found enough (arXiv 2404.06395)."""
        return self.wsd_decay_steps or max(1, (self.decay_steps or max_steps) // 10)


@dataclass
class StabilityConfig:
    """Which steps are skipped, see stability.py. A loss or gradient that is not finite always is."""

    max_zscore: Annotated[float, Limits(least=1, most=10**6)] | None = (
        10.0  # robust z-score of loss or gradient norm above which it is a spike
    )
    window: Annotated[int, Limits(least=8, most=10**6)] = 64  # past steps that a step is compared with
    # Consecutive skipped steps that end the run. More than half the window: whatever lasts longer is a new
    # level, not a spike.
    max_skipped: Count = 50


@dataclass
class EvaluationConfig:
    every_steps: CountOrZero = 0  # steps between two evaluations, a multiple of save_every; 0: never
    tasks: str = "gsm8k,logiqa,babi,arc"  # as eval/run.py takes them
    limit: Count = 100  # problems per data file
    num_fewshot: Annotated[int, Limits(least=0, most=1000)] | None = None  # default: each task's own
    timeout_seconds: Time = 1800.0  # after which an evaluation is killed; a run's end waits no longer
    data: str | None = None  # folder of the data sets; default: $DATA_ROOT, else data
    # cpu | cuda: rank 0's GPU. Not the default: training sizes its batches to that memory, and all other
    # ranks would wait for the one that shares its GPU.
    device: str = "cpu"

    def check(self, save_every: int) -> None:
        """Raises ValueError, one line, for what does not go together."""
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"evaluation.device={self.device!r} must be cpu or cuda")
        if self.every_steps % save_every:
            raise ValueError(
                f"evaluation.every_steps={self.every_steps} is not a multiple of save_every={save_every}, "
                "but only checkpoints are evaluated; change one of them"
            )


@dataclass
class InitConfig:
    """What a run does with the weights of `--init DIR` (init.py); without it, leave the section out."""

    # error | allow: parameters and buffers of the model that DIR lacks start from their initial values, which
    # follow from `seed`, and are named in a line each.
    missing: str = "error"
    # Parameters of DIR that are not trained: shell patterns of their names, in which * matches dots too, such
    # as [model.embed_tokens.*, model.layers.[0-3].*]. What DIR lacks is always trained.
    frozen: list[str] = field(default_factory=list)
    # Learning rate of DIR's parameters in units of that of new ones, which is optimizer.lr (or muon_lr).
    old_lr_scale: Annotated[float, Limits(above=0, most=10**6)] = 1.0

    def check(self, lora: bool) -> None:
        """Raises ValueError, one line, for a value that is unknown or does not go with LoRA."""
        if self.missing not in ("error", "allow"):
            raise ValueError(f"init.missing={self.missing!r} is unknown; choose one of error, allow")
        if lora and (self.frozen or self.old_lr_scale != 1):
            raise ValueError(
                f"init.frozen={self.frozen} and init.old_lr_scale={self.old_lr_scale} do not go with lora, "
                "which freezes all weights of --init; leave them out"
            )


@dataclass
class LoraConfig:
    """Defaults: those published for KaVa and CODI (arXiv 2502.21074)."""

    r: Annotated[int, Limits(least=1, most=65_536)] = 128  # rank
    alpha: Count = 32  # the adapters' output is scaled by alpha / r
    dropout: Beta = 0.1  # of the adapters' input

    def check(self, ep_size: int, optimizer: str) -> None:
        """Raises ValueError, one line, for settings incompatible with LoRA."""
        if ep_size > 1:
            raise ValueError(f"ep_size={ep_size} does not go with lora, which freezes experts; set ep_size=1")
        if optimizer != "adamw":
            raise ValueError(
                f"optimizer.kind={optimizer} needs whole matrices, but lora trains their factors; "
                "set it to adamw"
            )


@dataclass
class WandbConfig:
    mode: str = "disabled"  # disabled | offline | online
    project: str = "zeromodel"


@dataclass
class RunConfig:
    output_dir: str = "runs/run"
    seed: Annotated[int, Limits(least=-(2**63), most=2**63 - 1)] = 0
    max_steps: Count = 100  # optimizer steps
    global_batch_size: Rows = 32  # rows per optimizer step, over all ranks
    micro_batch_size: Rows = 8  # most rows a rank computes at once; accumulation follows from it
    ep_size: Annotated[int, Limits(least=1, most=65_536)] = 1  # ranks that share one set of experts
    save_every: Count = 100  # steps between checkpoints; the last step is always saved
    keep_last: Count = 2  # newest checkpoints that are kept
    keep_every: CountOrZero = 0  # checkpoints whose step is a multiple of it are kept as well; 0: none
    resume: str = "auto"  # auto: newest complete checkpoint, if any | none | PATH of a checkpoint
    time_limit_minutes: Time | None = None  # after which the run stops with a checkpoint; None: never
    # Minutes that a rank waits for the others before it gives up, in every process group; after a tenth of
    # them a line names the rank that is waited for (pretrain/heartbeat.py).
    communication_timeout_minutes: Annotated[float, Limits(least=1, most=10**6)] = 30.0
    eval_every: CountOrZero = 0  # steps between validation losses; 0: never
    eval_batches: Rows = 8  # global batches of one validation
    log_every: Count = 10  # steps between step lines (metrics.jsonl has every step)
    profile_step: Count | None = None  # step traced to output_dir/profile/, for chrome://tracing
    peak_tflops: Annotated[float, Limits(above=0, most=10**6)] | None = (
        None  # per device, for MFU; default: looked up by the GPU's name, else no MFU
    )
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)  # pretrain/evaluation.py
    wandb: WandbConfig = field(default_factory=WandbConfig)
    init: InitConfig = field(default_factory=InitConfig)  # pretrain/init.py, for --init
    lora: LoraConfig | None = None  # pretrain/lora.py, needs --init; null: all weights are trained
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)  # model/config/execution.py
    model: dict[str, Any] = field(default_factory=dict)  # the fields of model.config.ModelConfig

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step over all ranks, padding included."""
        return self.global_batch_size * self.data.sequence_length


def check_layout(config: RunConfig, model: ModelConfig, world_size: int) -> tuple[int, int]:
    """Rows per micro-batch and micro-batches per step of each rank.

    Raises:
        ValueError: the world size does not fit ep_size, the experts or the global batch.
    """
    if world_size % config.ep_size:
        raise ValueError(
            f"ep_size={config.ep_size} does not divide the {world_size} ranks; "
            f"choose ep_size from the divisors of {world_size} or start a different number of ranks"
        )
    if model.n_routed_experts % config.ep_size:
        raise ValueError(
            f"model.n_routed_experts={model.n_routed_experts} cannot be spread over "
            f"ep_size={config.ep_size} ranks; choose a divisor"
        )
    if config.global_batch_size % world_size:
        raise ValueError(
            f"global_batch_size={config.global_batch_size} is not divisible by the {world_size} ranks; "
            f"choose a multiple of {world_size}"
        )
    rows = config.global_batch_size // world_size
    micro = next(m for m in range(min(config.micro_batch_size, rows), 0, -1) if rows % m == 0)
    return micro, rows // micro
