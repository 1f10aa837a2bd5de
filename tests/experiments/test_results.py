"""The committed records match today's matrices, and docs/RESULTS.md is the report of these records."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from common.files import write_json
from experiments import report
from experiments.matrix import Matrix, read_matrix
from experiments.matrix_file import RATES, find_matrix
from experiments.record import RECORD
from experiments.reporting.records import read_records
from experiments.run import choose_rates
from experiments.settings import cell_settings
from model.counts import num_parameters

from ..conftest import ROOT

RESULTS = ROOT / "experiments/results"
NAMES = sorted(path.stem for path in RESULTS.glob("*.jsonl"))


def matrix_of(name: str) -> Matrix:
    return read_matrix(find_matrix(name))


def published() -> list[Path]:
    """The files that `make results` reads."""
    command = subprocess.run(
        ["make", "--dry-run", "--assume-old=setup", "results"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [ROOT / path for path in re.findall(r"--runs (\S+)", command)]


@pytest.mark.parametrize("name", NAMES)
def test_every_record_has_the_settings_that_its_matrix_gives_the_cell_now(name):
    matrix = matrix_of(name)
    plans = {plan.cell.name: plan for plan in matrix.plans}
    cells, records = read_records(RESULTS / f"{name}.jsonl")
    assert set(cells) == set(plans)
    assert [record["cell"] for record in records] == cells  # all are done, each once
    for record in records:
        plan = plans[record["cell"]]
        assert record["settings"] == cell_settings(plan, evaluate=not matrix.is_sweep)
        assert (record["matrix"], record["optimizer_steps"]) == (name, plan.max_steps)
        assert record["parameters"] == num_parameters(plan.model)


def test_the_learning_rates_are_those_of_the_committed_sweep(tmp_path):
    for record in read_records(RESULTS / "sweep.jsonl")[1]:
        write_json(tmp_path / "cells" / record["cell"] / RECORD, record)
    assert choose_rates(matrix_of("sweep").plans, tmp_path) == yaml.safe_load(RATES.read_text())


def test_the_published_report_is_that_of_the_committed_records(tmp_path):
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/EXPERIMENTS.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    report.write(published(), tmp_path / "docs/RESULTS.md")
    for name in ("README.md", "docs/EXPERIMENTS.md", "docs/RESULTS.md"):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), f"{name}: run make results"
    # Names only: two machines may draw the letters of a picture differently.
    drawn, stored = (
        {path.name for path in (folder / "docs/results").glob("*.png")} for folder in (tmp_path, ROOT)
    )
    assert drawn == stored
