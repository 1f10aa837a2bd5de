"""The report's sections about scores: tables and figures for one run or several."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from common.pages import Block, Note, Section, Table, plain
from eval.babi import is_failed
from eval.reports.comparisons import (
    GUESS_STYLES,
    Curve,
    Curves,
    Guesses,
    Point,
    bars_figure,
    curves_figure,
    published_figure,
)
from eval.reports.figures import picture
from eval.reports.runs import MAIN_METRICS, Result, Run
from eval.scoring.core import Score
from model import ModelConfig
from model.counts import flops_per_token

PUBLISHED = Path(__file__).with_name("published.json")
Panels = dict[str, tuple[Curves, Guesses]]


def show(score: Score | None, form: str = ".3f") -> str:
    """`0.345 ± 0.012`; a dash for no score."""
    if score is None:
        return "–"
    return format(score.value, form) + ("" if score.stderr is None else f" ± {score.stderr:{form}}")


def score_table(runs: Sequence[Run]) -> list[Block]:
    """Every metric of the whole tasks at the default depth, one column per run, and what guessing reaches."""
    rows: dict[tuple[str, int, str], dict[str, Result]] = {}
    for run in runs:
        for result in run.top_results():
            for key in result.metrics:
                rows.setdefault((result.task, result.num_fewshot, key), {})[run.name] = result
    if not rows:
        return [Note(plain("No scores: eval/run.py --output_path RUN/eval writes them."), missing=True)]
    tasks = list(dict.fromkeys(task for task, _, _ in rows))
    lines = []
    for (task, shots, key), found in sorted(
        rows.items(), key=lambda row: (tasks.index(row[0][0]), row[0][1])
    ):
        one = next(iter(found.values()))
        # As in the table of eval/run.py: guesses for the first metric and where higher is better.
        guesses = dict(one.baselines) if key == next(iter(one.metrics)) or key in one.rising else {}
        chance, majority = (show(guesses.pop(kind, None)) for kind in ("chance", "majority"))
        lines.append(
            (
                plain(task),
                plain(key.removesuffix(",none")),
                str(shots),
                "/".join(dict.fromkeys(str(result.num_documents) for result in found.values())),
                *(show(found[run.name].metrics[key] if run.name in found else None) for run in runs),
                chance,
                majority,
                ", ".join(f"{plain(kind)} {show(score)}" for kind, score in guesses.items()),
            )
        )
    names = [plain(run.name) for run in runs]
    return [
        Table(("task", "metric", "shots", "n", *names, "chance", "majority", "other guesses"), lines),
        Note("± one standard error. chance: guessing at random; majority: always the most common answer."),
    ]


def by_task(runs: Sequence[Run]) -> list[Block]:
    """Bars of the whole tasks at each model's default depth; empty for fewer than two tasks."""
    return _bars([_accuracies(run.plain_results()) for run in runs], runs, "accuracy by task", at_least=2)


def by_difficulty(title: str, runs: Sequence[Run], left_out: Sequence[str] = ()) -> Section:
    """Bars for each task that has parts: bAbI's tasks, levels, subjects."""
    groups = dict.fromkeys(r.group for run in runs for r in run.results if r.group not in (None, *left_out))
    sections = []
    for group in groups:
        parts = [
            {
                name.removeprefix(f"{group}_"): result
                for name, result in _accuracies(
                    r for r in run.results if r.group == group and r.is_own_depth
                ).items()
            }
            for run in runs
        ]
        sections.append(Section(plain(str(group)), _bars(parts, runs, f"accuracy of the parts of {group}")))
    return Section(title, parts=sections)


def _accuracies(results: Iterable[Result]) -> dict[str, Result]:
    """Results with an accuracy, by their label in the figure, which names the shots where they differ."""
    chosen = [result for result in results if result.accuracy is not None]
    several = {
        r.task
        for r in chosen
        for other in chosen
        if r.task == other.task and r.num_fewshot != other.num_fewshot
    }
    return {r.task + (f"\n{r.num_fewshot} shots" if r.task in several else ""): r for r in chosen}


def _bars(
    results: Sequence[dict[str, Result]], runs: Sequence[Run], what: str, at_least: int = 1
) -> list[Block]:
    groups = list(dict.fromkeys(name for found in results for name in found))
    if len(groups) < at_least:
        return []
    bars = {
        run.label: [found[name].accuracy if name in found else None for name in groups]
        for run, found in zip(runs, results, strict=True)
        if found
    }
    guesses = [next(found[name].baselines for found in results if name in found) for name in groups]
    return [picture(bars_figure(groups, bars, guesses), what)]


def by_depth(runs: Sequence[Run]) -> list[Block]:
    """Test-time scaling: accuracy against the loop steps of an answer, as a figure and a table."""
    panels: Panels = {}
    rows = []
    for number, run in enumerate(runs):
        for panel, results in _several(run.results, lambda r: r.num_steps):
            points = [
                Point(r.steps, r.accuracy, r.num_steps == "adaptive")
                for r in results
                if r.steps and r.accuracy
            ]
            _add(panels, panel, (number, run), points, results[0].baselines)
            for r in results:
                own = " (own)" if r.is_own_depth else ""
                measured = "–" if r.mean_steps is None else f"{r.mean_steps:.2f}"
                rows.append(
                    (plain(panel), plain(run.name), plain(f"{r.num_steps}{own}"), measured, show(r.accuracy))
                )
    if not panels:
        return []
    order = [plain(panel) for panel in panels]
    rows.sort(key=lambda row: order.index(row[0]))
    figure = curves_figure(panels, "loop steps per answer", log=True)
    header = ("task", "run", "depth", "mean steps", "accuracy")
    return [picture(figure, "accuracy against loop steps"), Table(header, rows)]


def by_shots(runs: Sequence[Run]) -> list[Block]:
    """The few-shot curve at the models' default depth."""
    panels: Panels = {}
    for number, run in enumerate(runs):
        families: dict[str, dict[int, Result]] = {}
        for result in run.top_results():
            families.setdefault(result.task, {})[result.num_fewshot] = result
        for task, family in families.items():
            points = [Point(shots, r.accuracy) for shots, r in family.items() if r.accuracy is not None]
            if len(points) > 1:
                _add(panels, task, (number, run), points, next(iter(family.values())).baselines)
    if not panels:
        return []
    figure = curves_figure(panels, "examples in the prompt")
    return [picture(figure, "accuracy against examples in the prompt")]


def votes_against_steps(runs: Sequence[Run]) -> list[Block]:
    """Two ways to spend compute at test time, against their cost: more samples that vote, or more loop steps.

    A cost of 1 is one answer at the model's default depth, in FLOPs per token with attention over the whole
    context.
    """
    panels: Panels = {}
    for number, run in enumerate(runs):
        for result in run.top_results():
            if result.vote is None or run.model is None:
                continue
            panel = _panel(result)
            cost = result.num_samples * _cost(run.model, result)
            votes = [Point(cost, result.vote)]
            _add(panels, panel, (number, run), votes, result.baselines, "majority vote", dashed=True)
            if f"{run.label}, loop steps" not in panels[panel][0]:
                others = {r.num_steps: r for r in run.results if _panel(r) == panel}.values()
                deeper = [
                    Point(_cost(run.model, r), r.accuracy, r.num_steps == "adaptive")
                    for r in others
                    if r.accuracy
                ]
                _add(panels, panel, (number, run), deeper, {}, "loop steps")
    if not panels:
        return []
    figure = curves_figure(panels, "FLOPs, in answers at the default depth", log=True)
    said = "A vote costs one answer per sample; a loop step costs what it adds to every token."
    return [picture(figure, "majority vote and loop steps at equal cost"), Note(said)]


def _cost(model: ModelConfig, result: Result) -> float:
    """FLOPs per token at the result's steps, relative to the model's default depth."""
    length, own = model.max_position_embeddings, model.recurrence.num_steps
    one, two = (flops_per_token(model, length, n) for n in (1, 2))
    steps = own if result.steps is None else result.steps
    return (one + (steps - 1) * (two - one)) / (one + (own - 1) * (two - one))


def during_training(runs: Sequence[Run]) -> list[Block]:
    """Scores of the `eval` lines of metrics.jsonl against tokens, and how many evaluations failed."""
    panels: Panels = {}
    failures = []
    for number, run in enumerate(runs):
        evaluations = [line for line in run.metrics if "eval" in line]
        failed = [line for line in run.metrics if "eval_failed" in line]
        failures += [f"{run.name}, step {line['step']}: {line['eval_failed']}" for line in failed]
        for line in evaluations:
            for task, scores in line["eval"].items():
                key = next((key for key in MAIN_METRICS if key in scores), None)
                if key is not None:
                    metric, filter_name = key.split(",")
                    score = Score(scores[key], scores.get(f"{metric}_stderr,{filter_name}"))
                    _add(panels, task, (number, run), [Point(line.get("tokens") or line["step"], score)], {})
    blocks: list[Block] = []
    if panels:
        figure = curves_figure(panels, "tokens trained on", whole=False)
        blocks.append(picture(figure, "accuracy against tokens"))
    return blocks + [Note(plain(f"Evaluation failed: {failure}"), missing=True) for failure in failures]


def against_published(title: str, runs: Sequence[Run]) -> Section:
    """Our scores and published scores of small models, each with its source."""
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    own: dict[str, list[tuple[str, Score, int | None]]] = {}
    chance: dict[str, float] = {}
    for number, run in enumerate(runs):
        for result in run.plain_results():
            if result.accuracy is not None and result.main is not None:
                metric, filter_name = result.main.split(",")
                kind = metric if filter_name == "none" else filter_name
                label = _label(run.label, kind, result.num_fewshot)
                own.setdefault(result.task, []).append((label, result.accuracy, number))
                chance[result.task] = result.baselines.get("chance", Score(0.0)).value
    panels: dict[str, list[tuple[str, Score, int | None]]] = {}
    rows = []
    for model in published["models"]:
        for score in model["scores"]:
            task = score["task"]
            if task in own:
                label = _label(model["model"], score["metric"], score["num_fewshot"])
                panels.setdefault(task, list(own[task])).append((label, Score(score["value"] / 100), None))
                metric, shots = score["metric"] or "–", score["num_fewshot"]
                rows.append(
                    (
                        task,
                        model["model"],
                        metric,
                        "–" if shots is None else str(shots),
                        str(score["value"]),
                        source_of(model),
                    )
                )
    blocks: list[Block] = []
    if panels:
        rows.sort(key=lambda row: list(panels).index(row[0]))
        blocks.append(picture(published_figure(panels, chance), "published small models and ours"))
        shown = [tuple(plain(cell) for cell in row) for row in rows]
        blocks.append(Table(("task", "model", "metric", "shots", "percent", "source"), shown))
    babi = babi_section(runs, published["babi"])
    parts = [] if babi.empty else [babi]
    if blocks or parts:
        said = f"{published['note']} Prompts, shots and scoring differ between sources."
        blocks.append(Note(plain(said)))
    return Section(title, blocks, parts)


def babi_section(runs: Sequence[Run], published: Sequence[dict[str, Any]]) -> Section:
    """Mean error over the 20 tasks, and tasks failed; empty unless a run has all 20."""
    rows = []
    for run in runs:
        tasks = [
            (1 - result.accuracy.value, result.num_documents)
            for result in run.results
            if result.group == "babi" and result.is_own_depth and result.accuracy is not None
        ]
        if len(tasks) == 20:
            failed = sum(is_failed(round(error * n), n) for error, n in tasks)
            mean = sum(error for error, _ in tasks) / 20
            rows.append((run.name, f"{100 * mean:.2f}", str(failed), "this report"))
    title = "bAbI, 20 tasks"
    if not rows:
        return Section(title)
    rows += [
        (row["model"], f"{row['mean_error']:g}", str(row["failed"]), source_of(row)) for row in published
    ]
    header = ("model", "mean error, percent", "tasks failed (error above 5%)", "source")
    return Section(title, [Table(header, [tuple(plain(cell) for cell in row) for row in rows])])


def _label(name: str, metric: str | None, shots: int | None) -> str:
    known = [metric or "", "" if shots is None else f"{shots}-shot"]
    text = ", ".join(filter(None, known))
    return f"{name} ({text})" if text else name


def source_of(entry: dict[str, Any]) -> str:
    source: str = entry["source"]
    return source if entry["checked"] else f"{source} (not checked)"


def _panel(result: Result) -> str:
    return result.task + (f", {result.num_fewshot}-shot" if result.num_fewshot else "")


def _several(results: Sequence[Result], varied: Callable[[Result], Any]) -> list[tuple[str, list[Result]]]:
    """Whole tasks with results at two or more values of `varied`, at equal shots and votes."""
    families: dict[tuple[str, int], dict[Any, Result]] = {}
    for result in results:
        if result.group is None and result.accuracy is not None:
            families.setdefault((_panel(result), result.num_samples), {})[varied(result)] = result
    return [(panel, list(family.values())) for (panel, _), family in families.items() if len(family) > 1]


def _add(
    panels: Panels,
    task: str,
    run: tuple[int, Run],
    points: Sequence[Point],
    guesses: Guesses,
    what: str = "",
    dashed: bool = False,
) -> None:
    """Adds points to a run's curve in a panel; `what` tells two curves of one run apart."""
    curves, known = panels.setdefault(task, ({}, {}))
    label = run[1].label + (f", {what}" if what else "")
    curves.setdefault(label, Curve(run[0], [], dashed)).points.extend(points)
    known.update({kind: score for kind, score in guesses.items() if kind in GUESS_STYLES})
