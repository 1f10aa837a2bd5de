"""A matrix of conversions of one pretrained model: convert, evaluate, train on, evaluate again.

    retrofit: runs/pretrained/base    # export/ folder of the base, e.g. of `python -m model.hf import`
    about: SmolLM2-135M-Instruct, ... # what its weights are, for the table
    recipe: wikipedia                 # data_pipeline/recipes/NAME.yaml; the base's tokenizer encodes it
    recipe_overrides: []              # of it (default: none)
    steps: 130                        # optimizer steps of the recovery, of experiments/retrofit_base.yaml
    training: [optimizer.lr=1e-4]     # overrides of that file (default: none)
    ds_config: ds_configs/zero1.json  # DeepSpeed's settings (default: this one)
    evaluations:                      # name -> script of eval/ and its flags; DATA: the built folder
      wikipedia: [eval/perplexity.py, --data, DATA, --limit, "100"]
    groups:                           # name -> conversions, each the arguments of `python -m model.convert`
      A: []
      B: [[mla, --kv_lora_rank, "128", --qk_rope_head_dim, "64", --text, TEXT]]

TEXT stands for a file of the training texts. All groups train on the same batches, by pretrain/main.py
--init. A cell's folder holds the converted model (start/), its scores (eval/start/NAME) and those after the
recovery (eval/NAME). The base itself lies outside: a path is from the root of the repository.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.files import json_object, write_file, write_json
from common.schema import from_plain
from data_pipeline.errors import DataError
from eval.scoring.results import format_table
from experiments.jobs import ROOT, Data, Job, Start, cell_folder
from experiments.record import RECORD, device_of, newest_report, read_metrics
from experiments.settings import DS_CONFIG
from experiments.tasks import HERE, at_least, read_yaml
from model.counts import cached_numbers, num_parameters
from model.export_files import TOKENIZER_NAME, load_config
from pretrain.run_config import load_run_config

KIND = "retrofit"  # the key that tells such a matrix from the others
BASE = HERE / "retrofit_base.yaml"


@dataclass(frozen=True, kw_only=True)
class RetrofitFile:
    retrofit: str
    about: str
    recipe: str
    steps: int
    evaluations: dict[str, list[str]]
    groups: dict[str, list[list[str]]]
    recipe_overrides: list[str] = field(default_factory=list)
    training: list[str] = field(default_factory=list)
    ds_config: str = DS_CONFIG


@dataclass(frozen=True)
class RetrofitMatrix:
    path: Path
    file: RetrofitFile

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def overrides(self) -> list[str]:
        steps = self.file.steps
        saves = [f"save_every={max(1, steps // 6)}", "keep_last=1"]
        return [f"max_steps={steps}", *saves, *self.file.training]

    def jobs(self) -> list[Job]:
        """One per group, in the file's order."""
        file, base = self.file, ROOT / self.file.retrofit
        data = (f"tokenizer.file={base / TOKENIZER_NAME}", "tokenizer.vocab_size=null")
        return [
            Job(
                name=group,
                max_steps=file.steps,
                script="pretrain/main.py",
                training=("--ds_config", file.ds_config, "--config", str(BASE), *self.overrides),
                data=Data(file.recipe, file.recipe, (*data, *file.recipe_overrides)),
                evaluations=file.evaluations,
                start=Start(base, tuple(map(tuple, conversions))),
                record=self.record,
            )
            for group, conversions in file.groups.items()
        ]

    def record(self, folder: Path) -> dict[str, Any]:
        """What the table needs of a finished cell."""
        config = load_config(folder / "export")
        return {
            "matrix": self.name,
            "group": folder.name,
            "conversions": self.file.groups[folder.name],
            "parameters": num_parameters(config),
            "cached_numbers": cached_numbers(config),
            **_training(folder),
            "before": {name: _scores(folder / "eval" / "start" / name) for name in self.file.evaluations},
            "after": {name: _scores(folder / "eval" / name) for name in self.file.evaluations},
        }


def is_retrofit(values: Mapping[str, Any]) -> bool:
    """Whether a matrix file converts a pretrained model."""
    return KIND in values


def read_retrofit(path: Path) -> RetrofitMatrix:
    """Reads and checks a matrix file.

    Raises:
        ValueError, FileNotFoundError: one line; a wrong key or value, no groups, or no base.
    """
    where = f"matrix {path}"
    file = from_plain(RetrofitFile, read_yaml(path), f"{where}: ")
    at_least(1, f"{where}: ", steps=file.steps)
    if not file.groups or not file.evaluations:
        raise DataError(f"{where}: groups and evaluations need one entry or more")
    matrix = RetrofitMatrix(path, file)
    load_run_config(str(BASE), [*matrix.overrides, "data.path=of-the-cell"])
    if not (ROOT / file.retrofit / TOKENIZER_NAME).is_file():
        raise FileNotFoundError(
            f"{where}: {file.retrofit} has no {TOKENIZER_NAME}; write it with python -m model.hf import --hf "
            f"DIR --out {file.retrofit}"
        )
    return matrix


def _training(folder: Path) -> dict[str, Any]:
    steps = [line for line in read_metrics(folder) if "loss" in line]
    return {
        "optimizer_steps": len(steps),
        "tokens": sum(line["tokens"] for line in steps),
        "train_seconds": sum(line["seconds"] for line in steps),
        "device": device_of(folder),
    }


def _scores(folder: Path) -> dict[str, Any]:
    """Value, standard error and n of every metric in the newest results of an evaluation."""
    report = newest_report(folder)
    found: dict[str, Any] = {}
    for task, values in report["results"].items():
        for metric in METRICS:
            if f"{metric},none" in values:
                error = values.get(f"{metric}_stderr,none")
                found[f"{task} {metric}"] = {
                    "value": values[f"{metric},none"],
                    "stderr": error if isinstance(error, float) else None,
                    "n": report["n-samples"][task]["effective"],
                }
    return found


METRICS = ("bits_per_byte", "word_perplexity", "acc", "acc_norm")


def write_results(matrix: RetrofitMatrix, out: Path, failed: Mapping[str, str]) -> None:
    """OUT/table.md and results.json of the finished cells."""
    paths = {group: cell_folder(group, out) / RECORD for group in matrix.file.groups}
    records = {group: json_object(path.read_bytes()) for group, path in paths.items() if path.is_file()}
    done = {group: record for group, record in records.items() if record is not None}
    names = list(dict.fromkeys(name for record in done.values() for name in _flat(record["before"])))
    rows = [_row(record, names) for record in done.values()]
    header = ["group", "parameters", "cached numbers per token", "recovery", *names]
    text = f"{matrix.file.about}. Before recovery → after it, ± one standard error.\n\n"
    text += f"{format_table(header, rows)}\n"
    text += "".join(f"\nFailed: {name}: {problem}\n" for name, problem in failed.items())
    write_file(out / "table.md", text.encode())
    write_json(out / "results.json", {"about": matrix.file.about, "failed": dict(failed), "groups": done})
    print(text)
    print(f"written: {out / 'results.json'} and table.md")


def _flat(scores: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{name} {metric}": value for name, found in scores.items() for metric, value in found.items()}


def _row(record: dict[str, Any], names: list[str]) -> list[str]:
    before, after = _flat(record["before"]), _flat(record["after"])
    return [
        record["group"],
        f"{record['parameters']:,}",
        f"{record['cached_numbers']:,}",
        f"{record['tokens']:,} tokens, {record['train_seconds'] / 60:.0f} min",
        *(f"{_text(before[name])} → {_text(after[name])} (n={after[name]['n']})" for name in names),
    ]


def _text(score: dict[str, Any]) -> str:
    error = "" if score["stderr"] is None else f" ± {score['stderr']:.3f}"
    return f"{score['value']:.3f}{error}"
