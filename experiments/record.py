"""The record of a finished cell: its cell.json, and its line in experiments/results/NAME.jsonl.

Keys that do not apply are absent.

matrix, cell, group, task, size, seed   names; `cell` is the folder below OUT/cells
budget             as text: steps, or the group whose training FLOPs are matched and its steps
variant            {key: value} of a study, over the group's own; absent: the group itself
examples           training examples generated (0: all that the recipe reads)
learning_rate      peak
settings           tasks and options of the cell, see experiments/settings.py
device             the GPU's name, or cpu
parameters, active_parameters, unrolled_parameters    the last counts a layer once per run
inference_flops_per_token   {steps: forward FLOPs, attending to a whole row}
training_flops     of the whole run, forward and backward, at the depths drawn
tokens             of the whole run, padding included; tokens_per_second: median over the steps
train_seconds, peak_memory_bytes    the latter of the process (CPU) or the device
optimizer_steps, final_loss (mean of the last 50), validation_loss (last step, trained depth)
trained_steps      R: loop steps; 1 without a loop. `steps` below are test-time steps, as text
mean_steps         at the answer, at the trained depth; mean_steps_share: as a share of R
num_samples, accuracy {steps: share}, label_accuracy {steps: share}
correct            text, 0 or 1 per sample at the trained depth; all cells of a task share the samples
by_depth           {problem depth: {steps: accuracy}}; trained_depth: the largest trained on
ood_accuracy       {steps: mean accuracy over the depths beyond it}
guesses            {strategy: accuracy} of answers that need no model
spearman_steps_depth    rank correlation of steps spent and problem depth, if halting is adaptive
convergence        {steps: {residuals: [relative change in each step], convergence_ratio}}, path_independence
                   (share of labels on which three initial states agree), overthinking_gap (the best accuracy
                   minus the one at 4 R)
gaps               {name: accuracy at the trained depth} of tests that differ from the training
bits_per_byte, perplexity (of a byte)    {steps: value}, of text
few_shot           of text: task, num_samples, accuracy {shots: share}, guesses {strategy: accuracy}, and
                   num_truncated {shots: prompts cut from the left to fit}
votes              {k: accuracy of the majority of k sampled chains of thought}
"""

import json
import statistics
from pathlib import Path
from typing import Any

import torch

from eval.looping.measures import unrolled_parameters
from experiments.matrix import Matrix, PlannedCell
from experiments.settings import cell_settings
from model import ModelConfig, ZeroModel
from model.counts import flops_per_token, num_parameters, training_flops_per_token

RECORD, FAILED = "cell.json", "failed.json"  # of a cell that is done, or that failed
LAST = 50  # steps that final_loss is the mean of


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
        "device": json.loads((folder / "environment.json").read_text())["device"],
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


def _training(plan: PlannedCell, folder: Path) -> dict[str, Any]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    validation = [record["val_loss"] for record in steps if record.get("val_loss") is not None]
    if not validation:
        raise ValueError(f"{folder / 'metrics.jsonl'} has no val_loss; move the folder away")
    depths = {record["recurrence_depth"] for record in steps}
    per_token = {n: training_flops_per_token(plan.model, plan.task.sequence_length, n) for n in depths}
    last = [record["loss"] for record in steps[-LAST:] if record["loss"] is not None]
    return {
        "optimizer_steps": len(steps),
        "training_flops": plan.tokens_per_step * sum(per_token[r["recurrence_depth"]] for r in steps),
        "tokens": plan.tokens_per_step * len(steps),
        "tokens_per_second": statistics.median(record["tokens_per_second"] for record in steps),
        "train_seconds": sum(record["seconds"] for record in steps),
        "peak_memory_bytes": max(record["memory_bytes"] for record in steps),
        "final_loss": statistics.mean(last) if last else None,
        "validation_loss": validation[-1],
    }


def _report(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        sorted((folder / "eval" / name).glob("results_*.json"))[-1].read_text()
    )
    return found


def _samples(folder: Path) -> list[dict[str, Any]]:
    (path,) = sorted((folder / "eval" / "main").glob("samples_*.jsonl"))[-1:]
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
        "correct": "".join(str(int(line["acc"][trained])) for line in _samples(folder)),
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
        "correct": "".join(str(int(line["acc"])) for line in _samples(folder)),
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
