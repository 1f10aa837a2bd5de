"""Reads a RunConfig (config.py): YAML files, later over earlier, then `a.b=c` overrides; all checked."""

import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from common.nearest import nearest
from model.config.model import ModelConfig
from pretrain.config import OptimizerConfig, RunConfig


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
    config.evaluation.check(config.save_every)
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


def _key(error: Exception) -> str:
    return getattr(error, "full_key", None) or "config"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
