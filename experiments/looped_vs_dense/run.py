"""One layer, one layer looped R times, R layers: same data, same tokens, several seeds.

    python experiments/looped_vs_dense/run.py --task p_hop|p_hop_long|causal_loop_v2 --out DIR
        [--model "4 layers"] [--seeds 0,1,2] [--jobs 1] [a.b=c ...]

Builds the data, trains every model with every seed through pretrain/main.py on one rank, evaluates the
exports with eval/reasoning.py, and writes results.json, table.md and accuracy.png. Started again, it goes on
where it was: what is trained or evaluated already is kept.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from data_pipeline.errors import user_errors
from eval.results import format_table
from experiments.runs import ROOT, call, run_all, spread, train

matplotlib.use("Agg")
HERE = Path(__file__).parent


def loop(steps: int, random_depth: bool) -> list[str]:
    """Overrides of a model whose only layer is looped, its input added again in every step."""
    sampling = ["depth_sampling=poisson", f"max_steps={2 * steps}"] if random_depth else []
    switches = ["placement=block", f"num_steps={steps}", "update=simple", *sampling]
    return [f"model.recurrence.{switch}" for switch in switches]


def models(steps: int) -> dict[str, list[str]]:
    return {
        "1 layer": [],
        f"1 layer x {steps}": loop(steps, random_depth=False),
        f"1 layer x random, mean {steps}": loop(steps, random_depth=True),
        f"{steps} layers": [f"model.num_hidden_layers={steps}"],
    }


@dataclass(frozen=True)
class Task:
    kind: str  # of the recipe, of the YAML beside this file and of eval/reasoning.py
    steps: int  # R
    num_samples: int  # of the evaluation
    data: list[str]  # overrides of the recipe
    options: str = ""  # of eval/reasoning.py
    overrides: tuple[str, ...] = ()  # of the YAML


TASKS = {
    "p_hop": Task("p_hop", steps=4, num_samples=2000, data=["sources.0.num_samples=120000"]),
    "p_hop_long": Task(
        "p_hop",
        steps=6,
        num_samples=2000,
        data=["sources.0.num_samples=250000", "sources.0.hops=6", "sources.0.length=48"],
        options="hops=6,length=48",
        overrides=("data.sequence_length=50", "max_steps=6000", "save_every=6000"),
    ),
    "causal_loop_v2": Task(
        "causal_loop_v2",
        steps=6,
        num_samples=4000,
        data=[
            "sources.0.depths=[1,2,3,4]",
            "sources.0.families=[chain,convergence]",
            "sources.0.names=5",
            "sources.0.num_samples=110000",
        ],
        options="max_depth=8,names=5",
    ),
}


def train_model(task: str, run: Path, data: Path, seed: int, overrides: Sequence[str]) -> None:
    train(
        run,
        *("pretrain/main.py", "--ds_config", "ds_configs/zero1.json"),
        *("--config", HERE.relative_to(ROOT) / f"{TASKS[task].kind}.yaml"),
        *(f"data.path={data.absolute()}", f"seed={seed}"),
        *TASKS[task].overrides,
        *overrides,
    )


def evaluate(task: str, run: Path, num_samples: int) -> None:
    if list((run / "eval").glob("results_*.json")):
        return
    call(
        run / "eval.log",
        *(sys.executable, "eval/reasoning.py", "--checkpoint", run.absolute() / "export"),
        *("--task", TASKS[task].kind, "--task_options", TASKS[task].options, "--num_samples", num_samples),
        *("--output_path", run.absolute() / "eval", "--batch_size", 64),
    )


def collect(task: str, run: Path) -> dict[str, Any]:
    """The figures of one trained model."""
    report = json.loads(sorted((run / "eval").glob("results_*.json"))[-1].read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = f"reasoning_{TASKS[task].kind}"
    facts, answers = report["reasoning"], report["results"][scores]
    labels = report["results"][f"{scores}_labels"]
    steps = list(facts["by_steps"])
    depths = [name for name in report["results"] if name.startswith(f"{scores}_depth")]
    return {
        "parameters": facts["parameters"],
        "trained_steps": facts["trained_steps"],
        "flops_per_token": {n: facts["by_steps"][n]["flops_per_token"] for n in steps},
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in lines),
        "train_seconds": sum(line["seconds"] for line in lines),
        "final_loss": statistics.mean(line["loss"] for line in lines[-50:]),
        "accuracy": {n: answers[f"acc,steps={n}"] for n in steps},
        "label_accuracy": {n: labels[f"acc,steps={n}"] for n in steps},
        "by_depth": {
            name.rsplit("depth", 1)[1]: {n: report["results"][name][f"acc,steps={n}"] for n in steps}
            for name in depths
        },
        "baselines": {name: score["value"] for name, score in report["baselines"][scores].items()},
    }


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: accuracy as mean (smallest-largest) over the seeds, at the trained depth and at twice it."""
    header = ["model", "parameters", "MFLOPs/token", "tokens/s", "answer", "answer at twice R", "all labels"]
    rows = []
    for name, runs in results.items():
        R = runs[0]["trained_steps"]
        twice = str(2 * R)
        at = str(R)
        rows.append(
            [
                name,
                f"{runs[0]['parameters']:,}",
                f"{runs[0]['flops_per_token'][at] / 1e6:.2f}",
                f"{statistics.median(r['tokens_per_second'] for r in runs):,.0f}",
                spread([r["accuracy"][at] for r in runs]),
                spread([r["accuracy"][twice] for r in runs]) if twice in runs[0]["accuracy"] else "",
                spread([r["label_accuracy"][at] for r in runs]),
            ]
        )
    return format_table(header, rows)


def figure(task: str, results: dict[str, list[dict[str, Any]]]) -> Figure:
    """Accuracy against test-time depth, and, where the task knows it, against the true depth."""
    has_depth = bool(next(iter(results.values()))[0]["by_depth"])
    picture = Figure(figsize=(11 if has_depth else 6.5, 4))
    axes = picture.subplots(1, 1 + has_depth, squeeze=False)[0]
    for number, (name, runs) in enumerate(results.items()):
        steps = [int(n) for n in runs[0]["accuracy"]]
        means, low, high = _means([[r["accuracy"][str(n)] for r in runs] for n in steps])
        color = f"C{number}"
        if len(steps) == 1:
            axes[0].axhline(means[0], color=color, linestyle="--", label=name)
        else:
            axes[0].plot(steps, means, color=color, marker="o", label=name)
            axes[0].fill_between(steps, low, high, color=color, alpha=0.2)
        if has_depth:
            at = max(steps) if len(steps) == 1 else 2 * runs[0]["trained_steps"]
            depths = sorted(map(int, runs[0]["by_depth"]))
            means, low, high = _means([[r["by_depth"][str(d)][str(at)] for r in runs] for d in depths])
            axes[1].plot(depths, means, color=color, marker="o", label=f"{name}, tested at {at}")
            axes[1].fill_between(depths, low, high, color=color, alpha=0.2)
    best = max(next(iter(results.values()))[0]["baselines"].values())
    for axis in axes:
        axis.axhline(best, color="grey", linewidth=0.8, linestyle=":", label="best guess")
        axis.set(ylabel="accuracy of the answer", ylim=(0, 1.02))
        axis.legend(fontsize=8)
    axes[0].set(xlabel="loop steps at test time", title=task)
    if has_depth:
        axes[1].set(xlabel="true serial depth")
    picture.tight_layout()
    return picture


def _means(values: list[list[float]]) -> tuple[list[float], list[float], list[float]]:
    return [statistics.mean(v) for v in values], [min(v) for v in values], [max(v) for v in values]


def choose(known: dict[str, list[str]], names: Sequence[str] | None) -> dict[str, list[str]]:
    """The models of these names; None: all.

    Raises:
        ValueError: one of them is unknown.
    """
    for name in names or ():
        if name not in known:
            raise ValueError(f"--model={name!r} is unknown; choose from {', '.join(map(repr, known))}")
    return {name: known[name] for name in names or known}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare a looped layer with one layer and with R layers.")
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of data, runs and results")
    parser.add_argument("--model", action="append", help="one of the models; repeatable (default: all)")
    parser.add_argument("--seeds", default="0,1,2", metavar="0,1,..")
    parser.add_argument("--num_samples", type=int, help="test samples (default: the task's, 2,000 or more)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each (default: 1)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="of all runs, e.g. max_steps=50")
    arguments = parser.parse_intermixed_args()
    with user_errors(ValueError, OSError):
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Data, runs, evaluations, then the table and the plot.

    Raises:
        ValueError: a command failed; the line names its log.
    """
    task, out = arguments.task, arguments.out
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    data = out / "data"
    recipe = f"data_pipeline/recipes/{TASKS[task].kind}.yaml"
    build = (sys.executable, "data_pipeline/build.py", "--recipe", recipe, "--out", data.absolute())
    call(out / "build.log", *build, *TASKS[task].data)
    chosen = choose(models(TASKS[task].steps), arguments.model)
    folders = {(name, seed): out / f"{name.replace(' ', '_')}-{seed}" for name in chosen for seed in seeds}

    def job(name: str, seed: int) -> None:
        run = folders[name, seed]
        train_model(task, run, data, seed, [*chosen[name], *arguments.overrides])
        evaluate(task, run, arguments.num_samples or TASKS[task].num_samples)

    keys = sorted(folders, key=lambda key: key[1])
    failed = run_all(
        {f"{name}, seed {seed}": partial(job, name, seed) for name, seed in keys}, arguments.jobs
    )
    if failed:
        raise ValueError("; ".join(f"{name}: {problem}" for name, problem in failed.items()))
    results = {name: [collect(task, folders[name, seed]) for seed in seeds] for name in chosen}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "table.md").write_text(table(results) + "\n")
    figure(task, results).savefig(out / "accuracy.png", dpi=110)
    print(table(results))
    print(f"written: {out / 'results.json'}, table.md, accuracy.png")


if __name__ == "__main__":
    main()
