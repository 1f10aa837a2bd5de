"""One self-contained HTML page about a run: budget, loss, expert load, scores, sample traces.

python eval/report.py --run runs/NAME --out runs/NAME/report.html

Reads config.yaml, metrics.jsonl, export/config.json and eval/ in the run folder. What is not there is named
on the page.
"""

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.errors import user_errors
from eval.cli import USER_ERRORS, Parser
from eval.core import Score
from eval.figures import accuracy_figure, expert_load_figure, loss_figure, series, to_html
from eval.results import TABLE_HEADER, format_table, table_rows
from model import ModelConfig

LEVEL = re.compile(r"causal_loop_level(\d+)")
LEVEL_HEADER = ("level", "n", "with trace", "without trace", "majority", "one step")
BUDGET_KEYS = ("max_steps", "global_batch_size", "sequence_length", "seed")  # looked for in config.yaml
TRACES = 3  # right ones and wrong ones shown, this many of each

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a202c }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { margin-bottom: 0 } h2 { border-bottom: 1px solid #e2e8f0; margin-top: 2.2rem }
table { border-collapse: collapse; font-size: .88rem; margin: .6rem 0 }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #e2e8f0; text-align: left } th { background: #f7fafc }
img { max-width: 100% } pre { background: #f7fafc; padding: .6rem; overflow-x: auto; white-space: pre-wrap }
.missing { color: #975a16; background: #fffff0; border-left: 4px solid #ecc94b; padding: .3rem .8rem }
.right { border-left: 4px solid #38a169 } .wrong { border-left: 4px solid #e53e3e }
.note { color: #718096; font-size: .9rem }
"""


def read_reports(run: Path) -> dict[Path, dict[str, Any]]:
    """The results files of a run, oldest first. Raises ValueError if there is no such run, or a bad file."""
    if not run.is_dir():
        raise ValueError(f"no run folder {run}: --run takes the output_dir of a training run")
    return {path: read_json(path) for path in sorted((run / "eval").glob("results_*.json"))}


def build_page(run: Path, reports: dict[Path, dict[str, Any]]) -> str:
    """The page as text. Raises ValueError if a file of the run is damaged."""
    metrics = read_json_lines(run / "metrics.jsonl")
    name = html.escape(run.resolve().name)
    sections = [
        f"<h1>{name}</h1><p class='note'>ZeroModel run report</p>",
        "<h2>Run</h2>" + run_section(run, metrics),
        "<h2>Loss</h2>" + loss_section(metrics),
        "<h2>Expert load</h2>" + expert_section(metrics),
        "<h2>Causal-loop accuracy</h2>" + accuracy_section(reports),
        "<h2>Sample traces</h2>" + traces_section(run),
        "<h2>All results</h2>" + results_section(reports),
    ]
    head = f"<meta charset='utf-8'><title>{name}</title><style>{STYLE}</style>"
    return f"<!DOCTYPE html><html lang='en'><head>{head}</head><body>{''.join(sections)}</body></html>\n"


def missing(text: str) -> str:
    return f"<p class='missing'>{html.escape(text)}</p>"


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(header, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def run_section(run: Path, metrics: list[dict[str, Any]]) -> str:
    """Sizes from the exported config, budget from the resolved config, what was reached from the metrics."""
    rows: list[tuple[str, str]] = []
    notes = []
    config_path, model_path = run / "config.yaml", run / "export" / "config.json"
    if model_path.is_file():
        config = ModelConfig.from_dict(read_json(model_path))
        rows += [
            ("parameters", f"{config.num_parameters():,}"),
            ("parameters active per token", f"{config.num_parameters(active=True):,}"),
            ("recurrence", f"{config.recurrence.placement}, {config.recurrence.num_steps} steps"),
        ]
    else:
        notes.append(missing("Model sizes: export/config.json is not there (the run has not exported yet)."))
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
    return to_html(expert_load_figure(metrics), "expert load over time") + (
        "<p class='note'>Share of the tokens that each expert got; dark blue is an idle expert.</p>"
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

    def show(score: Score) -> str:
        return f"{score.value:.3f}" + ("" if score.stderr is None else f" ± {score.stderr:.3f}")

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
    note = f"<p class='note'>From {html.escape(path.name)}, held-out programs.</p>"
    return picture + html_table(LEVEL_HEADER, level_rows(reports[path])) + note


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


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError, naming the file, if it is not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): delete it or write it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, an object is needed")
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """One object a line; none if there is no file. Raises ValueError, naming file and line, for a bad one."""
    if not path.is_file():
        return []
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise ValueError(f"{path} line {number} is not JSON ({error}): mend or remove the line") from None
    return lines


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run folder, runs/NAME")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page to write")
    args = parser.parse_args()
    with user_errors(*USER_ERRORS):
        reports = read_reports(args.run)
        args.out.write_text(build_page(args.run, reports), encoding="utf-8")
        newest = newest_causal_loop(reports)
        if newest is not None:
            print(format_table(LEVEL_HEADER, level_rows(reports[newest])))
        print(f"written: {args.out}")


if __name__ == "__main__":
    main()
