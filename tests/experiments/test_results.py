"""The committed records are of the matrices as they are, and docs/RESULTS.md is what they say."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from experiments import report
from experiments.cells import evaluations, folder_of, training
from experiments.jobs import SETTINGS
from experiments.matrix import Matrix, read_matrix
from experiments.matrix_file import RATES, find_matrix
from experiments.run import choose_rates

from ..conftest import ROOT

RESULTS = ROOT / "experiments/results"
MATRICES = sorted(path.name.partition(".")[0] for path in RESULTS.glob("*/*.matrix.json"))


def matrix_of(name: str) -> Matrix:
    return read_matrix(find_matrix(name))


def published() -> list[Path]:
    """The folders that `make results` reads."""
    command = subprocess.run(
        ["make", "--dry-run", "--assume-old=setup", "results"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [ROOT / folder for folder in re.findall(r"--runs (\S+)", command)]


@pytest.mark.parametrize("name", MATRICES)
def test_every_record_is_of_a_cell_of_its_matrix_told_what_it_would_be_told_now(name):
    matrix = matrix_of(name)
    plans = {folder_of(plan, RESULTS / name): plan for plan in matrix.plans}
    records = sorted((RESULTS / name).rglob("cell.json"))
    assert records
    for path in records:
        plan = plans[path.parent]
        assert json.loads((path.parent / SETTINGS).read_text()) == {
            "training": training(plan),
            "data": list(plan.data),
            "evaluations": evaluations(plan, evaluate=not matrix.is_sweep),
        }
        record = json.loads(path.read_text())
        assert (record["cell"], record["optimizer_steps"]) == (plan.cell.name, plan.max_steps)


def test_the_learning_rates_are_those_of_the_committed_sweep():
    chosen = choose_rates(matrix_of("sweep").plans, RESULTS / "sweep")
    assert chosen == yaml.safe_load(RATES.read_text())


def test_the_published_report_is_that_of_the_committed_records(tmp_path):
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "README.md", tmp_path)
    report.write(published(), tmp_path / "docs/RESULTS.md")
    for name in ("README.md", "docs/RESULTS.md"):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), f"{name}: run make results"
    pages = [(folder / "docs/results/index.html").read_text() for folder in (tmp_path, ROOT)]
    # Two machines may draw the letters of a picture differently.
    drawn, stored = (re.sub(r"base64,[^\"']*", "base64,", page) for page in pages)
    assert drawn == stored
    names = ({path.name for path in (folder / "docs/results").iterdir()} for folder in (tmp_path, ROOT))
    assert next(names) == next(names)
