"""The report's section about latent chain of thought: what eval/thoughts.py measured, by run and seed.

Runs whose names differ only in a final number, such as kava-0 and kava-1, are seeds of one method.
"""

import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, get_type_hints

from matplotlib.figure import Figure

from common.pages import Block, Note, Section, Table, plain
from common.schema import as_type
from eval.reports.comparisons import (
    RUN_COLORS,
    Curve,
    Curves,
    Guesses,
    Point,
    color_of,
    curves_figure,
    label_of,
)
from eval.reports.figures import picture
from eval.reports.runs import THOUGHTS, Result, Run, read_results
from eval.reports.scores import PUBLISHED, show, source_of
from eval.scoring.core import Score
from eval.thinking.answers import Way
from model import ModelConfig

SEED = re.compile(r"-\d+$")
_WAY = {name: kind | None for name, kind in get_type_hints(Way).items()}
ALONE = "latency_seconds,batch=1"


@dataclass
class Measured:
    """One way to answer, of one run."""

    score: Score
    num_questions: int
    costs: dict[str, float]  # mean of each "metric,none" that is not an accuracy, and latencies
    by_depth: dict[int, Score]  # by problem depth
    guesses: Guesses


@dataclass(frozen=True)
class Arm:
    """A method on one task: its runs, one per seed."""

    name: str
    trained: str  # steps and tokens of each run
    own: Way  # how its runs answer by default
    ways: dict[Way, list[Measured]]  # one entry per seed

    @property
    def seeds(self) -> int:
        return len(self.ways[self.own])

    @property
    def label(self) -> str:
        return self.name + (f" ({self.seeds} seeds)" if self.seeds > 1 else "")

    def control(self, replace: str) -> list[Measured]:
        """The same runs with their latents replaced; [] if that was not measured."""
        return self.ways.get(self.own._replace(replace=replace), [])

    def swept(self, *names: str) -> dict[Way, list[Measured]]:
        """Its default way and those that differ only in these fields, in rising order."""

        def rest(way: Way) -> dict[str, Any]:
            return {name: value for name, value in way._asdict().items() if name not in names}

        found = {way: seeds for way, seeds in self.ways.items() if rest(way) == rest(self.own)}
        return dict(sorted(found.items(), key=lambda item: [getattr(item[0], name) or 0 for name in names]))


class TitledTable(NamedTuple):
    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def read_arms(runs: Sequence[Run]) -> dict[str, list[Arm]]:
    """The methods by task, in the order of the runs.

    Raises:
        ValueError: a results file lacks what eval/thoughts.py writes.
    """
    groups: dict[str, dict[str, list[tuple[Run, dict[Way, Measured]]]]] = {}
    for run in runs:
        for task, ways in read_measured(run).items():
            groups.setdefault(task, {}).setdefault(SEED.sub("", run.name), []).append((run, ways))
    return {
        task: [_arm(name, members) for name, members in methods.items()] for task, methods in groups.items()
    }


def read_measured(run: Run) -> dict[str, dict[Way, Measured]]:
    """By task; where a way was measured twice the later one counts."""
    found: dict[str, dict[Way, Measured]] = {}
    for report in run.reports.values():
        for name, result in zip(report["results"], read_results(report), strict=True):
            if not name.startswith(THOUGHTS):
                continue
            # Files written before these two could be chosen lack them.
            config = {"kv_lambda": None, "kv_window": None, **report["configs"][name]}
            try:
                task = as_type(str, config["problem_set"], "problem_set")
                depth = as_type(int | None, config["problem_depth"], "problem_depth")
                given = {field: as_type(kind, config[field], field) for field, kind in _WAY.items()}
                way = Way(**{field: value for field, value in given.items() if value is not None})
                score = result.metrics["acc,none"]
                if depth is None:  # the whole comes before its parts
                    found.setdefault(task, {})[way] = _measured(result, score)
                else:
                    found[task][way].by_depth[depth] = score
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"a results file of {run.name} lacks {error} of {name}: run eval/thoughts.py again"
                ) from None
            except ValueError as error:
                raise ValueError(
                    f"a results file of {run.name}: {error} of {name}: run eval/thoughts.py again"
                ) from None
    return found


def _measured(result: Result, score: Score) -> Measured:
    costs = {key: metric.value for key, metric in result.metrics.items() if key not in result.rising}
    return Measured(score, result.num_documents, costs, {}, result.baselines)


def _arm(name: str, members: Sequence[tuple[Run, dict[Way, Measured]]]) -> Arm:
    ways: dict[Way, list[Measured]] = {}
    for _, measured in members:
        for way, one in measured.items():
            ways.setdefault(way, []).append(one)
    run = members[0][0]
    own = next((way for way in ways if _is_own(way, run.model)), next(iter(ways)))
    steps = run.steps
    trained = "unknown"
    if steps and steps[-1].get("tokens") is not None:
        trained = f"{steps[-1]['step']:,} steps, {steps[-1]['tokens']:,} tokens"
    return Arm(name, trained, own, ways)


def _is_own(way: Way, model: ModelConfig | None) -> bool:
    if way != Way(way.mode, way.num_latents, way.num_iterations, kv_buffer=way.kv_buffer):
        return False
    if model is None or way.mode != "thoughts":
        return True
    settings = model.latent_cot
    return way[1:3] == (settings.num_latents, settings.iterations or None)


# ---- numbers over seeds


def over_seeds(scores: Sequence[Score]) -> Score:
    """One seed: its score with the standard error over questions. Several: mean, and its error over seeds."""
    if len(scores) == 1:
        return scores[0]
    values = [score.value for score in scores]
    return Score(statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5)


def accuracy(seeds: Sequence[Measured]) -> Score | None:
    return over_seeds([one.score for one in seeds]) if seeds else None


def cost(seeds: Sequence[Measured], key: str) -> float | None:
    """Mean over the seeds; None where it was not measured."""
    values = [one.costs[key] for one in seeds if key in one.costs]
    return statistics.mean(values) if values else None


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


# ---- tables


def tables(task: str, arms: Sequence[Arm]) -> list[TitledTable]:
    """All of one task; those without rows are left out."""
    found = [methods_table(arms), depth_table(arms), sweep_table(arms), published_table(task)]
    return [table for table in found if table.rows]


def methods_table(arms: Sequence[Arm]) -> TitledTable:
    """Each method, its controls at test time, and what an answer costs."""
    quality = ("accuracy", "shuffled", "zeroed")
    costs = ("forward passes", "cache bytes", "ms alone", "ms in a batch")
    rows = []
    for arm in arms:
        own = arm.ways[arm.own]
        batched = next((key for key in own[0].costs if key.startswith("latency") and key != ALONE), ALONE)
        seconds = (cost(own, key) for key in (ALONE, batched))
        rows.append(
            (
                arm.name,
                str(arm.seeds),
                str(own[0].num_questions),
                arm.trained,
                arm.own.mode,
                *(show(accuracy(m)) for m in (own, arm.control("shuffled"), arm.control("zeroed"))),
                _number(cost(own, "forward_passes,none"), ".1f"),
                _number(cost(own, "cache_bytes,none"), ",.0f"),
                *(_number(None if s is None else 1000 * s, ".1f") for s in seconds),
            )
        )
    return TitledTable(
        "Methods", ("method", "seeds", "n", "trained on", "answers by", *quality, *costs), rows
    )


def depth_table(arms: Sequence[Arm]) -> TitledTable:
    """Accuracy by problem depth, and what guessing reaches."""
    depths = sorted({depth for arm in arms for depth in arm.ways[arm.own][0].by_depth})
    if not depths:
        return TitledTable("", (), [])
    rows = [(arm.name, *(show(_at_depth(arm, depth)) for depth in depths)) for arm in arms]
    guesses = arms[0].ways[arms[0].own][0].guesses
    best = ", ".join(f"{kind} {score.value:.3f}" for kind, score in guesses.items())
    return TitledTable(f"By problem depth (guessing: {best})", ("method", *map(str, depths)), rows)


def _at_depth(arm: Arm, depth: int) -> Score | None:
    scores = [one.by_depth[depth] for one in arm.ways[arm.own] if depth in one.by_depth]
    return over_seeds(scores) if scores else None


def sweep_table(arms: Sequence[Arm]) -> TitledTable:
    """Every way that was measured, except the controls."""
    rows = []
    for arm in arms:
        for way, seeds in arm.ways.items():
            if way.replace is None and len(arm.ways) > 1:
                given = (way.num_latents, way.num_iterations, _budget(way))
                rows.append(
                    (
                        arm.name,
                        way.mode,
                        *("–" if value is None else str(value) for value in given),
                        show(accuracy(seeds)),
                        _number(cost(seeds, "forward_passes,none"), ".1f"),
                        _number(cost(seeds, "peak_cache_bytes,none"), ",.0f"),
                    )
                )
    header = ("method", "answers by", "latents", "iterations", "cache budget", "accuracy", "forward passes")
    return TitledTable("Other settings at test time", (*header, "largest cache, bytes"), rows)


def _budget(way: Way) -> str | None:
    """R-KV's budget, and its score where that is not the default."""
    if way.kv_budget is None:
        return None
    usual = Way(way.mode)
    others = [name for name in ("kv_lambda", "kv_window") if getattr(way, name) != getattr(usual, name)]
    return ", ".join([str(way.kv_budget), *(f"{name}={getattr(way, name)}" for name in others)])


def published_table(task: str) -> TitledTable:
    """Published GSM8K scores; no rows for other tasks."""
    rows: list[tuple[str, ...]] = []
    if task in ("gsm8k", "icot"):
        published = json.loads(PUBLISHED.read_text(encoding="utf-8"))["latent_chain_of_thought"]
        rows = [(row["model"], row["method"], f"{row['value']:g}", source_of(row)) for row in published]
    title = "Published: GSM8K, pretrained models fine-tuned on the 385 thousand problems of GSM8K-AUG"
    return TitledTable(title, ("model", "method", "accuracy, %", "source"), rows)


# ---- pictures


def figures(task: str, arms: Sequence[Arm]) -> dict[str, Figure]:
    """By name: accuracy by problem depth, by forward passes, and by each setting varied at test time."""
    guesses = arms[0].ways[arms[0].own][0].guesses
    n = f"{task}, n = {arms[0].ways[arms[0].own][0].num_questions}"
    found: dict[str, Figure] = {}
    for name, points, xlabel in (
        ("depth", _depth_points, "problem depth"),
        ("passes", _cost_point, "forward passes per answer"),
        ("iterations", partial(_varied_points, varied="num_iterations"), "iterations at test time"),
        ("latents", partial(_varied_points, varied="num_latents"), "latents at test time"),
    ):
        curves, mean = _curves(arms, points), name == "passes"  # not whole numbers
        if curves:
            panel = {n: (curves, guesses)}
            found[f"accuracy_by_{name}"] = curves_figure(panel, xlabel, log=mean, whole=not mean)
    swept = [arm for arm in arms if any(map(_sweeps_budget, arm.ways))]
    if swept:
        found["cache_budget"] = budget_figure(n, swept)
    return found


def _curves(arms: Sequence[Arm], points: Callable[[Arm], list[Point]]) -> Curves:
    """One line per arm; dashed where the colours repeat."""
    found = ((number, arm, points(arm)) for number, arm in enumerate(arms))
    return {
        arm.label: Curve(number, where, dashed=number >= len(RUN_COLORS))
        for number, arm, where in found
        if where
    }


def _depth_points(arm: Arm) -> list[Point]:
    scores = {depth: _at_depth(arm, depth) for depth in sorted(arm.ways[arm.own][0].by_depth)}
    return [Point(depth, score) for depth, score in scores.items() if score is not None]


def _cost_point(arm: Arm) -> list[Point]:
    """One point: the default way of answering."""
    seeds = arm.ways[arm.own]
    passes, score = cost(seeds, "forward_passes,none"), accuracy(seeds)
    return [] if passes is None or score is None else [Point(passes, score)]


def _varied_points(arm: Arm, varied: str) -> list[Point]:
    """Over the ways that differ only in this field; empty if there is only one."""
    ways = arm.swept(varied)
    found = ((getattr(way, varied), accuracy(seeds)) for way, seeds in ways.items() if len(ways) > 1)
    return [Point(x, score) for x, score in found if score is not None]


def _sweeps_budget(way: Way) -> bool:
    """Whether R-KV cuts its cache, by the default score."""
    usual = Way(way.mode)
    return bool(way.kv_budget) and (way.kv_lambda, way.kv_window) == (usual.kv_lambda, usual.kv_window)


def budget_figure(title: str, arms: Sequence[Arm]) -> Figure:
    """Accuracy, and the largest cache in bytes, against R-KV's budget; dotted: with the whole cache."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels: Any = figure.subplots(1, 2)
    for number, arm in enumerate(arms):
        ways = {way: m for way, m in arm.ways.items() if _sweeps_budget(way) and way.mode == arm.own.mode}
        ordered = sorted(ways.items(), key=lambda item: item[0].kv_budget or 0)
        budgets = [way.kv_budget for way, _ in ordered]
        scores = [over_seeds([one.score for one in seeds]) for _, seeds in ordered]
        sizes = [cost(seeds, "peak_cache_bytes,none") or 0 for _, seeds in ordered]
        whole = arm.ways[arm.own]
        color = color_of(number)
        panels[0].errorbar(
            budgets,
            [score.value for score in scores],
            yerr=[score.stderr or 0 for score in scores],
            marker="o",
            capsize=3,
            color=color,
            label=label_of(arm.label),
        )
        panels[1].plot(budgets, sizes, marker="o", color=color, label=label_of(arm.label))
        panels[0].axhline(over_seeds([one.score for one in whole]).value, color=color, linestyle=":")
        panels[1].axhline(cost(whole, "peak_cache_bytes,none") or 0, color=color, linestyle=":")
    panels[0].set(ylabel="accuracy ± standard error", ylim=(0, 1.05), title=label_of(title))
    panels[1].set(ylabel="largest cache of an answer, bytes", ylim=(0, None))
    for panel in panels:
        panel.set_xlabel("tokens of the answer kept (dotted: all)")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    return figure


def thoughts_section(title: str, runs: Sequence[Run]) -> Section:
    """Empty if eval/thoughts.py has measured none of the runs."""
    parts = []
    for task, arms in read_arms(runs).items():
        pictures: list[Block] = [picture(figure, name) for name, figure in figures(task, arms).items()]
        shown = [
            Section(plain(t.title), [Table(t.header, [tuple(map(plain, row)) for row in t.rows])])
            for t in tables(task, arms)
        ]
        parts.append(Section(plain(task), pictures, shown))
    if parts:
        said = (
            "± one standard error: for one seed over its questions, for several over the seeds. Shuffled: "
            "with another question's latents; zeroed: with latents of 0. A method that thinks in latents "
            "must lose accuracy with both."
        )
        parts[-1].parts.append(Section("Reading these tables", [Note(said)]))
    return Section(title, parts=parts)
