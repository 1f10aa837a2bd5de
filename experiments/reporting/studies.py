"""Sections on what is varied: loss weights, steps, examples, convergence, generalisation, few-shot, votes."""

import json
from collections.abc import Sequence

from common.pages import Section, Table
from experiments.reporting.records import Record, settings_of, steps_of
from experiments.reporting.tables import COSTS, NOTHING, cost_cells, number, score_text

ITERATIONS, EXAMPLES = "steps", "examples"  # what matrices/iterations.yaml and examples.yaml vary


def varied(record: Record) -> tuple[str, object]:
    """The setting that a study's record varies, and its value."""
    ((key, value),) = record["variant"].items()
    return key, value


def _curve(record: Record) -> tuple[str, str, str, str]:
    """What the points of one curve have in common."""
    return record["task"], record["size"], record["budget"], record["group"]


def by_value(
    records: Sequence[Record], key: str
) -> dict[tuple[str, str, str, str], dict[float, list[Record]]]:
    """Records that vary `key`: by task, size, budget and group, the seeds of each value in rising order."""
    found: dict[tuple[str, str, str, str], dict[float, list[Record]]] = {}
    for record in sorted((r for r in records if varied(r)[0] == key), key=lambda r: float(str(varied(r)[1]))):
        found.setdefault(_curve(record), {}).setdefault(float(str(varied(record)[1])), []).append(record)
    return found


def study_section(title: str, said: str, records: Sequence[Record], keys: Sequence[str]) -> Section:
    """A table of every cell that varies one of the keys."""
    own = [record for record in records if varied(record)[0] in keys]
    rows = []
    cells: dict[tuple[str, ...], list[Record]] = {}
    for record in own:
        key, value = varied(record)
        name = f"{key.rpartition('.')[2]} = {json.dumps(value)}"
        cells.setdefault((*_curve(record), name), []).append(record)
    for cell, seeds in cells.items():
        rank = score_text(seeds, "spearman_steps_depth")
        scores = (score_text(seeds, "accuracy"), score_text(seeds, "ood_accuracy"), rank)
        rows.append((*cell, *scores, *cost_cells(seeds)))
    cell_header = ("task", "size", "training steps", "group", "varied")
    scores_header = ("accuracy", "beyond the trained depth", "Spearman of steps and depth")
    table = Table((*cell_header, *scores_header, *COSTS), rows)
    return Section(title, [said, table] if rows else [])


def convergence_section(records: Sequence[Record]) -> Section:
    """Whether the loops converge."""
    rows = []
    for setting, groups in settings_of([r for r in records if "convergence" in r]).items():
        for group, seeds in groups.items():
            rows.append(
                (
                    str(setting),
                    group,
                    _mean_of(seeds, "residuals", 1),
                    _mean_of(seeds, "residuals", 2),
                    _mean_of(seeds, "convergence_ratio", 1),
                    _of(seeds, "path_independence"),
                    _of(seeds, "overthinking_gap"),
                    *cost_cells(seeds),
                )
            )
    header = (
        *("task, size, budget", "group", "relative change in the last of R steps", "in the last of 2R"),
        *("ratio of changes", "path independence", "overthinking gap", *COSTS),
    )
    said = (
        "Relative change of the state in the last step (0: a fixed point), and the ratio of one change to "
        "the previous one (below 1: it shrinks). Path independence: share of labels on which three initial "
        "states agree. Overthinking gap: the best accuracy of all steps tested minus the accuracy at 4R, "
        "never below 0."
    )
    return Section("Convergence", [said, Table(header, rows)] if rows else [])


def _mean_of(records: Sequence[Record], key: str, times: int) -> str:
    """Mean over seeds of a value at `times` R steps; the last entry of a list."""
    values = []
    for record in records:
        found = record["convergence"].get(str(times * record["trained_steps"]), {}).get(key)
        last = found[-1] if isinstance(found, list) and found else found
        if isinstance(last, int | float):
            values.append(float(last))
    return _mean(values)


def _of(records: Sequence[Record], key: str) -> str:
    return _mean([record["convergence"][key] for record in records if key in record["convergence"]])


def _mean(values: Sequence[float]) -> str:
    return number(sum(values) / len(values)) if values else NOTHING


def gaps_section(records: Sequence[Record]) -> Section:
    """Tests that differ from the training data, at the trained steps."""
    parts = []
    for setting, groups in settings_of([r for r in records if r.get("gaps")]).items():
        names = list(dict.fromkeys(name for seeds in groups.values() for r in seeds for name in r["gaps"]))
        rows = [
            (
                group,
                score_text(seeds, "accuracy"),
                *(score_text([_flat(r, name) for r in seeds], "gap") for name in names),
                *cost_cells(seeds),
            )
            for group, seeds in groups.items()
        ]
        parts.append(Section(str(setting), [Table(("group", "as trained", *names, *COSTS), rows)]))
    return Section("Generalisation gaps", [], parts)


def by_shots(records: Sequence[Record]) -> dict[tuple[str, str, str, str], dict[float, list[Record]]]:
    """By task, size, budget and group, the seeds at each number of exemplars, with their accuracy."""
    found: dict[tuple[str, str, str, str], dict[float, list[Record]]] = {}
    for record in (r for r in records if "few_shot" in r):
        few = record["few_shot"]
        for shots, value in few["accuracy"].items():
            same = {"accuracy": {steps_of(record): value}, "guesses": few["guesses"]}
            found.setdefault(_curve(record), {}).setdefault(float(shots), []).append(record | same)
    return found


def few_shot_section(records: Sequence[Record]) -> Section:
    """Questions to text models after some solved examples."""
    parts = []
    for setting, groups in settings_of([r for r in records if "few_shot" in r]).items():
        first = next(iter(groups.values()))[0]["few_shot"]
        shots = list(first["accuracy"])
        guesses = ", ".join(f"{way} {number(value)}" for way, value in first["guesses"].items())
        said = f"{first['task']}, the first {first['num_samples']:,} questions. Guessing reaches: {guesses}."
        cut = {k: n for k, n in first["num_truncated"].items() if n}
        if cut:
            said += " Some of the prompts, one per answer choice, were truncated on the left to fit: "
            said += ", ".join(f"{n:,} ({k}-shot)" for k, n in cut.items()) + "."
        rows = []
        for group, seeds in groups.items():
            scores = ([r | {"few": r["few_shot"]["accuracy"][k]} for r in seeds] for k in shots)
            rows.append((group, *(score_text(found, "few") for found in scores), *cost_cells(seeds)))
        header = ("group", *(f"{k}-shot" for k in shots), *COSTS)
        parts.append(Section(str(setting), [said, Table(header, rows)]))
    return Section("Few-shot", [], parts)


def votes_section(records: Sequence[Record]) -> Section:
    """Majority votes of sampled chains of thought."""
    parts = []
    for setting, groups in settings_of([r for r in records if r.get("votes")]).items():
        counts = sorted({int(k) for seeds in groups.values() for r in seeds for k in r["votes"]})
        rows = [
            (
                group,
                score_text(seeds, "accuracy"),
                *(score_text([{**r, "vote": r["votes"].get(str(k))} for r in seeds], "vote") for k in counts),
                *cost_cells(seeds),
            )
            for group, seeds in groups.items()
        ]
        header = ("group", "greedy", *(f"majority of {k}" for k in counts), *COSTS)
        parts.append(Section(str(setting), [Table(header, rows)]))
    return Section("Test-time scaling by majority vote", [], parts)


def _flat(record: Record, gap: str) -> Record:
    return {**record, "gap": record["gaps"].get(gap)}
