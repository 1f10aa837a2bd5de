"""What a task hands back, and how it is written: lm-eval's results and samples files, a table, a picture."""

import hashlib
import json
import math
import platform
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common.files import replacing, write_file
from common.pages import printable
from common.result_files import WRITTEN, new_results_file, picture_file, samples_file, written_now
from eval.scoring.core import Score, Scorer, mean_score
from model import ZeroModel

if TYPE_CHECKING:  # most tasks draw nothing
    from matplotlib.figure import Figure

TABLE_HEADER = ("task", "n", "shots", "filter", "metric", "value", "stderr", "to beat")


class Setting(NamedTuple):
    """Which point on the curves of one call a result is."""

    num_steps: int | str | None = None  # loop steps: a number, "adaptive", or None without recurrence
    suffix: str = ""  # of the task's name, which distinguishes the results of one call


@dataclass(frozen=True)
class TaskResult:
    """One task's scores. `values` holds a list of per-sample values under lm-eval's key "metric,filter"."""

    task: str
    values: dict[str, list[float]]
    num_documents: int  # in the data, before --limit
    baselines: dict[str, Score]  # what guessing reaches: chance, the majority answer, ...
    samples: list[dict[str, Any]] = field(default_factory=list)
    # "metric,filter" -> what is not a mean over the samples
    totals: dict[str, float | Score] = field(default_factory=dict)
    num_fewshot: int = 0
    default_fewshot: int = 0  # lm-eval's own number
    num_truncated: int = 0
    steps: Sequence[float] = ()  # loop steps of each answer; empty without recurrence
    seconds: float | None = None  # in the model, for all answers together; None: not measured apart
    config: dict[str, Any] = field(default_factory=dict)
    data_files: Sequence[Path] = ()
    facts: dict[str, Any] = field(default_factory=dict)  # what is neither a score nor a setting
    subtasks: Sequence[str] = ()
    version: int = 1
    setting: Setting = Setting()

    @property
    def num_samples(self) -> int:
        return len(next(iter(self.values.values()), self.samples))

    @property
    def name(self) -> str:
        """The task's key in a results file."""
        return self.task + self.setting.suffix


def taken(scorer: Scorer) -> dict[str, Any]:
    """The fields of TaskResult that the scorer has counted since the last call."""
    return {
        "num_truncated": scorer.take_truncated(),
        "steps": scorer.take_steps(),
        "seconds": scorer.take_seconds(),
    }


def majority(answers: Iterable[Hashable]) -> Score:
    """What the most common right answer scores as the answer to every problem. Needs at least one."""
    counts = Counter(answers)
    return Score(max(counts.values()) / counts.total())


def build_report(results: Sequence[TaskResult], scorer: Scorer, config: dict[str, Any]) -> dict[str, Any]:
    """Everything a results file holds, in the shape of lm-eval's; `config` is what the user asked for.

    A standard error that a single sample cannot have is "N/A", as in lm-eval. Beyond lm-eval:
        baselines       what guessing reaches, by task
        facts           by task, what is neither a score nor a setting: sizes, loop figures, timings, ...
        results[task]   also `num_steps`, `mean_steps` and `seconds_per_answer` (None: not known)
        configs[task]   `task` (the name without the setting), `num_steps`, `num_samples` voted over
                        (0: none), `num_truncated`, its data's sha256, and what the task adds
        config          `num_steps` of the checkpoint, `num_steps_tested` and the other flags

    A task's `num_steps` is a number, "adaptive" (at most the checkpoint's) or None without recurrence.

    Raises ValueError for a number that is not finite.
    """
    report = {
        "results": {result.name: _metrics(result) for result in results},
        "baselines": {
            result.name: {name: score._asdict() for name, score in result.baselines.items()}
            for result in results
        },
        "facts": {result.name: result.facts for result in results if result.facts},
        "group_subtasks": {
            result.name: [name + result.setting.suffix for name in result.subtasks] for result in results
        },
        "configs": {
            result.name: {
                "num_samples": 0,
                **result.config,
                "task": result.task,
                "num_steps": result.setting.num_steps,
                "num_fewshot": result.num_fewshot,
                "num_truncated": result.num_truncated,
                "data_sha256": {path.name: file_sha256(path) for path in result.data_files},
            }
            for result in results
        },
        "versions": {result.name: result.version for result in results},
        "n-shot": {result.name: result.num_fewshot for result in results},
        "higher_is_better": {
            result.name: {
                **{key.split(",")[0]: True for key in result.values},
                **{key.split(",")[0]: False for key in result.totals},
            }
            for result in results
        },
        "n-samples": {
            result.name: {"original": result.num_documents, "effective": result.num_samples}
            for result in results
        },
        "config": {**_model_facts(scorer), **config},
        "environment": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "sentencepiece", "zeromodel")},
        },
    }
    _require_finite(report)
    return report


def _model_facts(scorer: Scorer) -> dict[str, Any]:
    model = scorer.model
    has_bos = bool(scorer.tokenizer.encode("", bos=True))
    return {
        "model": "zeromodel" if isinstance(model, ZeroModel) else "hf",
        "model_num_parameters": sum(p.numel() for p in model.parameters()),
        "model_dtype": str(next(model.parameters()).dtype),
        "num_steps": model.config.recurrence.num_steps,
        "max_length": scorer.max_length,
        "bos_policy": "one bos id before every context" if has_bos else "none, as the tokenizer",
        "tokenizer_sha256": scorer.tokenizer.sha256,
        "batch_size": scorer.batch_size,
        "device": str(scorer.device),
    }


def _metrics(result: TaskResult) -> dict[str, Any]:
    scores = {key: mean_score(values) for key, values in result.values.items()}
    scores |= {key: x if isinstance(x, Score) else Score(x) for key, x in result.totals.items()}
    entry: dict[str, Any] = {"alias": result.name}
    for key, score in scores.items():
        metric, filter_name = key.split(",")
        entry[key] = score.value
        entry[f"{metric}_stderr,{filter_name}"] = "N/A" if score.stderr is None else score.stderr
    return entry | {
        "num_steps": result.setting.num_steps,
        "mean_steps": mean_score(result.steps).value if result.steps else None,
        "seconds_per_answer": None if result.seconds is None else result.seconds / result.num_samples,
    }


def write_report(
    directory: Path,
    report: dict[str, Any],
    results: Sequence[TaskResult],
    log_samples: bool,
    figure: "Figure | None" = None,
) -> list[Path]:
    """Writes results_<timestamp>.json and samples_<task>_<timestamp>.jsonl, and a figure of the whole task as
    <task>_<timestamp>.png. Returns the paths of results and picture.

    The results come last: they are there only with all that belongs to them. No file is replaced, also if
    other processes write into the folder at the same time.

    Raises:
        OSError: for a full disk, see common.files.replacing; ValueError: a number is not finite.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = new_results_file(directory)
    beside: list[Path] = []
    with replacing(path) as temporary:
        try:
            if log_samples:
                for result in results:
                    if not result.samples:  # a subtask's samples are in the file of its group
                        continue
                    lines = [_json(sample | _hashes(sample)) for sample in result.samples]
                    beside.append(samples_file(path, result.name))
                    write_file(beside[-1], b"".join(line + b"\n" for line in lines))
            if figure is not None:
                beside.append(picture_file(path, results[0].name))
                with replacing(beside[-1]) as picture:
                    figure.savefig(picture, format="png", dpi=110, bbox_inches="tight")
            temporary.write_bytes(_json({**report, WRITTEN: written_now(directory)}, indent=2) + b"\n")
        except BaseException:
            for written in beside:
                written.unlink(missing_ok=True)
            raise
    return [path] if figure is None else [path, beside[-1]]


def _json(value: Any, indent: int | None = None) -> bytes:
    """UTF-8; what it cannot hold, such as a byte of a file name that is not text, as JSON's own escape.

    Raises ValueError for a number that is not finite.
    """
    _require_finite(value)
    return json.dumps(value, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace")


def _require_finite(value: Any) -> None:
    if place := next(_not_finite(value), None):
        raise ValueError(
            f"{place} is not a finite number, and is not written as one: check the model's weights"
        )


def _not_finite(value: Any, place: str = "") -> Iterator[str]:
    """`results > arc_easy > acc,none = nan` of each number that is not finite."""
    items: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, Mapping) else ()
    if isinstance(value, list | tuple):
        items = enumerate(value)
    for key, item in items:
        yield from _not_finite(item, f"{place} > {key}".removeprefix(" > "))
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{place} = {value}"


def _hashes(sample: dict[str, Any]) -> dict[str, str]:
    texts = {key: sample[key].encode("utf-8", "surrogatepass") for key in ("prompt", "target")}
    return {f"{key}_hash": hashlib.sha256(text).hexdigest() for key, text in texts.items()}


def results_table(report: dict[str, Any]) -> str:
    """The table of all that a results file holds."""
    return format_table(TABLE_HEADER, table_rows(report))


def table_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows under TABLE_HEADER, one for each task and metric, from what a results file holds.

    What guessing reaches is in the rows of the metrics it is measured in: the first, and all that rise.
    """
    rows: list[tuple[str, ...]] = []
    for task, metrics in report["results"].items():
        keys = [key for key in metrics if "," in key and not key.split(",")[0].endswith("_stderr")]
        beat = ", ".join(f"{name} {_percent(s)}" for name, s in report["baselines"][task].items())
        higher = report["higher_is_better"][task]
        for key in keys:
            metric, filter_name = key.split(",")
            stderr = metrics[f"{metric}_stderr,{filter_name}"]
            rows.append(
                (
                    task,
                    str(report["n-samples"][task]["effective"]),
                    str(report["n-shot"][task]),
                    filter_name,
                    metric,
                    f"{metrics[key]:.4g}",
                    stderr if isinstance(stderr, str) else f"{stderr:{'.4f' if stderr < 100 else '.4g'}}",
                    beat if key == keys[0] or higher[metric] else "",
                )
            )
    return rows


def _percent(score: dict[str, float | None]) -> str:
    stderr = score["stderr"]
    return f"{score['value']:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in a terminal, whatever the cells hold."""
    header, *rows = [[printable(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    rule = ["-" * width for width in widths]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    heading = [cell.ljust(width) for cell, width in zip(header, widths, strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heading, rule, *padded))


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
