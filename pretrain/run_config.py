"""Reads a RunConfig (config.py): YAML files, later over earlier, then `a.b=c` overrides; all checked."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from yaml import YAMLError

from common.schema import checked_values, from_plain
from model.config.model import ModelConfig
from pretrain.config import OptimizerConfig, RunConfig

# What reading a YAML raises: beside the readers' own errors, bytes that are not text, an impossible date or a
# number of thousands of digits, and lists within lists without end.
UNREADABLE = (OmegaConfBaseException, YAMLError, OSError, ValueError, RecursionError)


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
        values: Any = OmegaConf.to_container(given, resolve=True, throw_on_missing=True)
    except UNREADABLE as error:
        quotes = (
            "; put quotes around a text that begins with * & or !" if isinstance(error, YAMLError) else ""
        )
        raise ValueError(f"config cannot be read: {_first_line(error)}{quotes}") from None
    config = from_plain(RunConfig, values, "")
    config.model = ModelConfig.checked(config.model)
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
    except UNREADABLE as error:
        raise ValueError(f"config {path} cannot be read: {_first_line(error)}") from None
    if not isinstance(loaded, DictConfig):
        raise ValueError(f"config {path} holds no keys; see pretrain/configs/ for examples")
    try:
        values: Any = OmegaConf.to_container(loaded, resolve=True)
    except InterpolationResolutionError:  # it refers to another file, and is checked with it
        return loaded
    except UNREADABLE as error:
        raise ValueError(f"config {path} cannot be read: {_first_line(error)}") from None
    try:
        ModelConfig.checked(checked_values(RunConfig, values, "").get("model", {}))
    except ValueError as error:
        raise ValueError(f"config {path}: {error}") from None
    return loaded


def _check(config: RunConfig) -> None:
    stability = config.stability
    if stability.max_zscore is not None and stability.max_skipped <= stability.window // 2 + 1:
        raise ValueError(
            f"stability.max_skipped={stability.max_skipped} must exceed half of stability.window="
            f"{stability.window} plus 1, or a lasting change of level ends the run; raise it"
        )
    for name, allowed, value in (
        ("optimizer.kind", ("adamw", "muon"), config.optimizer.kind),
        ("optimizer.schedule", ("cosine", "wsd", "constant"), config.optimizer.schedule),
        ("wandb.mode", ("disabled", "offline", "online"), config.wandb.mode),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(allowed)}")
    if not re.fullmatch(r"[^/\\#?%:]{1,128}", config.wandb.project):
        raise ValueError(
            f"wandb.project={config.wandb.project!r} is not a name that W&B takes: 1 to 128 characters, "
            "none of them / \\ # ? % :"
        )
    for name, path in (("output_dir", config.output_dir), ("data.path", config.data.path)):
        if path in ("", "???"):
            raise ValueError(f"{name} is missing; give it on the command line or in the YAML")
        if "\0" in path:
            raise ValueError(f"{name}={path!r} cannot be a path: it holds a NUL byte")
    if Path(config.output_dir).resolve() == Path(config.data.path).resolve():
        raise ValueError(
            f"output_dir={config.output_dir} is also data.path, the folder of the data; give the run its own"
        )
    _check_optimizer(config.optimizer, config.max_steps)
    config.evaluation.check(config.save_every)
    config.init.check(lora=config.lora is not None)
    if config.lora is not None:
        config.lora.check(config.ep_size, config.optimizer.kind)


def _check_optimizer(o: OptimizerConfig, max_steps: int) -> None:
    if o.schedule != "constant" and o.min_lr > o.lr:
        raise ValueError(f"optimizer.min_lr={o.min_lr} must be at most lr={o.lr}")
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


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
