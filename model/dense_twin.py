"""A solver of widths, and dense twins: models without recurrence that match another in parameters or FLOPs.

    python -m model.config match --like CONFIG --by parameters|flops [--sequence_length T] [model.a.b=c ...]

CONFIG is the YAML of a run, a model's own YAML or JSON, or an exported checkpoint. What is printed is a YAML
for pretrain/main.py's --config; its comments give both models' counts.
"""

import argparse
import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common.schema import Count, as_type
from model.config.model import PRESETS, ModelConfig, RecurrenceConfig
from model.counts import flops_per_token, num_parameters

TOLERANCE = 0.01
WIDTHS = ("intermediate_size", "moe_intermediate_size")
LAYERS = ("num_hidden_layers", "first_k_dense_replace")
SEQUENCE_LENGTH = 1024  # unless the command or the config says it; `python -m model` takes the same


def solve_widths(
    model: ModelConfig,
    names: Sequence[str],
    measure: Callable[[ModelConfig], float],
    wanted: float,
    multiples: Sequence[int] = (8, 1),
    tolerance: float | None = TOLERANCE,
) -> ModelConfig:
    """The model with the named widths, scaled in proportion, at which `measure` is nearest `wanted`.

    Args:
        model: what is scaled. `measure` must be linear in each of the widths.
        names: keys of ModelConfig, each of which changes what is measured.
        multiples: what the widths are rounded to, tried in this order; the first that comes near enough is
            taken.
        tolerance: how near is near enough, as a share of `wanted`; None: half of what 1 more width adds.

    Raises:
        ValueError: no widths from 1 on come near enough; one line.
    """
    gains = {name: measure(_with(model, {name: getattr(model, name) + 1})) - measure(model) for name in names}
    share = sum(gain * getattr(model, name) for name, gain in gains.items())
    scale = 1 + (wanted - measure(model)) / share
    unit, limit = (1.0, min(gains.values()) / 2) if tolerance is None else (wanted, tolerance)

    def miss(candidate: ModelConfig) -> float:
        return abs(measure(candidate) / unit - wanted / unit)

    def rank(candidate: ModelConfig) -> tuple[float, int]:
        """Prefers the odd width of two that are equally near: the committed records were made with it."""
        return miss(candidate), sum(getattr(candidate, name) % 2 == 0 for name in names)

    for multiple in multiples:
        nearest = min((model, *_scaled(model, names, scale, multiple)), key=rank)
        if miss(nearest) <= limit:
            return nearest
    widths = ", ".join(f"{name}={getattr(nearest, name)}" for name in names)
    raise ValueError(
        f"no whole widths come within {limit * unit / wanted:.2%} of {wanted:,.0f}: the nearest, {widths}, "
        f"give {measure(nearest):,.0f} ({measure(nearest) / wanted - 1:+.1%}); match a larger model, whose "
        "widths are finer steps"
    )


def _with(config: ModelConfig, changed: dict[str, Any]) -> ModelConfig:
    return dataclasses.replace(config, **changed)


def _scaled(config: ModelConfig, names: Sequence[str], scale: float, multiple: int) -> Iterator[ModelConfig]:
    """The widths times `scale`, each rounded down and up to a multiple."""
    choices = []
    for name in names:
        below = int(getattr(config, name) * scale // multiple) * multiple
        choices.append([max(below, multiple), max(below + multiple, multiple)])
    for widths in itertools.product(*choices):
        yield _with(config, dict(zip(names, widths, strict=True)))


def dense_twin(config: ModelConfig, by: str, sequence_length: int = SEQUENCE_LENGTH) -> ModelConfig:
    """The nearest model without recurrence, of the same vocabulary, width, attention and experts.

    Args:
        config: the model to match, at its own num_steps.
        by: parameters: distinct ones; as many layers, other feed-forward widths. flops: forward ones per
            token; the loops are unrolled into layers, then the feed-forward widths take up what is left.
        sequence_length: tokens attended to, for by=flops.

    Raises:
        ValueError: no whole widths come within 1%, or `by` is unknown; one line.
    """
    if by not in ("parameters", "flops"):
        raise ValueError(f"by={by!r} is unknown; choose parameters or flops")

    def measure(model: ModelConfig) -> float:
        return num_parameters(model) if by == "parameters" else flops_per_token(model, sequence_length)

    start = dataclasses.replace(config, recurrence=RecurrenceConfig())
    if by == "flops":
        start = _with(start, _unrolled(config))
    # A model may lack one of the two kinds of feed-forward layer.
    used = [n for n in WIDTHS if measure(_with(start, {n: getattr(start, n) + 1})) != measure(start)]
    try:
        return solve_widths(start, used, measure, measure(config))
    except ValueError as error:
        raise ValueError(f"no dense model of equal {by}: {error}") from None


def _unrolled(config: ModelConfig) -> dict[str, int]:
    """Layer counts in which every run of a looped layer is a layer of its own."""
    runs = [config.runs_of_layer(i, config.recurrence.num_steps) for i in range(config.num_hidden_layers)]
    dense = config.first_k_dense_replace
    beyond = max(dense - len(runs), 0)  # modules of multi-token prediction that are dense too
    return dict(zip(LAYERS, (sum(runs), sum(runs[:dense]) + beyond), strict=True))


def twin_section(given: dict[str, Any], by: str, sequence_length: int) -> tuple[dict[str, Any], str]:
    """The keys of a twin, and a table of both models.

    Args:
        given: a model's keys. What they leave to a preset or a default, the twin leaves too.
        by, sequence_length: as in dense_twin.

    Raises:
        ValueError: as in dense_twin, or the keys are not those of a model.
    """
    config = ModelConfig.from_dict(given)
    twin = dense_twin(config, by, sequence_length)
    changed = [n for n in (*LAYERS, *WIDTHS) if n in given or getattr(twin, n) != getattr(config, n)]
    section = {key: value for key, value in given.items() if key != "recurrence"}
    section |= {name: getattr(twin, name) for name in changed}
    preset = PRESETS[config.preset] if config.preset else {}
    loops = {"placement": "none", **preset.get("recurrence", {}), **given.get("recurrence", {})}
    section["recurrence"] = _reset(loops, dataclasses.asdict(twin.recurrence))
    assert ModelConfig.from_dict(section) == twin
    return section, _table(config, twin, sequence_length)


def _reset(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The given keys, each at its default."""
    return {
        key: _reset(value, defaults[key]) if isinstance(value, dict) else defaults[key]
        for key, value in given.items()
    }


def _table(config: ModelConfig, twin: ModelConfig, sequence_length: int) -> str:
    measures: dict[str, Callable[[ModelConfig], float]] = {
        "parameters": num_parameters,
        "active per token": lambda model: num_parameters(model, active=True),
        f"forward FLOPs per token at {sequence_length:,} tokens": lambda model: flops_per_token(
            model, sequence_length
        ),
    }
    lines = [f"{'':44}{'given':>18}{'dense':>18}{'ratio':>9}"]
    for name, measure in measures.items():
        a, b = measure(config), measure(twin)
        lines.append(f"{name:44}{a:>18,.0f}{b:>18,.0f}{b / a:>9.4f}")
    return "\n".join(lines)


def _read(path: Path) -> dict[str, Any]:
    """All keys of a YAML, a JSON or an export's config.json. Raises ValueError, OSError: one line."""
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a config or an export/ folder of a run")
    try:
        values = json.loads(path.read_text()) if path.suffix == ".json" else _read_yaml(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text ({error}); give a YAML or JSON") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); correct it or export it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no keys; give a config or an export/ folder of a run")
    return values


def _read_yaml(path: Path) -> Any:
    """Reads as pretrain does, if omegaconf is installed: the model itself needs torch and safetensors."""
    try:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError
    except ImportError:
        raise ValueError(f"{path}: reading YAML needs omegaconf; install it or give JSON") from None
    try:
        return OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, YAMLError, OSError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _override(values: dict[str, Any], override: str) -> None:
    """Sets model.a.b=c in a model's keys."""
    found = re.fullmatch(r"model\.([\w.]+)=(.*)", override)
    if found is None:
        raise ValueError(f"override {override!r} is not of the form model.a.b=c")
    *sections, key = found[1].split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"override {override!r}: {section} is not a section with keys")
    try:
        values[key] = json.loads(found[2])
    except json.JSONDecodeError:
        values[key] = found[2]


def _yaml(values: dict[str, Any], indent: str) -> str:
    """A section in block style. JSON scalars and lists are valid YAML, with one exception."""
    lines = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            lines.append(f"{indent}{key}:\n{_yaml(value, indent + '  ')}")
            continue
        text = json.dumps(value)
        if isinstance(value, float) and "." not in text:
            text = text.replace("e", ".0e")  # YAML 1.1 reads 1e-06 as a string
        lines.append(f"{indent}{key}: {text}")
    return "\n".join(lines)


def main() -> None:
    """The command line of `python -m model.config`."""
    parser = argparse.ArgumentParser(prog="python -m model.config", description="Sizes of models.")
    match = parser.add_subparsers(dest="command", required=True).add_parser(
        "match", help="print a model without recurrence of equal parameters or FLOPs"
    )
    match.add_argument("--like", type=Path, required=True, help="YAML, JSON or export/ folder")
    match.add_argument("--by", required=True, choices=("parameters", "flops"), help="what is to be equal")
    match.add_argument(
        "--sequence_length", type=int, help=f"default: the run's data.sequence_length or {SEQUENCE_LENGTH}"
    )
    match.add_argument("overrides", nargs="*", metavar="model.a.b=c", help="keys to override")
    arguments = parser.parse_args()
    try:
        print(_matched(arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _matched(arguments: argparse.Namespace) -> str:
    values = _read(arguments.like)
    length = arguments.sequence_length
    if "model" in values:
        data, values = values.get("data"), values["model"]
        if length is None and isinstance(data, dict):
            length = data.get("sequence_length")
    values = ModelConfig.checked(values)
    length = as_type(Count, SEQUENCE_LENGTH if length is None else length, "--sequence_length")
    for override in arguments.overrides:
        _override(values, override)
    section, table = twin_section(values, arguments.by, length)
    comments = "\n".join(f"# {line}" for line in table.splitlines())
    head = f"# {arguments.like} without recurrence, {arguments.by} matched."
    return "\n".join((head, comments, "model:", _yaml(section, "  ")))
