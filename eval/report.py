"""One self-contained HTML page about one run, or a comparison of several.

python eval/report.py runs/NAME [MORE ...] [--out report.html]

A run is an output_dir, of which config.yaml, metrics.jsonl, export/config.json and eval/ are read, or one
results file of eval/. One run: budget, loss, expert load, scores, sample traces; the page names what is
missing. Several runs: one table, and figures that compare them. Published scores, each with its source, are
in eval/reports/published.json.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import user_errors
from common.files import write_file
from common.locks import FolderLock
from common.pages import Block, Code, Note, Section, Table, plain, to_page
from common.result_files import samples_file
from eval.reports.comparisons import losses_figure
from eval.reports.figures import accuracy_figure, expert_load_figure, loss_figure, picture, series
from eval.reports.files import read_traces
from eval.reports.runs import Run, read_runs
from eval.reports.scores import (
    against_published,
    by_depth,
    by_difficulty,
    by_shots,
    by_task,
    during_training,
    score_table,
    show,
    votes_against_steps,
)
from eval.reports.thoughts import thoughts_section
from eval.scoring.cli import USER_ERRORS, Parser, show_any_text
from eval.scoring.core import Score
from eval.scoring.results import TABLE_HEADER, format_table, table_rows
from model.counts import num_parameters

LEVEL = re.compile(r"causal_loop_level(\d+)")
LEVEL_METRICS = ("exact_match,trace", "exact_match,direct")
LEVEL_GUESSES = ("majority", "one_step")
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
TRACES = 3  # right and wrong samples shown, at most this many of each


def build_page(runs: Sequence[Run]) -> str:
    """The HTML of the page. Raises ValueError if a file of a run is damaged."""
    if len(runs) == 1 and runs[0].folder is not None:
        return to_page(plain(runs[0].name), "ZeroModel run report", one_run(runs[0], runs[0].folder))
    losses = {run.name: run.steps for run in runs if run.steps}
    rows = [tuple(plain(cell) for cell in run_row(run)) for run in runs]
    sections = [
        Section("Runs", [Table(RUN_HEADER, rows), *(note for run in runs for note in problem_notes(run))]),
        Section("Loss", [picture(losses_figure(losses), "losses against tokens")] if losses else []),
        Section("Scores", score_table(runs)),
        *score_sections(runs),
        *(results_section(f"All results of {plain(run.name)}", run.reports) for run in runs if run.reports),
    ]
    return to_page(", ".join(plain(run.name) for run in runs), "ZeroModel report", sections)


def problem_notes(run: Run) -> list[Block]:
    return [Note(plain(problem), missing=True) for problem in run.problems]


def one_run(run: Run, folder: Path) -> list[Section]:
    return [
        Section("Run", run_section(run, folder)),
        Section("Loss", loss_section(run.steps)),
        Section("Expert load", expert_section(run.steps)),
        Section("Causal-loop accuracy", accuracy_section(run.reports)),
        traces_section("Sample traces", run.reports),
        *score_sections([run], drawn=("causal_loop",)),
        results_section("All results", run.reports),
    ]


def score_sections(runs: Sequence[Run], drawn: Sequence[str] = ()) -> list[Section]:
    """Sections for one run or several; `drawn`: tasks whose parts already have a figure."""
    return [
        Section("Accuracy by task", by_task(runs)),
        by_difficulty("Accuracy by difficulty", runs, drawn),
        Section("Accuracy by depth", by_depth(runs)),
        Section("Accuracy by examples in the prompt", by_shots(runs)),
        Section("Majority vote against loop steps", votes_against_steps(runs)),
        Section("Scores during training", during_training(runs)),
        thoughts_section("Latent chain of thought", runs),
        against_published("Comparison with published models", runs),
    ]


def counted(size: int | None) -> str:
    return "–" if size is None else f"{size:,}"


def run_row(run: Run) -> tuple[str, ...]:
    """The row under RUN_HEADER; a dash where a value is unknown."""

    def last(key: str, form: str) -> str:
        values = series(run.steps, key)[1]
        return format(values[-1], form) if values else "–"

    sizes: list[int | None] = [None, None, None]
    if run.model is not None:
        sizes = [num_parameters(run.model), num_parameters(run.model, active=True), run.unrolled_parameters()]
    said = [report["config"].get("decontamination") for report in run.reports.values()]
    return (
        run.name,
        *map(counted, sizes),
        last("step", ",d"),
        last("tokens", ",d"),
        last("loss", ".4f"),
        last("val_loss", ".4f"),
        next((str(text) for text in reversed(said) if text), "unknown"),
    )


def run_section(run: Run, folder: Path) -> list[Block]:
    """Sizes from the exported config, budget from the resolved config, progress from the metrics."""
    rows: list[tuple[str, str]] = []
    notes = problem_notes(run)
    config_path, metrics, config = folder / "config.yaml", run.steps, run.model
    if config is not None:
        rows += [
            ("parameters", f"{num_parameters(config):,}"),
            ("parameters active per token", f"{num_parameters(config, active=True):,}"),
            ("parameters, loops unrolled", counted(run.unrolled_parameters())),
            ("recurrence", f"{config.recurrence.placement}, {config.recurrence.num_steps} steps"),
        ]
    else:
        notes.append(Note(plain(f"Model sizes: {run.model_problem}"), missing=True))
    if config_path.is_file():
        text = config_path.read_text(encoding="utf-8", errors="replace")
        for key in BUDGET_KEYS:
            # The resolved config is OmegaConf's own output: one "key: value" per line.
            found = re.search(rf"^[ ]*{key}:[ ]*(\S+)", text, re.MULTILINE)
            rows += [(key, plain(found.group(1)))] if found else []
        notes.append(Code(text, "yaml", title="Resolved config"))
    else:
        notes.append(Note("Configuration: config.yaml is missing.", missing=True))
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
    return [Table(("", ""), rows), *notes]


def loss_section(metrics: list[dict[str, Any]]) -> list[Block]:
    if not metrics:
        return [Note("metrics.jsonl is missing or empty.", missing=True)]
    blocks: list[Block] = [picture(loss_figure(metrics), "loss against steps")]
    if not series(metrics, "val_loss")[0]:
        blocks.append(Note("No validation loss was logged.", missing=True))
    return blocks


def expert_section(metrics: list[dict[str, Any]]) -> list[Block]:
    if not any(series(metrics, "expert_load")[1]):
        return [Note("No expert load in metrics.jsonl (a dense model, or no metrics).", missing=True)]
    try:
        figure = expert_load_figure(metrics)
    except ValueError as error:
        return [Note(plain(str(error)), missing=True)]
    return [
        picture(figure, "expert load over time"),
        Note("Share of the tokens routed to each expert; dark blue marks an idle expert."),
    ]


def level_scores(report: dict[str, Any]) -> dict[str, dict[str, Score]]:
    """By level of a results file: the scores of the model and of the heuristics."""
    levels = {}
    for task, metrics in report["results"].items():
        match = LEVEL.fullmatch(task)
        if not match:
            continue
        for table, keys in ((metrics, LEVEL_METRICS), (report["baselines"][task], LEVEL_GUESSES)):
            for key in keys:
                if key not in table:
                    raise ValueError(f"lacks {key} of {task}: run eval/causal_loop.py again")
        scores = {}
        for name in ("trace", "direct"):
            stderr = metrics[f"exact_match_stderr,{name}"]
            scores[name] = Score(metrics[f"exact_match,{name}"], None if stderr == "N/A" else stderr)
        scores |= {name: Score(**report["baselines"][task][name]) for name in LEVEL_GUESSES}
        levels[match.group(1)] = scores
    return levels


def newest_causal_loop(reports: dict[Path, dict[str, Any]]) -> Path | None:
    """The newest results file, the last, that has causal-loop levels. Raises ValueError for a damaged one."""
    for path, report in reversed(reports.items()):
        try:
            if level_scores(report):
                return path
        except ValueError as error:
            raise ValueError(f"{path} {error}") from None
    return None


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


def accuracy_section(reports: dict[Path, dict[str, Any]]) -> list[Block]:
    path = newest_causal_loop(reports)
    if path is None:
        said = "No causal-loop results in eval/: eval/causal_loop.py --output_path RUN/eval writes them."
        return [Note(plain(said), missing=True)]
    levels = level_scores(reports[path])
    bars = {
        label: [scores[name] for scores in levels.values()]
        for name, label in zip(("trace", "direct", "majority", "one_step"), LEVEL_HEADER[2:], strict=True)
    }
    return [
        picture(accuracy_figure([f"level {level}" for level in levels], bars), "accuracy per level"),
        Table(LEVEL_HEADER, level_rows(reports[path])),
        Note(f"From {plain(path.name)}, held-out programs."),
    ]


def traces_section(title: str, reports: dict[Path, dict[str, Any]]) -> Section:
    """A few right and wrong programs of the newest samples file, each with the model's own trace."""
    paths = (samples_file(path, "causal_loop") for path in reversed(reports))
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        said = "No samples_causal_loop_*.jsonl in eval/: eval/causal_loop.py --log_samples writes them."
        return Section(title, [Note(plain(said), missing=True)])
    traces, problems = read_traces(path)
    parts = []
    for value, label in ((1.0, "right"), (0.0, "wrong")):
        chosen = [trace for trace in traces if trace.right == value]
        blocks: list[Block] = []
        # Spread over the file, since its levels alternate.
        for trace in chosen[:: max(1, len(chosen) // TRACES)][:TRACES]:
            text = f"{trace.prompt}{trace.resps['trace']}\n\nExpected: {trace.answer}"
            blocks += [Note(f"Level {trace.level}"), Code(text, label)]
        title_of_part = f"{label.capitalize()} ({len(chosen)} of {len(traces)})"
        parts.append(Section(title_of_part, blocks or [Note("None.")]))
    return Section(title, [Note(plain(problem), missing=True) for problem in problems], parts)


def results_section(title: str, reports: dict[Path, dict[str, Any]]) -> Section:
    if not reports:
        return Section(title, [Note(plain("No results_*.json in eval/."), missing=True)])
    tables = {
        path.name: [tuple(plain(cell) for cell in row) for row in table_rows(report)]
        for path, report in reports.items()
    }
    return Section(
        title, parts=[Section(plain(name), [Table(TABLE_HEADER, rows)]) for name, rows in tables.items()]
    )


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders or results files")
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE", help="the page to write"
    )
    args = parser.parse_args()
    show_any_text()
    with user_errors(*USER_ERRORS):
        runs, left_out = read_runs(args.runs)
        write_page(args.out, build_page(runs))
        newest = newest_causal_loop(runs[0].reports)
        if len(runs) > 1:
            print(format_table(RUN_HEADER, [run_row(run) for run in runs]))
        elif newest is not None:
            print(format_table(LEVEL_HEADER, level_rows(runs[0].reports[newest])))
        for line in [*left_out, *(problem for run in runs for problem in run.problems)]:
            print(line)
        print(f"written: {args.out}")


def write_page(path: Path, page: str) -> None:
    """Whole or not at all; what UTF-8 cannot hold as `?`.

    Raises OSError for a full disk; ValueError for a path that is something else than a file, and while
    another process writes it.
    """
    target = path.resolve()  # of a link, which stays
    if target.exists() and not target.is_file():
        raise ValueError(f"--out {path} is not a file: name another")
    with FolderLock(target.parent, "eval/report.py", "choose another --out", name=f".{target.name}.lock"):
        write_file(target, page.encode("utf-8", "replace"))


if __name__ == "__main__":
    main()
