"""The model card of an exported folder, README.md, from what is known and nothing else."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.files import read_object, write_file
from common.pages import plain
from common.result_files import results_files
from common.schema import as_type
from model.config.model import ModelConfig
from model.counts import num_parameters
from model.export_files import CONVERSIONS_NAME, INIT_NAME, TRAINING_DATA_NAME
from model.transformer import ZeroModel

FIX = "delete the file, or write it again"
_SOURCE = ("kind", "weight", "tokens", "decontaminated")  # of a source in training_data.json


def write_card(config: ModelConfig, checkpoint: Path, out: Path, scores: Path | None, own_code: bool) -> None:
    """Writes README.md with the metadata that the Hub reads.

    Args:
        scores: folder of results_*.json; default: eval/ beside the checkpoint, if there is one.
        own_code: whether the folder brings its code.

    Raises:
        ValueError: a file with scores or about the data is damaged. OSError: see common.files.replacing.
    """
    parts = [
        _metadata(config, own_code),
        f"# {plain(out.resolve().name)}",
        _opening(config, own_code),
        "## Use\n\n```python\n" + _usage(config, own_code) + "```",
        "## Size\n\n" + _table(("", ""), _sizes(config)),
    ]
    if origin := _origin(checkpoint):
        parts.append("## Origin\n\n" + origin)
    data = checkpoint / TRAINING_DATA_NAME
    if data.is_file():
        parts.append("## Training data\n\nTokens are those of the data set.\n\n" + _training_data(data))
    if scores is not None and not scores.is_dir():
        raise ValueError(f"--scores {scores} is not a folder; give one with results_*.json")
    folder = checkpoint.resolve().parent / "eval" if scores is None else scores
    if rows := [row for path in results_files(folder) for row in _scores(path)]:
        header = ("task", "n", "loop steps", "metric (filter)", "value", "standard error")
        parts.append("## Scores\n\nBy this project's `eval/`.\n\n" + _table(header, rows))
    write_file(out / "README.md", ("\n\n".join(parts) + "\n").encode())


def _metadata(config: ModelConfig, own_code: bool) -> str:
    """The block of YAML; every value is a plain word."""
    tags = ["zeromodel"]
    tags += ["custom_code"] if own_code else []
    tags += ["recurrent-depth"] if config.recurrence.placement != "none" else []
    tags += ["latent-reasoning"] if config.latent_cot.num_latents else []
    tags += ["mixture-of-experts"] if config.has_experts else []
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    return "\n".join(["---", *lines, *(f"- {tag}" for tag in tags), "---"])


def _opening(config: ModelConfig, own_code: bool) -> str:
    r, L = config.recurrence, config.num_hidden_layers
    attention = "multi-head latent attention" if config.use_mla else "grouped-query attention"
    feed = "a mixture of experts" if config.has_experts else "dense feed-forward layers"
    text = f"A causal language model with {L} layers, {attention} and {feed}, exported by ZeroModel."
    if r.placement == "block":
        ranges = ", ".join(f"{first} to {last}" for first, last in r.layer_ranges(L))
        text += f" Layers {ranges} (counted from 0) run as a loop, {r.num_steps} times by default."
    elif r.placement != "none":
        text += (
            f" Inside attention, a Latent Reasoning Unit ({r.placement}) runs {r.num_steps} steps by default."
        )
    if r.placement != "none" and r.halting.kind != "fixed":
        text += f" Tokens may stop earlier (halting: {r.halting.kind})."
    if config.latent_cot.num_latents:
        text += f" It thinks in {config.latent_cot.num_latents} latents before it answers."
    code = "The folder brings its code." if own_code else "It has the format of DeepSeek-V3."
    return f"{text} {code}"


def _usage(config: ModelConfig, own_code: bool) -> str:
    trust = ", trust_remote_code=True" if own_code else ""
    steps = f", num_steps={config.recurrence.num_steps}" if config.recurrence.placement != "none" else ""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("DIR"{trust})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("DIR"{trust})\n'
        'inputs = tokenizer("The", return_tensors="pt")\n'
        f"tokens = model.generate(**inputs, max_new_tokens=32{steps})\n"
        "print(tokenizer.decode(tokens[0], skip_special_tokens=True))\n"
    )


def _sizes(config: ModelConfig) -> list[tuple[str, str]]:
    R, L = config.recurrence.num_steps, config.num_hidden_layers
    runs = [config.runs_of_layer(layer, R) for layer in range(L)]
    with torch.device("meta"):
        layers: Any = ZeroModel(config).model.layers
    repeated = sum(
        (n - 1) * sum(p.numel() for p in layer.parameters()) for n, layer in zip(runs, layers, strict=True)
    )
    total = num_parameters(config)
    return [
        ("parameters", f"{total:,}"),
        ("active per token, loops counted once", f"{num_parameters(config, active=True):,}"),
        ("if every run of a layer had its own", f"{total + repeated:,}"),
        ("layers", f"{L}"),
        ("runs of layers per token", f"{sum(runs)}"),
        ("loop steps", str(R) if config.recurrence.placement != "none" else "none"),
        ("longest sequence, in tokens", f"{config.max_position_embeddings:,}"),
        ("vocabulary", f"{config.vocab_size:,}"),
    ]


def _origin(checkpoint: Path) -> str:
    """What the weights began as and how they were converted, as far as files beside them say."""
    lines = []
    start = checkpoint.resolve().parent / INIT_NAME
    if start.is_file():
        found = read_object(start, FIX)
        name, digest = Path(str(found.get("folder"))).name, str(found.get("sha256"))[:12]
        lines.append(f"Training began with the weights of {plain(name)} (sha256 {plain(digest)}).")
    record = checkpoint / CONVERSIONS_NAME
    conversions = read_object(record, FIX).get("conversions") if record.is_file() else None
    for one in as_type(list[dict[str, Any]], conversions or [], f"{record}: conversions"):
        source = Path(str(one.get("source"))).name
        lines.append(f"Converted by `model.convert {plain(str(one.get('command')))}` from {plain(source)}.")
    return "\n\n".join(lines)


def _training_data(path: Path) -> str:
    sources = _section(path, "sources")
    rows = [
        (plain(name), *(plain(str(source.get(key, ""))) for key in _SOURCE))
        for name, source in sources.items()
    ]
    return _table(("source", *_SOURCE), rows)


def _scores(path: Path) -> list[tuple[str, ...]]:
    """Rows of a results file of eval/."""
    results, samples = _section(path, "results"), _section(path, "n-samples")
    rows = list[tuple[str, ...]]()
    for task, entry in results.items():
        n, steps = samples.get(task, {}).get("effective", ""), entry.get("num_steps")
        for key, value in entry.items():
            metric, _, which = key.partition(",")
            if not which or metric.endswith("_stderr") or type(value) not in (int, float):
                continue
            error = entry.get(f"{metric}_stderr,{which}")
            shown = f"{error:.4f}" if type(error) is float else ""
            cells = (task, n, "" if steps is None else steps, f"{metric} ({which})")
            number = f"{value:.4f}" if type(value) is float else str(value)
            rows.append((*(plain(str(cell)) for cell in cells), number, shown))
    return rows


def _section(path: Path, key: str) -> dict[str, dict[str, Any]]:
    """A section of sections; an absent one is empty."""
    values = read_object(path, FIX).get(key, {})
    found: dict[str, dict[str, Any]] = as_type(dict[str, dict[str, Any]], values, f"{path}: {key}")
    return found


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Cells are Markdown."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
