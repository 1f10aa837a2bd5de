"""The record of a finished cell: its cell.json, and its line in experiments/results/NAME.jsonl."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.files import read_json_lines
from common.result_files import results_files, samples_file
from common.schema import Measured
from eval.looping.measures import unrolled_parameters
from experiments.matrix import Matrix, PlannedCell
from experiments.settings import cell_settings
from model import ModelConfig, ZeroModel
from model.counts import flops_per_token, num_parameters, training_flops_per_token
from pretrain.depths import trained_at

RECORD, FAILED = "cell.json", "failed.json"  # of a cell that is done, or that failed
MATRIX_CELLS = ".matrix.json"  # end of the name of a file in OUT that lists a matrix's cells
LAST = 50  # steps that final_loss is the mean of


@dataclass(frozen=True)
class MatrixCells:
    """The content of OUT/NAME.matrix.json."""

    matrix: str
    cells: list[str]


@dataclass(frozen=True)
class FailedCell:
    """The content of a cell's failed.json."""

    cell: str
    problem: str


BySteps = dict[str, Measured]  # test-time loop steps, as text -> value


@dataclass(frozen=True)
class Curve:
    """How the state settles with a number of test-time steps."""

    residuals: list[Measured]  # relative change in each step
    convergence_ratio: Measured | None


@dataclass(frozen=True)
class FewShot:
    """Questions asked with exemplars; the mappings are by number of exemplars, as text."""

    task: str
    num_samples: int
    accuracy: dict[str, Measured]
    num_truncated: dict[str, int]  # prompts cut from the left to fit
    guesses: dict[str, Measured]  # strategy -> accuracy


# Of the keys of a record, those whose values have numbers as keys.
COUNTED = (
    "inference_flops_per_token",
    "accuracy",
    "label_accuracy",
    "ood_accuracy",
    "bits_per_byte",
    "perplexity",
    "votes",
)


@dataclass(frozen=True, kw_only=True)
class CellRecord:
    """The keys of a record, which is kept as a plain mapping. Keys that do not apply are absent."""

    matrix: str
    cell: str  # the folder below OUT/cells
    group: str
    task: str
    size: str
    seed: int
    budget: str  # steps, or the group whose training FLOPs are matched and its steps
    variant: dict[str, Any] | None = (
        None  # {key: value} of a study, over the group's own; None: the group itself
    )
    examples: int  # training examples generated; 0: all that the recipe reads
    learning_rate: Measured  # peak
    settings: dict[str, Any] | None = None  # tasks and options of the cell, see experiments/settings.py
    device: str  # the GPU's name, or cpu
    parameters: int
    active_parameters: int
    unrolled_parameters: int  # counts a layer once per run
    inference_flops_per_token: BySteps  # forward, attending to a whole row
    training_flops: Measured  # of the whole run, forward and backward, at the depths drawn
    tokens: int  # of the whole run, padding included
    tokens_per_second: Measured  # median over the optimizer steps
    train_seconds: Measured
    peak_memory_bytes: int  # of the process (CPU) or the device
    optimizer_steps: int
    final_loss: Measured | None = None  # mean of the last 50 optimizer steps
    validation_loss: Measured | None = None  # after the last optimizer step, at the trained depth
    trained_steps: int  # R: loop steps; 1 without a loop
    mean_steps: Measured | None = None  # at the answer, at the trained depth
    mean_steps_share: Measured | None = None  # as a share of R
    num_samples: int | None = None
    accuracy: BySteps | None = None
    label_accuracy: BySteps | None = None
    correct: str | None = (
        None  # 0 or 1 per sample at the trained depth; all cells of a task share the samples
    )
    by_depth: dict[str, BySteps] | None = None  # problem depth -> accuracy
    trained_depth: int | None = None  # the largest problem depth trained on
    ood_accuracy: BySteps | None = None  # mean accuracy over the problem depths beyond it
    guesses: dict[str, Measured] | None = None  # strategy -> accuracy of answers that need no model
    spearman_steps_depth: Measured | None = None  # of steps spent and problem depth, if halting is adaptive
    # Besides the curves of all steps: path_independence (share of labels on which three initial states agree)
    # and overthinking_gap (the best accuracy minus the one at 4 R)
    convergence: dict[str, Curve | Measured] | None = None
    gaps: dict[str, Measured] | None = None  # test unlike the training -> accuracy at the trained depth
    bits_per_byte: BySteps | None = None  # of text
    perplexity: BySteps | None = None  # of a byte of text
    few_shot: FewShot | None = None  # of text
    votes: dict[str, Measured] | None = None  # k -> accuracy of the majority of k sampled chains of thought

    def __post_init__(self) -> None:
        for name in COUNTED:
            for count in getattr(self, name) or ():
                if not count.isdecimal():
                    raise ValueError(f"{name}: the key {count!r} is not a number")
        if str(self.trained_steps) not in self.inference_flops_per_token:
            raise ValueError(f"inference_flops_per_token lacks trained_steps={self.trained_steps}")
        for key, value in (self.convergence or {}).items():
            if isinstance(value, Curve) != key.isdecimal():
                raise ValueError(
                    f"convergence: {key!r} needs a curve if it is a number of steps, else a number"
                )


def make_record(plan: PlannedCell, matrix: Matrix, folder: Path) -> dict[str, Any]:
    """Reads a cell's folder. Raises ValueError if its metrics hold no validation loss."""
    cell = plan.cell
    record = {
        "matrix": matrix.name,
        "cell": cell.name,
        "group": cell.group,
        "task": cell.task,
        "size": cell.size,
        "seed": cell.seed,
        "budget": cell.budget.name,
        "variant": None if cell.vary is None else {cell.vary[0]: cell.vary[1]},
        "examples": plan.task.examples,
        "learning_rate": cell.learning_rate,
        "device": device_of(folder),
        **_sizes(plan),
        **_training(plan, folder),
        "trained_depth": plan.task.trained_depth,
    }
    if (folder / "eval" / "main").is_dir():
        read = {"reasoning": _reasoning, "traced": _traced, "text": _text}[plan.task.kind]
        record |= read(plan, folder)
    record["settings"] = cell_settings(plan, evaluate=not matrix.is_sweep)
    return {key: value for key, value in record.items() if value is not None}


def _trained(model: ModelConfig) -> int:
    return model.recurrence.num_steps if model.recurrence.placement != "none" else 1


def _sizes(plan: PlannedCell) -> dict[str, Any]:
    model, length = plan.model, plan.task.sequence_length
    trained = _trained(model)
    looped = model.recurrence.placement != "none"
    tested = sorted({*plan.task.evaluation.steps, trained}) if looped else [1]
    with torch.device("meta"):
        unrolled = unrolled_parameters(ZeroModel(model), trained)
    return {
        "parameters": num_parameters(model),
        "active_parameters": num_parameters(model, active=True),
        "unrolled_parameters": unrolled,
        "inference_flops_per_token": {str(n): flops_per_token(model, length, n) for n in tested},
        "trained_steps": trained,
    }


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a cell's metrics.jsonl. Raises ValueError if one is damaged."""
    metrics = read_json_lines(folder / "metrics.jsonl")
    if metrics.damaged:
        raise ValueError(f"{metrics.warnings()[0]}, but a record needs every step; move the folder away")
    return metrics.records


def device_of(folder: Path) -> str:
    """What a cell was trained on: the GPU's name, or cpu."""
    return str(json.loads((folder / "environment.json").read_text())["device"])


def newest_report(folder: Path) -> dict[str, Any]:
    """The newest results file in a folder."""
    found: dict[str, Any] = json.loads(results_files(folder)[-1].read_text())
    return found


def _training(plan: PlannedCell, folder: Path) -> dict[str, Any]:
    records = read_metrics(folder)
    steps = [record for record in records if "loss" in record]
    validation = [r["val_loss"] for r in records if r.get("val_loss") is not None]
    if not validation:
        raise ValueError(f"{folder / 'metrics.jsonl'} has no val_loss; move the folder away")
    per_token = [
        training_flops_per_token(
            trained_at(plan.model, r["step"] - 1), plan.task.sequence_length, r["recurrence_depth"]
        )
        for r in steps
    ]
    last = [record["loss"] for record in steps[-LAST:] if record["loss"] is not None]
    return {
        "optimizer_steps": len(steps),
        "training_flops": plan.tokens_per_step * sum(per_token),
        "tokens": plan.tokens_per_step * len(steps),
        "tokens_per_second": statistics.median(record["tokens_per_second"] for record in steps),
        "train_seconds": sum(record["seconds"] for record in steps),
        "peak_memory_bytes": max(record["memory_bytes"] for record in steps),
        "final_loss": statistics.mean(last) if last else None,
        "validation_loss": validation[-1],
    }


def _report(folder: Path, name: str) -> dict[str, Any]:
    return newest_report(folder / "eval" / name)


def _samples(folder: Path, name: str) -> list[dict[str, Any]]:
    path = samples_file(results_files(folder / "eval" / "main")[-1], name)
    return [json.loads(line) for line in path.read_text().splitlines()]


def _at_steps(entry: dict[str, Any]) -> dict[str, float]:
    prefix = "acc,num_steps="
    return {key.removeprefix(prefix): value for key, value in entry.items() if key.startswith(prefix)}


def _reasoning(plan: PlannedCell, folder: Path) -> dict[str, Any]:
    report = _report(folder, "main")
    name = f"reasoning_{plan.task.evaluation.task}"
    results, facts = report["results"], report["facts"][name]
    trained, prefix = str(facts["trained_steps"]), f"{name}_problem_depth"
    by_depth = {
        key.removeprefix(prefix): _at_steps(entry) for key, entry in results.items() if key.startswith(prefix)
    }
    gaps = {}
    for gap in plan.task.gaps:
        gaps[gap] = _report(folder, f"gap {gap}")["results"][name][f"acc,num_steps={trained}"]
    return {
        "num_samples": report["n-samples"][name]["effective"],
        "accuracy": _at_steps(results[name]),
        "correct": "".join(str(int(line["acc"][trained])) for line in _samples(folder, name)),
        "label_accuracy": _at_steps(results[f"{name}_labels"]),
        "by_depth": by_depth or None,
        "ood_accuracy": _beyond(by_depth, plan.task.trained_depth),
        "guesses": {way: score["value"] for way, score in report["baselines"][name].items()},
        "gaps": gaps or None,
        **(_loop(facts, trained) if facts["placement"] != "none" else {}),
    }


def _beyond(by_depth: dict[str, dict[str, float]], trained_depth: int | None) -> dict[str, float] | None:
    """Mean accuracy, by steps, over the depths beyond those trained on."""
    if trained_depth is None:
        return None
    deeper = [entry for depth, entry in by_depth.items() if int(depth) > trained_depth]
    if not deeper:
        return None
    return {steps: statistics.mean(entry[steps] for entry in deeper) for steps in deeper[0]}


def _loop(facts: dict[str, Any], trained: str) -> dict[str, Any]:
    by_steps = facts["by_steps"]
    convergence: dict[str, Any] = {
        steps: {key: found[key] for key in ("residuals", "convergence_ratio")}
        for steps, found in by_steps.items()
    }
    if facts["path_independence"] is not None:
        convergence["path_independence"] = facts["path_independence"]["agreement"]["value"]
    if facts["overthinking_gap"] is not None:
        convergence["overthinking_gap"] = facts["overthinking_gap"]["value"]
    return {
        "mean_steps": by_steps[trained]["answer_steps_mean"],
        "mean_steps_share": by_steps[trained]["answer_steps_mean"] / int(trained),
        "spearman_steps_depth": by_steps[trained]["problem_depth_correlation"],
        "convergence": convergence,
    }


def _traced(plan: PlannedCell, folder: Path) -> dict[str, Any]:
    """Tested at the trained depth alone."""
    report, trained = _report(folder, "main"), str(_trained(plan.model))
    results, configs = report["results"], report["configs"]
    (whole,) = [key for key, config in configs.items() if config["problem_depth"] is None]
    by_depth = {
        str(config["problem_depth"]): {trained: results[key]["acc,none"]}
        for key, config in configs.items()
        if config["problem_depth"] is not None
    }
    votes = {
        key.removeprefix("acc,maj@"): value
        for key, value in results[whole].items()
        if key.startswith("acc,maj@")
    }
    return {
        "num_samples": report["n-samples"][whole]["effective"],
        "accuracy": {trained: results[whole]["acc,none"]},
        "correct": "".join(str(int(line["acc"])) for line in _samples(folder, whole)),
        "by_depth": by_depth,
        "ood_accuracy": _beyond(by_depth, plan.task.trained_depth),
        "guesses": {way: score["value"] for way, score in report["baselines"][whole].items()},
        "votes": votes or None,
    }


def _text(plan: PlannedCell, folder: Path) -> dict[str, Any]:
    report = _report(folder, "main")
    found: dict[str, dict[str, float]] = {"bits_per_byte": {}, "perplexity": {}}
    for key, entry in report["results"].items():
        steps = str(report["configs"][key]["num_steps"] or 1)
        found["bits_per_byte"][steps] = entry["bits_per_byte,none"]
        if "byte_perplexity,none" in entry:
            found["perplexity"][steps] = entry["byte_perplexity,none"]
    (samples,) = {value["effective"] for value in report["n-samples"].values()}
    few_shot = _few_shot(plan, folder) if plan.task.evaluation.few_shot is not None else None
    return {"num_samples": samples, **found, "few_shot": few_shot}


def _few_shot(plan: PlannedCell, folder: Path) -> dict[str, Any]:
    report, task = _report(folder, "few-shot"), plan.task.evaluation.few_shot
    by_shots = {str(config["num_fewshot"]): key for key, config in report["configs"].items()}
    (samples,) = {value["effective"] for value in report["n-samples"].values()}
    return {
        "task": task,
        "num_samples": samples,
        "accuracy": {shots: report["results"][key]["acc,none"] for shots, key in by_shots.items()},
        "num_truncated": {shots: report["configs"][key]["num_truncated"] for shots, key in by_shots.items()},
        "guesses": {way: score["value"] for way, score in report["baselines"][task].items()},
    }
