"""Predicts memory, communication and step time of a training run on GPUs that are not available here.

    python pretrain/plan.py --model large --gpus 256 --ep 8
    python pretrain/plan.py --size 1B --tokens 20B --gpus 64 > 1b_moe.yaml

--model is a preset, or the YAML of a run whose model is read. --size is one dial instead: it gives a model,
its batch, learning rate and layout, printed as the YAML of a run (docs/SCALING.md has the rules). Whatever
is not given (ep, ZeRO stage, micro-batch, activation checkpointing) is searched for the most tokens/s that
fit; with several numbers of GPUs the best layout for each is listed. Bytes follow from the model and from
what DeepSpeed sends (planning/communication.py and planning/memory.py, tested against it on 2 and 4 CPU
ranks). STEP TIMES ARE PREDICTED AND UNVERIFIED, see planning/search.py. A run whose depth changes is planned
at its deepest.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from common.errors import user_errors
from common.files import read_json_lines
from common.schema import Count, Weight, as_type, checked_values, from_plain
from model import ModelConfig
from model.config.execution import CHECKPOINTING
from model.config.model import PRESETS
from model.counts import num_parameters
from pretrain.depths import deepest
from pretrain.planning.layout import Hardware, Layout, Loads
from pretrain.planning.search import LayoutPlan, describe, search
from pretrain.planning.size_files import looped_yaml, run_yaml
from pretrain.planning.sizes import Sized, sized
from pretrain.run_config import load_run_config

SEQUENCE_LENGTH, ROWS = 2048, 2048  # of a step of --model
SEARCHED = ("ep", "stage", "micro_batch_size", "checkpointing")


def main() -> None:
    arguments = _parse()
    with user_errors(ValueError, OSError):
        run = read_size(arguments)
        config = deepest(read_model(arguments.model)) if run is None else _form(run, arguments.looped)
        hardware = read_hardware(arguments.hardware)
        loads = None if arguments.loads is None else read_loads(arguments.loads)
        fixed = {name: getattr(arguments, name) for name in SEARCHED if getattr(arguments, name) is not None}
        length = SEQUENCE_LENGTH if arguments.sequence_length is None else arguments.sequence_length
        fixed["sequence_length"] = length if run is None else run.sequence_length
        for n in arguments.gpus:
            checked_values(Layout, {**fixed, "gpus": n}, "")
        given = ROWS if arguments.global_batch_size is None else arguments.global_batch_size
        given = as_type(Count, given, "--global_batch_size")
        rows = {n: given if run is None else run.rows(n) for n in arguments.gpus}
        plans = [search(config, hardware, rows[n], {**fixed, "gpus": n}, loads) for n in arguments.gpus]
    if arguments.json:
        print(json.dumps([as_dict(p) for p in plans], indent=2))
    elif run is not None and len(plans) == 1:
        print((looped_yaml if arguments.looped else run_yaml)(run, plans[0]), end="")
    elif len(plans) == 1:
        print(as_text(arguments.model, config, plans[0], hardware))
    else:
        print(as_table(plans, hardware))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Predict a training run on GPUs that are not here.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="preset (python -m model lists them) or YAML of a run")
    what.add_argument("--size", help="parameters in total, such as 130M or 1B: plans a run of that size")
    parser.add_argument(
        "--tokens", help="with --size: tokens of the run, such as 20B; default: 20 per parameter"
    )
    parser.add_argument(
        "--looped", action="store_true", help="with --size: the middle half of the layers twice"
    )
    parser.add_argument(
        "--gpus", type=int, required=True, nargs="+", help="one number, or several for a table"
    )
    parser.add_argument("--ep", type=int, help="GPUs that share one set of experts; default: searched")
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), help="ZeRO stage; default: searched")
    parser.add_argument("--micro_batch_size", type=int, help="rows a GPU computes at once; default: searched")
    parser.add_argument(
        "--checkpointing", choices=CHECKPOINTING, help="default: the better of none and block"
    )
    parser.add_argument(
        "--sequence_length", type=int, help=f"tokens per row of --model (default: {SEQUENCE_LENGTH})"
    )
    parser.add_argument(
        "--global_batch_size", type=int, help=f"rows per step of --model, over all GPUs (default: {ROWS})"
    )
    parser.add_argument(
        "--loads", type=Path, help="metrics.jsonl whose last expert_load is used; default: even loads"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--hardware",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="figures that replace an H100's: " + ", ".join(f.name for f in dataclasses.fields(Hardware)),
    )
    return parser.parse_args()


def read_size(arguments: argparse.Namespace) -> Sized | None:
    """The run of --size, if it was given.

    Raises:
        ValueError: a flag that goes with --model alone, or with --size alone; one line.
    """
    sizes, models = ("tokens", "looped"), ("sequence_length", "global_batch_size")
    wrong, other = (sizes, "--size") if arguments.size is None else (models, "--model")
    for flag in wrong:
        if getattr(arguments, flag) not in (None, False):
            raise ValueError(f"--{flag} goes with {other} alone; leave it out")
    return None if arguments.size is None else sized(arguments.size, arguments.tokens)


def _form(run: Sized, looped: bool) -> ModelConfig:
    return run.looped if looped else run.config


def read_model(name: str) -> ModelConfig:
    """The model of a preset or of a YAML; without vocab_size a YAML gets ModelConfig's default.

    Raises:
        ValueError, FileNotFoundError: one line.
    """
    if name in PRESETS:
        return ModelConfig.from_dict({"preset": name})
    if not name.endswith((".yaml", ".yml")):
        raise ValueError(
            f"--model {name} is neither a YAML nor one of the presets {', '.join(sorted(PRESETS))}"
        )
    return ModelConfig.from_dict(load_run_config(name, ["data.path=unread"]).model)


def read_hardware(overrides: list[str]) -> Hardware:
    """An H100 with the given figures instead of its own.

    Raises:
        ValueError: not NAME=VALUE, an unknown name, or a number out of its limits.
    """
    values = dict[str, int | float]()
    for override in overrides:
        name, _, value = override.partition("=")
        try:
            values[name] = int(value) if value.isdecimal() else float(value)
        except ValueError:
            raise ValueError(f"--hardware {override} is not a number; write e.g. {name}=1e9") from None
    return from_plain(Hardware, values, "hardware")


def read_loads(path: Path) -> Loads:
    """Expert shares in every MoE layer, from the last line of a run's metrics.jsonl that has them.

    Raises:
        ValueError: the file records none, or no shares.
    """
    records = [record for record in read_json_lines(path).records if "expert_load" in record]
    if not records:
        raise ValueError(f"--loads {path} has no expert_load in any line; give a run's metrics.jsonl")
    where = f"the last expert_load of --loads {path}"
    loads = as_type(list[list[Weight]], records[-1]["expert_load"], where)
    if not loads or not all(sum(layer) > 0 for layer in loads):
        raise ValueError(f"{where} has a layer without tokens; give the metrics of another run")
    return loads


def as_dict(plan: LayoutPlan) -> dict[str, Any]:
    """A plan for JSON: bytes, seconds, tokens."""
    return {
        **dataclasses.asdict(plan),
        "memory_bytes": plan.memory_bytes,
        "step_seconds_predicted": plan.step_seconds,
        "tokens_per_second_predicted": plan.tokens_per_second,
        "limit_predicted": plan.limit,
    }


def as_text(name: str, config: ModelConfig, plan: LayoutPlan, hardware: Hardware) -> str:
    """A page on one layout."""
    layout, usable = plan.layout, hardware.usable_bytes / 1e9
    total, active = num_parameters(config), num_parameters(config, active=True)
    lines = [
        f"{name}: {total:,} parameters, {active:,} active per token",
        f"{layout.gpus} GPUs, {describe(layout)}, {layout.step_tokens:,} tokens per step",
        "",
        f"memory per GPU               {plan.memory_bytes / 1e9:8.2f} GB of {usable:.1f}",
        *(f"  {part:27}{size / 1e9:8.2f} GB" for part, size in plan.memory.items()),
        "",
        "communication per step       as logged  group, phase",
        *(f"  {c.operation:27}{c.bytes / 1e9:8.2f} GB  {c.group}, {c.phase}" for c in plan.traffic),
        f"  sent over NVLink           {plan.nvlink_bytes / 1e9:8.2f} GB per GPU",
        f"  sent over the network      {plan.network_bytes / 1e9:8.2f} GB per GPU",
        "",
        f"step time                    {plan.step_seconds:8.3f} s   PREDICTED, UNVERIFIED",
        *(f"  waiting for {resource:17}{seconds:8.3f} s" for resource, seconds in plan.seconds.items()),
        f"tokens/s                     {plan.tokens_per_second:8,.0f}   limited by {plan.limit}",
    ]
    return "\n".join(lines)


COLUMNS = (
    "GPUs",
    "ZeRO",
    "ep",
    "micro-batch",
    "checkpointing",
    "GB",
    "GB by NVLink",
    "GB by network",
    "NVLink busy",
    "network busy",
    "step, s",
    "tokens/s",
    "tokens/s per GPU",
    "limited by",
)


def as_table(plans: list[LayoutPlan], hardware: Hardware) -> str:
    """A Markdown table, a line per size; GB are per GPU, those sent are per step."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for p in plans:
        layout = p.layout
        near = p.nvlink_bytes / (hardware.nvlink_bandwidth * hardware.nvlink_fraction)
        far = p.network_bytes / (hardware.network_bandwidth * hardware.network_fraction)
        cells = (
            layout.gpus,
            layout.stage,
            layout.ep,
            f"{layout.micro_batch_size} x {layout.accumulation}",
            layout.checkpointing,
            f"{p.memory_bytes / 1e9:.1f}",
            f"{p.nvlink_bytes / 1e9:.1f}",
            f"{p.network_bytes / 1e9:.1f}",
            f"{near / p.step_seconds:.0%}",
            f"{far / p.step_seconds:.0%}",
            f"{p.step_seconds:.3f}",
            f"{p.tokens_per_second:,.0f}",
            f"{p.tokens_per_second / layout.gpus:,.0f}",
            f"{p.limit} {p.seconds[p.limit] / p.step_seconds:.0%}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
