"""Turns the records of cells into docs/RESULTS.md, its pictures, one HTML page and the guides' headline.

python experiments/report.py --runs runs/experiments/quick [--runs MORE] --out docs/RESULTS.md

Reads the records of finished cells (experiments/record.py), from a run folder or a file such as
experiments/results/standard.jsonl, and the claims of experiments/CLAIMS.md. Next to OUT it writes a folder
with OUT's name in lower case, which holds the pictures and index.html. Between their lines
<!-- results:begin --> and <!-- results:end --> a README.md in the folder above OUT's gets the headline as a
table, and an EXPERIMENTS.md next to OUT gets it in words. The same records give the same bytes.
"""

import argparse
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from common.errors import user_errors
from common.files import write_file
from common.pages import Picture, Section, Table, plain, table_lines, to_markdown, to_page
from experiments.reporting.claims import Unit, claim_verdict, judge, not_claimed, read_claims
from experiments.reporting.figures import (
    HEADLINE,
    MAIN,
    depth_figure,
    flops_figure,
    headline_figure,
    parameters_figure,
    save,
    steps_figure,
    varied_figure,
)
from experiments.reporting.records import Record, Runs, Setting, budget_text, read_runs, settings_of, value_of
from experiments.reporting.studies import (
    EXAMPLES,
    ITERATIONS,
    by_shots,
    by_value,
    convergence_section,
    few_shot_section,
    gaps_section,
    study_section,
    varied,
    votes_section,
)
from experiments.reporting.tables import groups_section, task_section
from experiments.reporting.verdicts import claims_section, effect_text, statistics_section

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
HEADLINE_CLAIM, QUESTION = "equal_parameters", "Does iterating beat adding parameters?"
HEADLINE_PICTURE = f"{QUESTION} Accuracy of a loop and of dense models, by task"
NO_ANSWER = "No answer yet: no task has a loop and its dense twin of the same budget."
TITLE = "Results: does iterating beat adding parameters?"
OPENING = "Written by `experiments/report.py` from the records of the runs; nothing here is typed by hand."
WIDTH = 118  # of a guide's lines
Panels = Mapping[Setting, Mapping[str, Sequence[Record]]]


@dataclass(frozen=True)
class Report:
    """The sections to write, and the headline of README.md and EXPERIMENTS.md."""

    sections: list[Section]
    answer: str  # the headline claim in one sentence, with its intervals
    table: Table  # the same, one row per task; no rows without an answer
    verdict: str
    headline: Path | None  # picture of the headline


def build(runs: Runs, pictures: Path) -> Report:
    """The report of these runs; draws its pictures into the folder `pictures`."""
    claims = read_claims()
    units = judge(claims, runs.records)
    settings = settings_of(runs.records)
    effects = {
        unit.setting: f"Loop minus dense, equal parameters: {effect_text(unit)}, {unit.verdict}"
        for unit in units
        if unit.claim.id == HEADLINE_CLAIM
    }
    (claim,) = [claim for claim in claims if claim.id == HEADLINE_CLAIM]
    panels = headline_panels({s: groups for s, groups in settings.items() if s.task in claim.tasks})
    verdict = claim_verdict(claim, units)
    headline = None
    if panels:
        figure = headline_figure(panels, effects, f"{QUESTION} Over all tasks: {verdict}")
        headline = save(figure, pictures / "headline.png")
    answer = answer_text(units, set(panels), verdict)
    tasks = [task_section(setting, groups) for setting, groups in settings.items()]
    sections = [
        Section("The question", [answer, *([Picture(headline, HEADLINE_PICTURE)] if headline else [])]),
        claims_section(claims, units, runs.records),
        statistics_section(units),
        Section("Scores and costs", parts=tasks),
        _pictures_section(settings, pictures),
        _studies_section(runs, pictures),
        Section("Not claimed", [not_claimed()]),
        groups_section([*runs.records, *runs.studies]),
        _left_out_section(runs),
    ]
    return Report(sections, answer, answer_table(units, set(panels)), verdict, headline)


def headline_panels(settings: Panels) -> dict[Setting, dict[str, Sequence[Record]]]:
    """One setting per task that has the headline's pair: the most seeds, then the most training FLOPs."""
    best: dict[str, tuple[int, float, Setting]] = {}
    for setting, groups in settings.items():
        pair = [groups.get(name, ()) for name in ("loop", "dense_params")]
        seeds = set.intersection(
            *({r["seed"] for r in side if value_of(r, "accuracy") is not None} for side in pair)
        )
        if seeds:
            rank = (len(seeds), max(float(r.get("training_flops", 0)) for r in pair[0]), setting)
            best[setting.task] = max(rank, best.get(setting.task, rank))
    return {
        setting: {name: settings[setting][name] for name in HEADLINE if name in settings[setting]}
        for _, _, setting in best.values()
    }


def answer_units(units: Sequence[Unit], shown: set[Setting]) -> list[Unit]:
    return [unit for unit in units if unit.claim.id == HEADLINE_CLAIM and unit.setting in shown]


def answer_text(units: Sequence[Unit], shown: set[Setting], verdict: str) -> str:
    """The headline claim in one sentence."""
    effects = "; ".join(
        f"{unit.setting.task} {effect_text(unit)} ({unit.verdict}; {len(unit.seeds)} seeds, "
        f"{budget_text(unit.setting.budget)})"
        for unit in answer_units(units, shown)
    )
    if not effects:
        return f"{QUESTION} {NO_ANSWER}"
    return (
        f"{QUESTION} At equal parameters, the accuracy of a loop minus the accuracy of the same number of "
        f"dense layers, with intervals corrected for all comparisons: {effects}; over all tasks of the "
        f"claim: **{verdict}**."
    )


def answer_table(units: Sequence[Unit], shown: set[Setting]) -> Table:
    """The headline claim, one row per task."""
    header = ("task", "loop", "as many dense layers", "difference [interval]", "verdict", "budget")
    rows = [
        (
            unit.setting.task,
            *(f"{side:.3f}" for side in unit.sides),
            effect_text(unit),
            unit.verdict,
            f"{len(unit.seeds)} seeds, {budget_text(unit.setting.budget)}",
        )
        for unit in answer_units(units, shown)
    ]
    return Table(header, rows)


def _pictures_section(settings: Panels, folder: Path) -> Section:
    """The pictures that have data."""
    scored = _with(settings, "accuracy")
    deep = _with(settings, "by_depth")
    main = {s: {g: r for g, r in groups.items() if g in MAIN} or groups for s, groups in deep.items()}
    loops = {
        s: {g: r for g, r in groups.items() if g in MAIN and r[0]["trained_steps"] > 1}
        for s, groups in deep.items()
    }
    drawn: list[tuple[str, str, Panels, Callable[[Panels], Figure]]] = [
        ("Accuracy by depth", "depth", main, depth_figure),
        ("Accuracy against parameters", "parameters", scored, parameters_figure),
        ("Accuracy against inference FLOPs", "inference_flops", scored, flops_figure),
        ("Steps needed against true depth", "steps_depth", loops, steps_figure),
    ]
    parts = []
    for title, name, panels, draw in drawn:
        whole = {setting: groups for setting, groups in panels.items() if groups}
        if whole:
            parts.append(Section(title, [Picture(save(draw(whole), folder / f"{name}.png"), title)]))
    said = "Whiskers are 95 % bootstrap intervals over the seeds, not corrected."
    return Section("Pictures", [said] if parts else [], parts)


def _with(settings: Panels, key: str) -> dict[Setting, dict[str, Sequence[Record]]]:
    """The settings and groups whose records all have a key."""
    found = {
        s: {g: r for g, r in groups.items() if all(key in x for x in r)} for s, groups in settings.items()
    }
    return {setting: groups for setting, groups in found.items() if groups}


def _studies_section(runs: Runs, folder: Path) -> Section:
    keys = {varied(record)[0] for record in runs.studies}
    weights = sorted(keys - {ITERATIONS, EXAMPLES})
    parts = [
        study_section(
            "Loss weights", "Weights of the loss terms, one varied at a time.", runs.studies, weights
        ),
        study_section("Iteration count", "R loop steps, or R layers.", runs.studies, [ITERATIONS]),
        study_section(
            "Sample efficiency",
            "More or fewer training examples, the same number of training steps.",
            runs.studies,
            [EXAMPLES],
        ),
    ]
    everything = runs.records
    parts += [few_shot_section(everything), convergence_section(everything), gaps_section(everything)]
    parts.append(votes_section(everything))
    scored = [record for record in runs.studies if "accuracy" in record]
    for part, name, found, xlabel in (
        (parts[1], ITERATIONS, by_value(scored, ITERATIONS), "steps R of the loop"),
        (parts[2], EXAMPLES, by_value(scored, EXAMPLES), "examples"),
        (parts[3], "shots", by_shots(everything), "exemplars before the question"),
    ):
        if found:
            title = f"Accuracy against {xlabel}"
            part.blocks.append(Picture(save(varied_figure(found, xlabel), folder / f"by_{name}.png"), title))
    return Section("Studies", [], parts)


def _left_out_section(runs: Runs) -> Section:
    total = len(runs.records) + len(runs.studies)
    said = f"{total} cells are done, {len(runs.failed)} failed, {len(runs.missing)} have not run."
    if runs.sweep:
        said += f" {runs.sweep} more served only to choose learning rates and are not compared."
    rows = [(f"`{name}`", plain(problem)) for name, problem in runs.failed.items()]
    rows += [(f"`{name}`", "not run") for name in runs.missing]
    return Section(
        "Failed and missing cells", [said, *([Table(("cell", "what happened"), rows)] if rows else [])]
    )


def update_page(page: Path, lines: Sequence[str]) -> None:
    """Puts lines between the two marker lines of a page. Raises ValueError if it lacks them."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} lacks the lines {BEGIN} and {END} around the headline: add them")
    write_file(page, (before + "\n".join([BEGIN, *lines, END]) + after).encode())


def readme_lines(report: Report, readme: Path) -> list[str]:
    """The headline as a table with its picture."""
    if not report.table.rows:
        return [NO_ANSWER]
    lines = [*table_lines(report.table), "", f"Over all tasks of the claim: **{report.verdict}**."]
    lines[-1] += " Accuracy at equal parameters, intervals corrected for all comparisons."
    if report.headline is not None:
        link = Path(os.path.relpath(report.headline, readme.parent)).as_posix()
        lines += ["", f"![{HEADLINE_PICTURE}]({link})"]
    return lines


def write(folders: Sequence[Path], out: Path) -> None:
    """Write the report of these run folders and files. Raises ValueError or OSError for a user's mistake."""
    runs = read_runs(folders)
    pictures = out.parent / out.stem.lower()
    pictures.mkdir(parents=True, exist_ok=True)
    report = build(runs, pictures)
    write_file(out, to_markdown(TITLE, OPENING, report.sections, out.parent).encode())
    write_file(pictures / "index.html", to_page(TITLE, OPENING, report.sections).encode())
    readme, guide = out.absolute().parent.parent / "README.md", out.parent / "EXPERIMENTS.md"
    if readme.is_file():
        update_page(readme, readme_lines(report, readme))
    if guide.is_file():
        update_page(
            guide, textwrap.wrap(report.answer, WIDTH, break_long_words=False, break_on_hyphens=False)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Turn the records of experiments into a report.")
    parser.add_argument(
        "--runs",
        type=Path,
        action="append",
        required=True,
        help="the --out of experiments/run.py, or a file of records, NAME.jsonl; may be repeated",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.md", help="the report to write")
    arguments = parser.parse_args()
    with user_errors(ValueError, OSError):
        write(arguments.runs, arguments.out)
        print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
