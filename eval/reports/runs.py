"""Reads run folders and results files into runs with their results."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from common.pages import printable
from common.result_files import results_files
from eval.looping.measures import unrolled_parameters
from eval.reports.comparisons import shortened
from eval.reports.files import read_json, read_metrics, read_results_file
from eval.scoring.core import Score
from model import ModelConfig, ZeroModel

# The metric plotted for a task: the first of these that it has, else its first metric where higher is better.
MAIN_METRICS = (
    "acc_norm,none",
    "acc,none",
    "exact_match,strict-match",
    "exact_match,stripped",
    "exact_match,none",
    "exact_match,trace",
)
THOUGHTS = "thoughts_"  # prefix of the results of eval/thoughts.py, which have their own section
MAX_LAYERS = 10_000  # of a model whose sizes are counted, layer by layer
PARTS_OF_A_RUN = ("metrics.jsonl", "config.yaml", "export", "eval")


@dataclass(frozen=True)
class Result:
    """One task at one depth and number of shots, from a results file."""

    task: str  # plain name
    group: str | None  # the task it is a part of
    metrics: dict[str, Score]  # by "metric,filter", in the file's order
    rising: tuple[str, ...]  # the metrics where higher is better
    main: str | None  # the metric to plot; None: the task has no accuracy
    baselines: dict[str, Score]  # what guessing reaches
    num_documents: int
    num_fewshot: int
    num_steps: int | str | None  # loop steps, "adaptive", or None without recurrence
    is_own_depth: bool  # num_steps is the model's default
    is_plain: bool  # default depth, and the task's own shots or the command's
    mean_steps: float | None  # loop steps per answer
    num_samples: int  # answers that vote; 0: no vote

    @property
    def accuracy(self) -> Score | None:
        return None if self.main is None else self.metrics[self.main]

    @property
    def steps(self) -> float | None:
        """Loop steps per answer: measured, else requested."""
        asked = self.num_steps if isinstance(self.num_steps, int) else None
        return asked if self.mean_steps is None else self.mean_steps

    @property
    def vote(self) -> Score | None:
        """Accuracy of the majority vote; None without one."""
        return self.metrics.get(f"exact_match,maj@{self.num_samples}")


@dataclass(frozen=True)
class Run:
    """A run folder, or a results file without one."""

    name: str
    folder: Path | None
    metrics: list[dict[str, Any]]  # lines of metrics.jsonl
    reports: dict[Path, dict[str, Any]]  # results files, oldest first
    results: list[Result]  # of all reports; the newest where settings are equal
    model: ModelConfig | None
    model_problem: str | None = None  # why `model` is None
    problems: Sequence[str] = ()  # a line for each that could not be used of metrics.jsonl
    short_name: str = ""  # in legends; different for each run of a report

    @property
    def label(self) -> str:
        return self.short_name or shortened(self.name)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that record optimizer steps."""
        return [line for line in self.metrics if "eval" not in line and "eval_failed" not in line]

    def top_results(self) -> list[Result]:
        """Results of whole tasks at the model's default depth."""
        return [r for r in self.results if r.group is None and r.is_own_depth]

    def plain_results(self) -> list[Result]:
        """Results of whole tasks at their default depth and shots; of several votes the newest."""
        return list({(r.task, r.num_fewshot): r for r in self.top_results() if r.is_plain}.values())

    def unrolled_parameters(self) -> int | None:
        """Parameters if every loop step had its own weights; None if the model is unknown or cannot exist."""
        if self.model is None:
            return None
        try:
            with torch.device("meta"):
                return unrolled_parameters(ZeroModel(self.model), self.model.recurrence.num_steps)
        except (RuntimeError, OverflowError, TypeError):  # a tensor of more elements than 64 bits can count
            return None


def read_runs(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs at these paths, and a line for each path that holds none.

    Raises ValueError if a path does not exist, a file of a run is damaged, or there is no run at all.
    """
    runs, left_out = [], []
    for path in paths:
        if not path.exists():
            raise ValueError(
                f"{path} does not exist: give the output_dir of a training run or a results file"
            )
        run = _read_folder(path, alone=len(paths) == 1) if path.is_dir() else _read_file(path)
        if run is None:
            left_out.append(f"left out: {path} is neither a run folder nor a results file")
        else:
            runs.append(run)
    if not runs:
        raise ValueError(f"{left_out[0].removeprefix('left out: ')}: give a training run's output_dir")
    return _with_different_names(runs), left_out


def _read_folder(folder: Path, alone: bool) -> Run | None:
    if not alone and not any((folder / part).exists() for part in PARTS_OF_A_RUN):
        return None
    reports = {path: read_results_file(path) for path in results_files(folder / "eval")}
    model, problem = _read_model(folder / "export" / "config.json")
    metrics, problems = read_metrics(folder / "metrics.jsonl")
    results = newest_results(reports.values())
    name = printable(folder.resolve().name)
    return Run(name, folder, metrics, reports, results, model, problem, problems)


def _read_file(path: Path) -> Run | None:
    if path.suffix != ".json" or "results" not in read_json(path):
        return None
    report, folder = read_results_file(path), path.resolve().parent
    name = printable(folder.parent.name if folder.name == "eval" else folder.name)
    return Run(name, None, [], {path: report}, newest_results([report]), None)


def _read_model(path: Path) -> tuple[ModelConfig | None, str | None]:
    if not path.is_file():
        return None, "export/config.json is missing (the run has not exported yet)."
    values = read_json(path)
    try:
        model = ModelConfig.from_stored(values)
    except ValueError as error:  # of an older version; its scores are still worth showing
        return None, f"export/config.json cannot be read: {error}"
    if model.num_hidden_layers > MAX_LAYERS:
        return None, f"export/config.json has {model.num_hidden_layers:,} layers, more than {MAX_LAYERS:,}."
    return model, None


def _with_different_names(runs: list[Run]) -> list[Run]:
    names, labels = set[str](), set[str]()
    renamed = []
    for run in runs:
        name = _different(run.name, names)
        renamed.append(replace(run, name=name, short_name=_different(shortened(name), labels)))
    return renamed


def _different(name: str, taken: set[str]) -> str:
    """`name`, or with the first number from 2 that makes it differ from all before."""
    counted = (name if n == 1 else f"{name} ({n})" for n in count(1))
    found = next(one for one in counted if one not in taken)
    taken.add(found)
    return found


def newest_results(reports: Iterable[dict[str, Any]]) -> list[Result]:
    """All results except eval/thoughts.py's, by first appearance; the last one where settings are equal."""
    found: dict[tuple[Any, ...], Result] = {}
    for report in reports:
        for result in read_results(report):
            if not result.task.startswith(THOUGHTS):
                found[result.task, result.num_steps, result.num_fewshot, result.num_samples] = result
    return list(found.values())


def read_results(report: dict[str, Any]) -> list[Result]:
    """The entries of one results file. Raises ValueError if it lacks one of lm-eval's fields."""
    try:
        parents = {
            part: _config(report, name).get("task", name)
            for name, parts in report["group_subtasks"].items()
            for part in parts
        }
        return [_read_result(report, name, parents.get(name)) for name in report["results"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"a results file lacks a field that eval/run.py writes ({error!r}): evaluate again"
        ) from None


def _config(report: dict[str, Any], name: str) -> dict[str, Any]:
    config: dict[str, Any] = report["configs"][name]
    return config


def _read_result(report: dict[str, Any], name: str, group: str | None) -> Result:
    entry, config = report["results"][name], _config(report, name)
    task, num_steps = config.get("task", name), _num_steps(entry, None)
    own = _num_steps(report["results"].get(task, {}), report["config"].get("num_steps"))
    metrics = {}
    for key, value in entry.items():
        metric, _, filter_name = key.partition(",")
        if filter_name and not metric.endswith("_stderr"):
            stderr = entry[f"{metric}_stderr,{filter_name}"]
            metrics[key] = Score(value, None if stderr == "N/A" else stderr)
    higher = report["higher_is_better"][name]
    rising = tuple(key for key in metrics if higher[key.split(",")[0]])
    return Result(
        task=task,
        group=group,
        metrics=metrics,
        rising=rising,
        main=next((key for key in MAIN_METRICS if key in rising), next(iter(rising), None)),
        baselines={kind: Score(**score) for kind, score in report["baselines"][name].items()},
        num_documents=report["n-samples"][name]["effective"],
        num_fewshot=report["n-shot"][name],
        num_steps=num_steps,
        is_own_depth=num_steps is None or num_steps == own,
        is_plain=name == task,
        mean_steps=entry.get("mean_steps"),
        num_samples=config.get("num_samples", 0),
    )


def _num_steps(entry: dict[str, Any], unknown: Any) -> Any:
    """Loop steps of an entry of `results`, which older files call `depth`."""
    return entry.get("num_steps", entry.get("depth", unknown))
