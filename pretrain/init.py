"""The weights that a run starts from: `--init DIR`, an export of ours or an imported Hugging Face folder.

Optimizer, step and data start afresh. A checkpoint takes precedence over the folder; it must have begun with
the same weights. RECORD in the run's folder says where they came from, so that the run resumes without the
folder. BASE holds them once per run where checkpoints do not: frozen weights, and those that LoRA adapts.
"""

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import error_line
from common.files import read_object, replacing, write_json
from common.schema import from_plain
from data_pipeline.tokenization.tokenizer import Tokenizer
from model import ModelConfig, ZeroModel
from model.export_files import FIX, INIT_NAME, TOKENIZER_NAME, load_config
from model.weight_files import FLOATS, open_weights, read_header, unchanged, weights_path
from model.weight_writer import copy_weights, weights_digest
from pretrain.checkpoint import Origin
from pretrain.config import InitConfig

RECORD, BASE = INIT_NAME, "base.safetensors"  # in the run's folder
# What a model may do without: its logits of the next token are the same.
OPTIONAL = ("latent_thoughts.", "model.mtp.")
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Source:
    """What --init names."""

    folder: str  # absolute
    sha256: str  # of the weights
    tokenizer: str | None  # its sha256; None: the folder has no tokenizer
    config: dict[str, Any]  # ModelConfig.to_dict()
    tensors: Shapes

    @property
    def path(self) -> Path:
        """Of the weights, or of their index, if the folder still exists."""
        return weights_path(Path(self.folder))


@dataclass(frozen=True)
class Start:
    """A source that fits the run's model."""

    source: Source
    weights: Path | None  # of a file or an index; None: the folder is gone, a checkpoint holds all weights
    missing: tuple[str, ...]  # parameters and buffers that the source lacks; they start from the seed
    unused: tuple[str, ...]  # tensors of the source that the model does without
    frozen: tuple[str, ...]  # parameters of the source that are not trained
    old_lr_scale: float  # learning rate of the source's parameters, in units of the others'
    counts: dict[str, int]  # numbers of parameters: old, the source's that are trained; frozen; new

    @property
    def origin(self) -> Origin:
        """What a checkpoint must agree with."""
        return Origin(self.source.sha256, self.missing, self.frozen, self.old_lr_scale)

    def summary(self) -> str:
        """Where the weights come from and how many of them are trained how, in a line."""
        counts = {"old": "of its parameters trained", "frozen": "frozen", "new": "new ones"}
        said = [f"{self.counts[kind]:,} {text}" for kind, text in counts.items() if self.counts[kind]]
        scale = "" if self.old_lr_scale == 1 else f"; learning rate of its parameters x {self.old_lr_scale:g}"
        return f"{self.source.folder} (sha256 {self.source.sha256[:12]}), {', '.join(said)}{scale}"

    def notes(self) -> list[str]:
        """The summary, and a line for everything that is not as in the source."""
        folder, lines = self.source.folder, [f"init: {self.summary()}"]
        lines += [f"init: {name} is not in {folder}; it gets its initial values" for name in self.missing]
        lines += [f"init: {name} of {folder} is not used: the model does without it" for name in self.unused]
        if self.source.tokenizer is None:
            lines.append(
                f"init: {folder} has no tokenizer; its vocab_size is the data's, but its tokens may differ"
            )
        return lines


def find(folder: Path, run: Path) -> tuple[Source, Path | None]:
    """What --init names, read from it, or if it is gone from the run's RECORD; and where its weights are.

    Args:
        run: folder of the run, or of the one whose checkpoint it resumes from.

    Raises:
        ValueError, OSError: one line; no such folder, a raw Hugging Face folder, damaged files.
    """
    if not folder.is_dir() and (run / RECORD).is_file():
        return _recorded(folder, run)
    config, weights, tokenizer = load_config(folder), weights_path(folder), folder / TOKENIZER_NAME
    stored = read_header(weights, FIX)
    for name, tensor in stored.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{weights} is not a file of weights: {name} has type {tensor.dtype}, expected one of "
                f"{', '.join(sorted(FLOATS))}; {FIX}"
            )
    source = Source(
        folder=str(folder.absolute()),
        sha256=weights_digest(weights, FIX),
        tokenizer=Tokenizer(tokenizer).sha256 if tokenizer.exists() else None,
        config=config.to_dict(),
        tensors={name: tensor.shape for name, tensor in stored.items()},
    )
    return source, weights


def _recorded(folder: Path, run: Path) -> tuple[Source, Path | None]:
    try:
        source = from_plain(Source, read_object(run / RECORD, "give --init its folder"), RECORD)
        ModelConfig.from_stored(source.config)
    except ValueError as error:
        raise ValueError(f"--init {folder} is missing, and {run / RECORD}: {error_line(error)}") from None
    if source.folder != str(folder.absolute()):
        raise FileNotFoundError(f"--init {folder} is missing; the run in {run} began with {source.folder}")
    return source, run / BASE if (run / BASE).is_file() else None


def with_sizes(model: dict[str, Any], source: Source, tokenizer: Path | None) -> dict[str, Any]:
    """The source's config, overridden by the keys of `model`. Latent thoughts are the run's own.

    Args:
        tokenizer: the data's; None: they are not built yet.

    Raises:
        ValueError: the data have another tokenizer.
    """
    if tokenizer is not None:
        _check_tokenizer(source, Tokenizer(tokenizer))
    return _over({**source.config, "preset": None, "latent_cot": {}, "distillation": None}, model)


def _check_tokenizer(source: Source, data: Tokenizer) -> None:
    if source.tokenizer is not None and source.tokenizer != data.sha256:
        raise ValueError(
            f"--init {source.folder} has another tokenizer (sha256 {source.tokenizer[:12]}) than the data "
            f"(sha256 {data.sha256[:12]}); build the data with its tokenizer (recipe tokenizer.file="
            f"{source.folder}/{TOKENIZER_NAME}), or start from an export of a run on these data"
        )
    if source.tokenizer is None and source.config["vocab_size"] != data.vocab_size:
        raise ValueError(
            f"--init {source.folder} has no tokenizer and vocab_size={source.config['vocab_size']}, but the "
            f"data's tokenizer has {data.vocab_size} tokens; start from a folder of the data's tokenizer"
        )


def _over(base: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given` over `base`, section by section."""
    merged = dict(base)
    for key, value in given.items():
        below = base.get(key)
        merged[key] = _over(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged


def fit(
    source: Source,
    weights: Path | None,
    config: ModelConfig,
    init: InitConfig,
    ep_size: int = 1,
    model_class: type[ZeroModel] = ZeroModel,
    new: tuple[str, ...] = (),
) -> Start:
    """Compares the names and shapes of a source with those of the run's model; values are read later.

    Args:
        new: how names begin that the source may lack whatever `init.missing` says.

    Raises:
        ValueError: one line; a tensor has another shape or no place or is missing, or what to freeze is not
            clear.
    """
    with torch.device("meta"):
        model = model_class(config)
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    unused = tuple(name for name in source.tensors if name not in own and name.startswith(OPTIONAL))
    missing = tuple(name for name in own if name not in source.tensors)
    allowed = {*unused, *(name for name in missing if init.missing == "allow" or name.startswith(new))}
    _check_shapes(source, own, allowed)
    old = [name for name in sizes if name in source.tensors]
    frozen = _frozen(init.frozen, old, sizes.keys() - set(old))
    if len(frozen) == len(sizes):
        raise ValueError(
            f"init.frozen={init.frozen} freezes all {len(sizes)} parameters, so that nothing is trained; "
            "leave some out"
        )
    if ep_size > 1:
        _check_experts(sizes.keys(), frozen, ep_size)
    counts = {
        "old": sum(sizes[name] for name in set(old) - set(frozen)),
        "new": sum(sizes[name] for name in sizes.keys() - set(old)),
        "frozen": sum(sizes[name] for name in frozen),
    }
    return Start(source, weights, missing, unused, frozen, init.old_lr_scale, counts)


def _check_shapes(source: Source, own: Shapes, allowed: set[str]) -> None:
    """Raises ValueError for the first tensor, by name, that differs and is not `allowed` to be absent."""
    found = source.tensors
    for name in sorted(own.keys() | found.keys()):
        if name in allowed or own.get(name) == found.get(name):
            continue
        fix = "leave the model's sizes to --init"
        if name not in found:
            fix += ", or give new parameters their initial values with init.missing=allow"
        raise ValueError(
            f"{source.path} does not fit the model: {name} is {found.get(name, 'missing')}, expected "
            f"{own.get(name, 'no such tensor')}; {fix}"
        )


def _frozen(globs: Sequence[str], old: Sequence[str], new: Iterable[str]) -> tuple[str, ...]:
    """The names in `old` that a glob matches, in their order; new parameters are always trained."""
    chosen = set[str]()
    for glob in globs:
        matched = fnmatch.filter(old, glob)
        if not matched and fnmatch.filter(new, glob):
            raise ValueError(
                f"init.frozen: {glob!r} matches only parameters that --init lacks, which have to be trained; "
                "leave it out"
            )
        if not matched:
            near = ", ".join(difflib.get_close_matches(glob, old, n=3, cutoff=0.0))
            raise ValueError(f"init.frozen: {glob!r} matches no parameter; the nearest are {near}")
        chosen.update(matched)
    return tuple(name for name in old if name in chosen)


def _check_experts(names: Iterable[str], frozen: Sequence[str], ep_size: int) -> None:
    """Raises ValueError if a layer trains some of its experts' matrices and freezes others."""
    kept, layers = set(frozen), dict[str, list[str]]()
    for name in names:
        if ".experts." in name:
            layers.setdefault(name.rpartition(".")[0], []).append(name)
    for layer, matrices in layers.items():
        held = [name for name in matrices if name in kept]
        if held and len(held) < len(matrices):
            raise ValueError(
                f"init.frozen freezes {held[0]} but not all of {layer}.*, which ep_size={ep_size} cannot "
                "save; freeze all of a layer's experts or none, or set ep_size=1"
            )


def freeze(model: nn.Module, start: Start) -> None:
    """Takes what is frozen out of training."""
    own = dict(model.named_parameters())
    for name in start.frozen:
        own[name].requires_grad_(False)


@contextmanager
def given_values(start: Start | None) -> Iterator[Callable[[str], Tensor | None]]:
    """Inside, a function that reads the whole tensor of a parameter or buffer; None: it starts from the seed.

    Raises:
        ValueError, OSError: one line; a tensor is not finite, or the file is damaged.
    """
    if start is None or start.weights is None:
        yield lambda name: None
        return
    weights, held = start.weights, start.source.tensors
    with unchanged(weights):
        opened = open_weights(weights, FIX)
        yield lambda name: opened.checked(name) if name in held else None


def write_record(run: Path, start: Start) -> None:
    """Writes where the weights came from to RECORD."""
    write_json(run / RECORD, vars(start.source))


def save_base(run: Path, start: Start) -> None:
    """Copies the weights that training starts from to BASE, unless they are there.

    Raises:
        ValueError: they changed since the run was prepared.
    """
    base, sha256 = run / BASE, start.source.sha256
    if start.weights is None or (base.is_file() and weights_digest(base, FIX) == sha256):
        return
    with replacing(base) as temporary:
        copy_weights(start.weights, temporary, FIX)
        if weights_digest(temporary, FIX) != sha256:
            raise ValueError(f"{start.weights} has changed since it was read; start again when it is whole")


def base_weights(run: Path, sha256: str, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Weights that training started from, in fp32 and one after another, from the run's BASE.

    Args:
        sha256: of the file, or its first digits.
        names: those wanted; None: all.

    Raises:
        FileNotFoundError: BASE is missing.
        ValueError: BASE is damaged.
    """
    path, fix = run / BASE, "copy --init's model.safetensors there"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, the weights that the run began with; {fix}")
    if not weights_digest(path, fix).startswith(sha256):
        raise ValueError(f"{path} is damaged: it does not hold the weights that the run began with; {fix}")
    wanted = None if names is None else set(names)
    weights = open_weights(path, fix)
    return ((name, weights[name].float()) for name in weights if wanted is None or name in wanted)
