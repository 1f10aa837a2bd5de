"""Prepares a Run from configs, data and checkpoint: everything checked before a process group exists."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.loading.loader import Loader
from data_pipeline.shards.manifest import MANIFEST
from data_pipeline.sources.remote import is_url
from data_pipeline.tokenization.tokenizer import Tokenizer
from model import ModelConfig, ZeroModel
from model.counts import num_parameters
from pretrain import checkpoint, lora
from pretrain.checkpoint import TrainingState
from pretrain.config import InitConfig, RunConfig, check_layout
from pretrain.ds_config import fit_buckets, load_ds_config, training_dtype
from pretrain.init import BASE, Source, Start, find, fit, with_sizes
from pretrain.run_config import load_run_config


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What a run is to be, as far as it is known without its data."""

    config: RunConfig
    model_config: ModelConfig
    ds_config: dict[str, Any]
    micro_batch_size: int
    accumulation: int  # micro-batches per step
    world_size: int
    model_class: type[ZeroModel] = ZeroModel
    start: Start | None = None  # the weights of --init; a checkpoint takes precedence

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def rank(self) -> int:
        """As set by the launcher, so known before the process group exists."""
        return int(os.environ.get("RANK", "0"))

    @property
    def zero_stage(self) -> int:
        return int(self.ds_config["zero_optimization"]["stage"])

    @property
    def element_bytes(self) -> int:
        """Of a weight as it is trained."""
        return training_dtype(self.ds_config).itemsize


@dataclass(frozen=True, kw_only=True)
class Run(Outline):
    """Everything a run consists of, checked before any process group exists."""

    loader: Loader
    validation: Loader | None
    state: TrainingState  # of step 0; a checkpoint must agree with it
    resume_from: Path | None  # its files' sizes are right; checksums are still to be compared


def prepare(
    config_paths: str | Sequence[str],
    ds_config_path: str,
    overrides: list[str],
    complete: Callable[[RunConfig, Loader | None], None] | None = None,
    init: Path | None = None,
    dry_run: bool = False,
    model_class: type[ZeroModel] = ZeroModel,
    new: tuple[str, ...] = (),
) -> Outline:
    """Reads and checks configs, data and checkpoint for this rank.

    Args:
        complete: fills in the keys of the config's `model` that follow from the data; without data, which
            only a dry run takes, those that follow from nothing else.
        init: folder whose weights the run starts from; `complete` sees its sizes.
        dry_run: the run will not start: data that are not built yet are no error, nor is a model that is too
            large for this machine.
        new: see init.fit.

    Returns:
        A Run; for a dry run without data only its Outline.

    Raises:
        ValueError, OSError: one line for the user.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    config = load_run_config(config_paths, overrides)
    built = not dry_run or is_url(config.data.path) or (Path(config.data.path) / MANIFEST).is_file()
    loader = _loader(config, "train", rank, world_size) if built else None
    found = _found(config, init, loader)
    if complete is not None:
        complete(config, loader)
    model_config = build_model_config(config, None if loader is None else loader.vocab_size)
    if complete is None and model_config.distillation is not None:
        raise ValueError("model.distillation is for distill/main.py; start that, or leave it out")
    outline = _outline(config, ds_config_path, model_config, world_size, model_class)
    if not dry_run:
        sharded_over = world_size if outline.zero_stage == 3 else config.ep_size
        check_host_memory(model_config, sharded_over, outline.element_bytes)
    start = None
    if found is not None:
        start = fit(*found, model_config, config.init, config.ep_size, model_class, new)
        outline = replace(outline, start=start)
    if loader is None:
        return outline
    sha256 = None if start is None else start.source.sha256
    state = TrainingState(
        step=0,
        model=model_config.to_dict(),
        data_fingerprint=loader.fingerprint,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        world_size=world_size,
        ep_size=config.ep_size,
        zero_stage=outline.zero_stage,
        optimizer=config.optimizer.kind,
        lora=None if config.lora is None else lora.identity(config.lora, sha256),
        origin=None if start is None else start.origin,
    )
    validation = _loader(config, "validation", rank, world_size) if config.eval_every else None
    resume_from = choose_checkpoint(config, state, announce=False)  # again when the folder is locked
    if start is not None:
        _require_weights(start, config, resume_from)
    return Run(**vars(outline), loader=loader, validation=validation, state=state, resume_from=resume_from)


def _found(config: RunConfig, init: Path | None, loader: Loader | None) -> tuple[Source, Path | None] | None:
    """What --init names and where its weights are; its sizes become the config's. None without --init."""
    preset = config.model.get("preset")
    if init is None:
        for key, default in vars(InitConfig()).items():
            if (value := getattr(config.init, key)) != default:
                raise ValueError(f"init.{key}={value} is about the weights of --init; give --init as well")
        return None
    if preset is not None:
        raise ValueError(f"model.preset={preset} and --init both give sizes; leave one of them out")
    found = find(init, _begun_in(config))
    tokenizer = None if loader is None else loader.tokenizer_path
    config.model = with_sizes(config.model, found[0], tokenizer)
    return found


def _begun_in(config: RunConfig) -> Path:
    """Folder of the run that this one continues, if it continues one."""
    if config.resume in ("auto", "none"):
        return Path(config.output_dir)
    return Path(config.resume).absolute().parent.parent  # of RUN/checkpoints/step-N


def _require_weights(start: Start, config: RunConfig, resume_from: Path | None) -> None:
    """Raises FileNotFoundError if the folder of --init is gone and its weights are still needed."""
    if start.weights is not None:
        return
    if resume_from is None:
        raise FileNotFoundError(
            f"--init {start.source.folder} is missing, and there is no checkpoint to resume from; give the "
            "folder's new place"
        )
    if config.lora is not None or start.frozen:
        raise FileNotFoundError(
            f"--init {start.source.folder} is missing, and so is {_begun_in(config) / BASE}, the copy of "
            "what it does not train; give the folder's new place"
        )


def _outline(
    config: RunConfig,
    ds_config_path: str,
    model_config: ModelConfig,
    world_size: int,
    model_class: type[ZeroModel],
) -> Outline:
    micro, accumulation = check_layout(config, model_config, world_size)
    ds_config = load_ds_config(ds_config_path, config, micro, accumulation)
    fit_buckets(ds_config, num_parameters(model_config))
    return Outline(
        config=config,
        model_config=model_config,
        ds_config=ds_config,
        micro_batch_size=micro,
        accumulation=accumulation,
        world_size=world_size,
        model_class=model_class,
    )


def host_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_host_memory(model_config: ModelConfig, sharded_over: int, element_bytes: int = 4) -> None:
    """Refuses a model that no rank of this machine could hold, by arithmetic: nothing is allocated.

    This is the least that a run needs, so whatever could run is accepted.

    Args:
        sharded_over: ranks that share the weights, under ZeRO-3 all; otherwise they share only the experts.
        element_bytes: of a weight as it is trained.

    Raises:
        ValueError: one line.
    """
    parameters, room = num_parameters(model_config), host_memory()
    held = element_bytes * parameters // sharded_over
    if held > room:
        raise ValueError(
            f"the model has {parameters:,} parameters, and a rank holds {held:,} bytes of them or more, but "
            f"this machine has {room:,}; lower the model's sizes, or raise ep_size or, under ZeRO-3, the "
            "number of ranks"
        )


def _loader(config: RunConfig, split: str, rank: int, world_size: int) -> Loader:
    loader = Loader(
        config.data.path,
        config.data.sequence_length,
        config.global_batch_size,
        config.seed,
        rank,
        world_size,
        split,
        packing=config.data.packing,
        stages=config.data.stages if split == "train" else (),
        shuffle_shards=config.data.shuffle_shards,
        max_damaged_rows=config.data.max_damaged_rows,
        cache=config.data.cache,
        cache_bytes=config.data.cache_bytes,
    )
    if config.data.tokenizer is not None:
        ours, theirs = Tokenizer(Path(config.data.tokenizer)), Tokenizer(loader.tokenizer_path)
        if ours.sha256 != theirs.sha256:
            raise ValueError(
                f"data.tokenizer={config.data.tokenizer} (sha256 {ours.sha256[:12]}) did not encode the "
                f"shards in {config.data.path} (sha256 {theirs.sha256[:12]}); leave data.tokenizer out"
            )
    return loader


def build_model_config(config: RunConfig, vocab_size: int | None) -> ModelConfig:
    """The model of a run; its vocab_size is the tokenizer's, or the config's while that is unknown (None)."""
    given = config.model.get("vocab_size", vocab_size)
    if vocab_size is not None and given != vocab_size:
        raise ValueError(
            f"model.vocab_size={given} is not the tokenizer's {vocab_size}; leave it out of the config"
        )
    known = {} if vocab_size is None else {"vocab_size": vocab_size}
    model_config = ModelConfig.from_dict({**config.model, **known})
    if config.data.sequence_length > model_config.max_position_embeddings:
        raise ValueError(
            f"data.sequence_length={config.data.sequence_length} exceeds model.max_position_embeddings="
            f"{model_config.max_position_embeddings}; raise the latter"
        )
    return model_config


def choose_checkpoint(
    config: RunConfig, state: TrainingState, announce: bool, below: float = math.inf
) -> Path | None:
    """The checkpoint to resume from, compatible with this run; None: start at the first step.

    Its checksums are not compared yet: all ranks do that together. Only steps below `below` count.
    """
    run = Path(config.output_dir)
    _check_names(run)
    if config.resume == "none":
        if checkpoint.steps(run):
            raise ValueError(
                f"output_dir={run} already holds checkpoints and resume=none would overwrite them; "
                "use resume=auto or another output_dir"
            )
        return None
    if config.resume == "auto":
        folder, damaged = checkpoint.newest(run, below, part=checkpoint.NONE)
        if folder is None and not checkpoint.never_saved(run):
            folders = (
                run / checkpoint.CHECKPOINTS / f"step-{s}" for s in checkpoint.steps(run) if s >= below
            )
            raise ValueError(_all_damaged(run, {**dict.fromkeys(folders, "see above"), **damaged}))
        for damaged_folder, problem in damaged.items() if announce else ():
            print(f"warning: {checkpoint.passed_over(damaged_folder, problem)}")
        if folder is None and damaged and announce:
            print("no checkpoint was ever finished here; starting at the first step")
    else:
        folder = Path(config.resume)
        if not folder.is_dir():
            raise FileNotFoundError(f"resume={folder} does not exist; give a checkpoints/step-N folder")
        checkpoint.require_whole(folder, checkpoint.damage(folder, part=checkpoint.NONE))
    if folder is None:
        return None
    found, _ = checkpoint.read(folder)
    checkpoint.check_compatible(folder, found, state)
    later = [step for step in checkpoint.steps(run) if step > found.step]
    if later and config.resume != "auto":
        raise ValueError(
            f"output_dir={run} holds checkpoints of later steps ({later[0]}) than {folder}, which "
            "resume=auto would use next time; give another output_dir, or move them away"
        )
    if found.step > config.max_steps:
        raise ValueError(
            f"checkpoint {folder} is at step {found.step}, beyond max_steps={config.max_steps}; "
            "raise max_steps"
        )
    if announce:
        changes = checkpoint.layout_changes(found, state)
        print(f"resuming from {folder}" + (f", converted: {', '.join(changes)}" if changes else ""))
    return folder


def _check_names(run: Path) -> None:
    """Raises ValueError if a file has the name of a checkpoint, which could then not be written."""
    for path in (run / checkpoint.CHECKPOINTS).glob("step-*"):
        if checkpoint.STEP_NAME.fullmatch(path.name) and not path.is_dir():
            raise ValueError(f"{path} is not a folder, but checkpoints have such names; move it away")


def _all_damaged(run: Path, damaged: dict[Path, str]) -> str:
    each = [f"{folder.name} ({problem})" for folder, problem in damaged.items()]
    shown = ", ".join(each[:5]) + (f" and {len(each) - 5} more" if len(each) > 5 else "")
    return (
        f"no checkpoint in {run / checkpoint.CHECKPOINTS} is whole: {shown or 'all are gone'}; restore one, "
        f"or start over on purpose: give another output_dir, or delete {run}"
    )
