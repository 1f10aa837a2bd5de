"""RunConfig, the whole description of a training run: YAML files, later over earlier, and `a.b=c` overrides.

The YAML owns the model, the data, batch sizes, optimizer, schedule, clipping and ep_size. The DeepSpeed JSON
(ds_config.py) owns ZeRO stage, precision, offload and communication, and says "auto" for the rest.
"""

import dataclasses
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from common.nearest import nearest
from data_pipeline.loading.sample_order import Stage
from model.config.execution import ExecutionConfig
from model.config.model import ModelConfig


@dataclass
class DataConfig:
    path: str = "???"  # folder that data_pipeline/build.py wrote, or its URL
    sequence_length: int = 512  # tokens per row
    packing: str = "concat"  # concat: cut every sequence_length tokens | best_fit: documents whole, padded
    # Source weights, each list entry from a token count of the run onwards:
    # [{tokens: 0, weights: {SOURCE: WEIGHT}}, ...]; default: the recipe's, which validation always uses.
    stages: list[Stage] = field(default_factory=list)
    shuffle_shards: int = 0  # shards shuffled together, for a data.path that is a URL; 0: all
    max_damaged_rows: int = 0  # rows of damaged shards that a rank may skip; one more is an error
    cache: str | None = None  # local folder for the shards of a URL
    cache_bytes: int | None = None  # limit above which its oldest shards are deleted; default: no limit
    tokenizer: str | None = None  # sentencepiece model; default: the one in `path`


@dataclass
class OptimizerConfig:
    """AdamW or Muon, warm-up and decay; defaults after DeepSeek-V3 (arXiv 2412.19437, 4.2)."""

    kind: str = "adamw"  # adamw | muon: Muon for hidden matrices, AdamW for the rest
    lr: float = 1e-3  # peak learning rate
    # Peak learning rate of Muon's matrices, in units of spectral norm; follows the schedule of lr. The
    # default is the reference implementation's (Jordan et al. 2024).
    muon_lr: float = 0.02
    min_lr: float = 1e-4  # learning rate at the end of the decay
    warmup_steps: int = 50
    schedule: str = "cosine"  # cosine | wsd | constant, after the warm-up
    decay_steps: int | None = None  # step at which min_lr is reached (cosine, wsd); default: max_steps
    wsd_decay_steps: int | None = None  # length of wsd's decay, up to decay_steps; default: a tenth of them
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices; norms, biases and embeddings are not decayed
    clip: float = 1.0  # limit of the global gradient norm; 0: no clipping
    # Share of the past in an exponential moving average of the weights, exported to export_ema/; null: none.
    # Resumed from a checkpoint without an average, a run starts one at that checkpoint's weights.
    ema_decay: float | None = None

    def decay_length(self, max_steps: int) -> int:
        """Steps of wsd's decay; a tenth of a run is what MiniCPM found enough (arXiv 2404.06395)."""
        return self.wsd_decay_steps or max(1, (self.decay_steps or max_steps) // 10)


@dataclass
class StabilityConfig:
    """Which steps are skipped, see stability.py. A loss or gradient that is not finite always is."""

    max_zscore: float | None = 10.0  # robust z-score of loss or gradient norm above which it is a spike
    window: int = 64  # past steps that a step is compared with
    # Consecutive skipped steps that end the run. More than half the window: whatever lasts longer is a new
    # level, not a spike.
    max_skipped: int = 50


@dataclass
class EvaluationConfig:
    every_steps: int = 0  # steps between two evaluations, a multiple of save_every; 0: never
    tasks: str = "gsm8k,logiqa,babi,arc"  # as eval/run.py takes them
    limit: int = 100  # problems per data file
    num_fewshot: int | None = None  # default: each task's own
    timeout_seconds: float = 1800.0  # after which an evaluation is killed; a run's end waits no longer
    data: str | None = None  # folder of the data sets; default: $DATA_ROOT, else data
    # cpu | cuda: rank 0's GPU. Not the default: training sizes its batches to that memory, and all other
    # ranks would wait for the one that shares its GPU.
    device: str = "cpu"

    def check(self, save_every: int, optimizer: str) -> None:
        """Raises ValueError for the first value out of range, and for what does not go together."""
        for name, value, allowed, fits in (
            ("every_steps", self.every_steps, "at least 0", self.every_steps >= 0),
            ("limit", self.limit, "at least 1", self.limit >= 1),
            (
                "num_fewshot",
                self.num_fewshot,
                "at least 0",
                self.num_fewshot is None or self.num_fewshot >= 0,
            ),
            ("timeout_seconds", self.timeout_seconds, "above 0", self.timeout_seconds > 0),
            ("device", self.device, "cpu or cuda", self.device in ("cpu", "cuda")),
        ):
            if not fits:
                raise ValueError(f"evaluation.{name}={value} must be {allowed}")
        if self.every_steps % save_every:
            raise ValueError(
                f"evaluation.every_steps={self.every_steps} is not a multiple of save_every={save_every}, "
                "but only checkpoints are evaluated; change one of them"
            )
        if self.every_steps and optimizer == "muon":
            raise ValueError(
                "evaluation.every_steps does not go with optimizer.kind=muon, whose checkpoints cannot be "
                "exported during the run; set it to 0 and evaluate the export at the end"
            )


@dataclass
class LoraConfig:
    """Defaults: those published for KaVa and CODI (arXiv 2502.21074)."""

    r: int = 128  # rank
    alpha: int = 32  # the adapters' output is scaled by alpha / r
    dropout: float = 0.1  # of the adapters' input

    def check(self, ep_size: int, optimizer: str) -> None:
        """Raises ValueError, one line, for values out of range and for settings incompatible with LoRA."""
        for name, value, allowed, fits in (
            ("r", self.r, "at least 1", self.r >= 1),
            ("alpha", self.alpha, "above 0", self.alpha > 0),
            ("dropout", self.dropout, "from 0 to below 1", 0 <= self.dropout < 1),
        ):
            if not fits:
                raise ValueError(f"lora.{name}={value} must be {allowed}")
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
    seed: int = 0
    max_steps: int = 100  # optimizer steps
    global_batch_size: int = 32  # rows per optimizer step, over all ranks
    micro_batch_size: int = 8  # most rows a rank computes at once; accumulation follows from it
    ep_size: int = 1  # ranks that share one set of experts
    save_every: int = 100  # steps between checkpoints; the last step is always saved
    keep_last: int = 2  # newest checkpoints that are kept
    keep_every: int = 0  # checkpoints whose step is a multiple of it are kept as well; 0: none
    resume: str = "auto"  # auto: newest complete checkpoint, if any | none | PATH of a checkpoint
    time_limit_minutes: float | None = None  # after which the run stops with a checkpoint; None: never
    eval_every: int = 0  # steps between validation losses; 0: never
    eval_batches: int = 8  # global batches of one validation
    log_every: int = 10  # steps between step lines (metrics.jsonl has every step)
    profile_step: int | None = None  # step traced to output_dir/profile/, for chrome://tracing
    peak_tflops: float | None = None  # per device, for MFU; default: looked up by the GPU's name, else no MFU
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)  # pretrain/evaluation.py
    wandb: WandbConfig = field(default_factory=WandbConfig)
    lora: LoraConfig | None = None  # pretrain/lora.py, for distill/main.py; null: all weights are trained
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)  # model/config/execution.py
    model: dict[str, Any] = field(default_factory=dict)  # the fields of model.config.ModelConfig

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step over all ranks, padding included."""
        return self.global_batch_size * self.data.sequence_length


def load_run_config(paths: str | Sequence[str], overrides: list[str]) -> RunConfig:
    """Reads YAML files and checks everything that needs no data.

    Args:
        paths: one file or several; a later one overrides the keys of an earlier one.
        overrides: `a.b=c`, over all files.

    Returns:
        The run's config. Its `model` dict is type-checked, but vocab_size may still be missing.

    Raises:
        ValueError: one line naming the key, its value and the fix, and the file if a single one is wrong.
        FileNotFoundError: no such YAML.
    """
    layers = [_read_layer(path) for path in ([paths] if isinstance(paths, str) else paths)]
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"override {override!r} is not of the form a.b=c")
    try:
        given = OmegaConf.merge(*layers, OmegaConf.from_dotlist(overrides))
        values: Any = OmegaConf.to_container(given, resolve=True)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"config cannot be read: {_first_line(error)}") from None
    reject_unknown_keys(values, RunConfig)
    model_values = values.pop("model", {})
    config = typing.cast(RunConfig, _typed(RunConfig, values))
    config.model = _typed_model(model_values)
    _check(config)
    return config


def _read_layer(path: str) -> DictConfig:
    """One YAML, its keys known and of the right types.

    Raises:
        ValueError, FileNotFoundError: one line that names the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"config {path} does not exist; pretrain/configs/ has some to start from")
    try:
        loaded = OmegaConf.load(path)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"config {path} cannot be read: {_first_line(error)}") from None
    if not isinstance(loaded, DictConfig):
        raise ValueError(f"config {path} holds no keys; see pretrain/configs/ for examples")
    try:
        values: Any = OmegaConf.to_container(loaded)  # unresolved: an interpolation may refer to another file
        reject_unknown_keys(values, RunConfig)
        _typed_model(values.get("model", {}))
        _merged(RunConfig, values)
    except ValueError as error:
        raise ValueError(f"config {path}: {error}") from None
    return loaded


def _typed(cls: type, values: dict[str, Any]) -> Any:
    """An instance of dataclass `cls` from `values`, converted to the fields' types."""
    merged = _merged(cls, values)
    try:
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        hint = "; give it on the command line or in the YAML" if "mandatory" in str(error).lower() else ""
        raise ValueError(f"{_key(error)}: {_first_line(error)}{hint}") from None


def _merged(cls: type, values: dict[str, Any], prefix: str = "") -> Any:
    """The defaults of dataclass `cls` with `values` over them, as OmegaConf checks them."""
    try:
        schema = OmegaConf.structured(cls)
        OmegaConf.set_readonly(schema, False)
        return OmegaConf.merge(schema, values)
    except OmegaConfBaseException as error:
        raise ValueError(f"{prefix}{_key(error)}: {_first_line(error)}") from None


def _typed_model(values: dict[str, Any]) -> dict[str, Any]:
    """The given model keys, type-checked; defaults and presets are left to ModelConfig."""
    reject_unknown_keys(values, ModelConfig, "model.")
    return _restrict(OmegaConf.to_container(_merged(ModelConfig, values, "model.")), values)


def _restrict(typed: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _restrict(typed[key], value) if isinstance(value, dict) else typed[key]
        for key, value in given.items()
    }


def reject_unknown_keys(values: dict[str, Any], cls: type, prefix: str = "") -> None:
    """Raises ValueError for the first key that is not a field of dataclass `cls`, with the nearest name."""
    fields = {f.name: f.type for f in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in fields:
            raise ValueError(f"unknown config key {prefix}{key}; {nearest(str(key), list(fields))}")
        kind = fields[key]
        if value is None and type(None) in typing.get_args(kind):
            continue
        if isinstance(kind, types.UnionType):
            kind = typing.get_args(kind)[0]
        section = kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None
        if (section or typing.get_origin(kind) is dict) and not isinstance(value, dict):
            raise ValueError(f"{prefix}{key}={value!r} must be a section with keys")
        if section:
            reject_unknown_keys(value, section, f"{prefix}{key}.")


def _check(config: RunConfig) -> None:
    positive = (
        "max_steps",
        "global_batch_size",
        "micro_batch_size",
        "ep_size",
        "save_every",
        "keep_last",
        "log_every",
    )
    for name in positive:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    if config.keep_every < 0:
        raise ValueError(f"keep_every={config.keep_every} must be at least 0")
    stability = config.stability
    for key, least in (("max_zscore", 1), ("window", 8), ("max_skipped", 1)):
        number = getattr(stability, key)
        if number is not None and number < least:
            raise ValueError(f"stability.{key}={number} must be at least {least}")
    if stability.max_zscore is not None and stability.max_skipped <= stability.window // 2 + 1:
        raise ValueError(
            f"stability.max_skipped={stability.max_skipped} must exceed half of stability.window="
            f"{stability.window} plus 1, or a lasting change of level ends the run; raise it"
        )
    limit = config.time_limit_minutes
    if limit is not None and limit <= 0:
        raise ValueError(f"time_limit_minutes={limit} must be above 0")
    for name, allowed, value in (
        ("optimizer.kind", ("adamw", "muon"), config.optimizer.kind),
        ("optimizer.schedule", ("cosine", "wsd", "constant"), config.optimizer.schedule),
        ("wandb.mode", ("disabled", "offline", "online"), config.wandb.mode),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(allowed)}")
    if Path(config.output_dir).resolve() == Path(config.data.path).resolve():
        raise ValueError(
            f"output_dir={config.output_dir} is also data.path, the folder of the data; give the run its own"
        )
    if config.data.sequence_length < 2:
        raise ValueError(f"data.sequence_length={config.data.sequence_length} must be at least 2")
    _check_optimizer(config.optimizer, config.max_steps)
    config.evaluation.check(config.save_every, config.optimizer.kind)
    if config.lora is not None:
        config.lora.check(config.ep_size, config.optimizer.kind)


def _check_optimizer(o: OptimizerConfig, max_steps: int) -> None:
    for name, value, allowed, fits in (
        ("lr", o.lr, "above 0", o.lr > 0),
        ("muon_lr", o.muon_lr, "above 0", o.muon_lr > 0),
        ("min_lr", o.min_lr, f"from 0 to lr={o.lr}", o.schedule == "constant" or 0 <= o.min_lr <= o.lr),
        ("warmup_steps", o.warmup_steps, "at least 0", o.warmup_steps >= 0),
        ("decay_steps", o.decay_steps, "at least 1", o.decay_steps is None or o.decay_steps >= 1),
        (
            "wsd_decay_steps",
            o.wsd_decay_steps,
            "at least 1",
            o.wsd_decay_steps is None or o.wsd_decay_steps >= 1,
        ),
        ("beta1", o.beta1, "from 0 to below 1", 0 <= o.beta1 < 1),
        ("beta2", o.beta2, "from 0 to below 1", 0 <= o.beta2 < 1),
        ("eps", o.eps, "above 0", o.eps > 0),
        ("weight_decay", o.weight_decay, "at least 0", o.weight_decay >= 0),
        ("clip", o.clip, "at least 0", o.clip >= 0),
        ("ema_decay", o.ema_decay, "between 0 and 1", o.ema_decay is None or 0 < o.ema_decay < 1),
    ):
        if not fits:
            raise ValueError(f"optimizer.{name}={value} must be {allowed}")
    end, decay = o.decay_steps or max_steps, o.decay_length(max_steps)
    if o.schedule == "wsd" and o.warmup_steps + decay > end:
        raise ValueError(
            f"optimizer.warmup_steps={o.warmup_steps} and wsd_decay_steps={decay} do not fit into the {end} "
            "steps before min_lr; lower one of them or raise max_steps"
        )
    if o.kind == "muon" and o.clip > 0:
        # DeepSpeed clips after Muon, whose update has the same norm whatever the gradient: a limit below it
        # would only lower the learning rate.
        raise ValueError(
            f"optimizer.clip={o.clip} would scale Muon's update, not its gradient; set optimizer.clip=0"
        )


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


def _key(error: Exception) -> str:
    return getattr(error, "full_key", None) or "config"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
