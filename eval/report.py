"""One self-contained HTML page about a run, or about several beside each other.

python eval/report.py runs/NAME [MORE ...] [--out report.html]

A run is its output_dir, of which config.yaml, metrics.jsonl, export/config.json and eval/ are read, or one
results file of eval/. One run: budget, loss, expert load, scores, sample traces; what is not there is named
on the page. Several: one table, and pictures of what they share. Published scores, each with its source, are
in published.json.
"""

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import user_errors
from eval.reports.comparisons import losses_figure
from eval.reports.figures import accuracy_figure, expert_load_figure, loss_figure, series, to_html
from eval.reports.html import html_table, missing, note, page, show
from eval.reports.runs import Run, read_json_lines, read_runs
from eval.reports.scores import (
    against_published,
    by_depth,
    by_difficulty,
    by_shots,
    by_task,
    during_training,
    score_table,
    votes_beside_depth,
)
from eval.reports.thoughts import thoughts_section
from eval.scoring.cli import USER_ERRORS, Parser
from eval.scoring.core import Score
from eval.scoring.results import TABLE_HEADER, format_table, table_rows
from model.counts import num_parameters

LEVEL = re.compile(r"causal_loop_level(\d+)")
LEVEL_HEADER = ("level", "n", "with trace", "without trace", "majority", "one step")
BUDGET_KEYS = ("max_steps", "global_batch_size", "sequence_length", "seed")  # looked for in config.yaml
RUN_HEADER = (
    "run",
    "parameters",
    "active",
    "unrolled",
    "steps",
    "tokens",
    "training loss",
    "validation loss",
    "decontaminated",
)
TRACES = 3  # right ones and wrong ones shown, this many of each


def build_page(runs: Sequence[Run]) -> str:
    """The page as text. Raises ValueError if a file of a run is damaged."""
    if len(runs) == 1 and runs[0].folder is not None:
        return page(runs[0].name, "ZeroModel run report", one_run(runs[0], runs[0].folder))
    losses = {run.name: run.steps for run in runs if run.steps}
    sections = [
        ("Runs", html_table(RUN_HEADER, [run_row(run) for run in runs])),
        ("Loss", to_html(losses_figure(losses), "losses against tokens") if losses else ""),
        ("Scores", score_table(runs)),
        *score_sections(runs),
        *((f"All results of {run.name}", results_section(run.reports)) for run in runs if run.reports),
    ]
    return page(", ".join(run.name for run in runs), "ZeroModel report", sections)


def one_run(run: Run, folder: Path) -> list[tuple[str, str]]:
    return [
        ("Run", run_section(run, folder)),
        ("Loss", loss_section(run.steps)),
        ("Expert load", expert_section(run.steps)),
        ("Causal-loop accuracy", accuracy_section(run.reports)),
        ("Sample traces", traces_section(folder)),
        *score_sections([run], drawn=("causal_loop",)),
        ("All results", results_section(run.reports)),
    ]


def score_sections(runs: Sequence[Run], drawn: Sequence[str] = ()) -> list[tuple[str, str]]:
    """What one run and several have alike; `drawn`: tasks whose parts have a picture already."""
    return [
        ("Accuracy by task", by_task(runs)),
        ("Accuracy by difficulty", by_difficulty(runs, drawn)),
        ("Accuracy by depth", by_depth(runs)),
        ("Accuracy by examples in the prompt", by_shots(runs)),
        ("Majority vote beside depth", votes_beside_depth(runs)),
        ("Scores during training", during_training(runs)),
        ("Latent chain of thought", thoughts_section(runs)),
        ("Beside published models", against_published(runs)),
    ]


def run_row(run: Run) -> tuple[str, ...]:
    """The row under RUN_HEADER; a dash for what is not known."""

    def last(key: str, form: str) -> str:
        values = series(run.steps, key)[1]
        return format(values[-1], form) if values else "–"

    sizes: list[int | None] = [None, None, None]
    if run.model is not None:
        sizes = [num_parameters(run.model), num_parameters(run.model, active=True), run.unrolled_parameters()]
    said = [report["config"].get("decontamination") for report in run.reports.values()]
    return (
        run.name,
        *("–" if size is None else f"{size:,}" for size in sizes),
        last("step", ",d"),
        last("tokens", ",d"),
        last("loss", ".4f"),
        last("val_loss", ".4f"),
        next((str(text) for text in reversed(said) if text), "not known"),
    )


def run_section(run: Run, folder: Path) -> str:
    """Sizes from the exported config, budget from the resolved config, what was reached from the metrics."""
    rows: list[tuple[str, str]] = []
    notes = []
    config_path, metrics, config = folder / "config.yaml", run.steps, run.model
    if config is not None:
        rows += [
            ("parameters", f"{num_parameters(config):,}"),
            ("parameters active per token", f"{num_parameters(config, active=True):,}"),
            ("parameters, loops unrolled", f"{run.unrolled_parameters():,}"),
            ("recurrence", f"{config.recurrence.placement}, {config.recurrence.num_steps} steps"),
        ]
    else:
        notes.append(missing(f"Model sizes: {run.model_problem}"))
    if config_path.is_file():
        text = config_path.read_text(encoding="utf-8")
        for key in BUDGET_KEYS:
            # The resolved config is OmegaConf's own output: one "key: value" a line.
            found = re.search(rf"^\s*{key}:\s*(\S+)", text, re.MULTILINE)
            rows += [(key, found.group(1))] if found else []
        notes.append(f"<details><summary>Resolved config</summary><pre>{html.escape(text)}</pre></details>")
    else:
        notes.append(missing("Configuration: config.yaml is not there."))
    if metrics:
        rows.append(("steps done", str(metrics[-1]["step"])))
        for key, label, form in (
            ("tokens", "tokens seen", "{:,}"),
            ("loss", "last training loss", "{:.4f}"),
            ("val_loss", "last validation loss", "{:.4f}"),
            ("recurrence_depth", "last recurrence depth", "{}"),
        ):
            values = series(metrics, key)[1]
            rows += [(label, form.format(values[-1]))] if values else []
        speeds = sorted(series(metrics, "tokens_per_second")[1])
        rows += [("median tokens per second", f"{speeds[len(speeds) // 2]:,.0f}")] if speeds else []
    return html_table(("", ""), rows) + "".join(notes)


def loss_section(metrics: list[dict[str, Any]]) -> str:
    if not metrics:
        return missing("metrics.jsonl is not there, or empty.")
    page = to_html(loss_figure(metrics), "loss against steps")
    return page if series(metrics, "val_loss")[0] else page + missing("No validation loss was logged.")


def expert_section(metrics: list[dict[str, Any]]) -> str:
    if not any(series(metrics, "expert_load")[1]):
        return missing("No expert load in metrics.jsonl (a dense model, or no metrics).")
    return to_html(expert_load_figure(metrics), "expert load over time") + note(
        "Share of the tokens that each expert got; dark blue is an idle expert."
    )


def level_scores(report: dict[str, Any]) -> dict[str, dict[str, Score]]:
    """For each level in a results file: the scores of the model and of the heuristics."""
    levels = {}
    for task, metrics in report["results"].items():
        match = LEVEL.fullmatch(task)
        if not match:
            continue
        scores = {}
        for name in ("trace", "direct"):
            stderr = metrics[f"exact_match_stderr,{name}"]
            scores[name] = Score(metrics[f"exact_match,{name}"], None if stderr == "N/A" else stderr)
        scores |= {name: Score(**report["baselines"][task][name]) for name in ("majority", "one_step")}
        levels[match.group(1)] = scores
    return levels


def newest_causal_loop(reports: dict[Path, dict[str, Any]]) -> Path | None:
    """The newest results file (names sort by time) that has causal-loop levels."""
    return max((path for path, report in reports.items() if level_scores(report)), default=None)


def level_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows under LEVEL_HEADER."""

    return [
        (
            level,
            str(report["n-samples"][f"causal_loop_level{level}"]["effective"]),
            *(show(scores[name]) for name in ("trace", "direct", "majority", "one_step")),
        )
        for level, scores in level_scores(report).items()
    ]


def accuracy_section(reports: dict[Path, dict[str, Any]]) -> str:
    path = newest_causal_loop(reports)
    if path is None:
        return missing("No causal-loop results in eval/ (eval/causal_loop.py writes them: --output_path).")
    levels = level_scores(reports[path])
    bars = {
        label: [scores[name] for scores in levels.values()]
        for name, label in zip(("trace", "direct", "majority", "one_step"), LEVEL_HEADER[2:], strict=True)
    }
    picture = to_html(accuracy_figure([f"level {level}" for level in levels], bars), "accuracy per level")
    said = note(f"From {path.name}, held-out programs.")
    return picture + html_table(LEVEL_HEADER, level_rows(reports[path])) + said


def traces_section(run: Path) -> str:
    """A few programs of the newest sample file with the model's own trace, right and wrong ones."""
    paths = sorted((run / "eval").glob("samples_causal_loop_*.jsonl"))
    if not paths:
        return missing("No samples_causal_loop_*.jsonl in eval/ (evaluate with --log_samples).")
    samples = read_json_lines(paths[-1])
    page = ""
    for value, label in ((1.0, "right"), (0.0, "wrong")):
        chosen = [sample for sample in samples if sample["exact_match,trace"] == value]
        page += f"<h3>{label.capitalize()} ({len(chosen)} of {len(samples)})</h3>"
        # Spread over the file, since its levels alternate.
        for sample in chosen[:: max(1, len(chosen) // TRACES)][:TRACES]:
            text = f"{sample['prompt']}{sample['resps']['trace']}\n\nExpected: {sample['answer']}"
            page += (
                f"<p class='note'>Level {sample['level']}</p><pre class='{label}'>{html.escape(text)}</pre>"
            )
    return page


def results_section(reports: dict[Path, dict[str, Any]]) -> str:
    if not reports:
        return missing("No results_*.json in eval/.")
    return "".join(
        f"<h3>{html.escape(path.name)}</h3>{html_table(TABLE_HEADER, table_rows(report))}"
        for path, report in reports.items()
    )


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders or results files")
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE", help="the page to write"
    )
    args = parser.parse_args()
    with user_errors(*USER_ERRORS):
        runs, left_out = read_runs(args.runs)
        args.out.write_text(build_page(runs), encoding="utf-8")
        newest = newest_causal_loop(runs[0].reports)
        if len(runs) > 1:
            print(format_table(RUN_HEADER, [run_row(run) for run in runs]))
        elif newest is not None:
            print(format_table(LEVEL_HEADER, level_rows(runs[0].reports[newest])))
        for line in left_out:
            print(line)
        print(f"written: {args.out}")


if __name__ == "__main__":
    main()
