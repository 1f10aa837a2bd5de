"""Attacks on experiments/: matrices and records with something wrong, runners that are killed."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments import report
from experiments.run import jobs_of, read

from ..conftest import ROOT
from .mutations import byte_mutations, config_mutations, refusal

MATRICES = (
    "tests/experiments/tiny.yaml",
    "tests/experiments/tiny_latent_cot.yaml",
    "tests/experiments/kinds.yaml",
    "experiments/matrices/quick.yaml",
)
COUNTS = [pytest.param(25, id="few"), pytest.param(250, id="many", marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("matrix", MATRICES)
def test_a_wrong_matrix_is_one_line(matrix: str, count: int, tmp_path: Path) -> None:
    refused, path = 0, tmp_path / "matrix.yaml"
    for _, values in config_mutations(yaml.safe_load((ROOT / matrix).read_text()), count, seed=5):
        path.write_text(yaml.safe_dump(values))
        refused += refusal(lambda: jobs_of(read(path))) is not None
    assert refused > count / 2


def records() -> list[dict[str, Any]]:
    cells = ROOT / "tests/experiments/cells"
    return [
        record
        for name in ("p_hop", "wikipedia", "studies")
        for record in json.loads((cells / f"{name}_synthetic.json").read_text())[:3]
    ]


@pytest.mark.parametrize("count", COUNTS)
def test_a_wrong_record_is_one_line_or_shown(count: int, tmp_path: Path) -> None:
    path, pictures = tmp_path / "x.jsonl", tmp_path / "pictures"
    pictures.mkdir()
    head = json.dumps({"matrix": "x", "cells": [record["cell"] for record in records()]})
    for what, values in config_mutations({"records": records()}, count, seed=6):
        changed = values.get("records")
        lines = changed if isinstance(changed, list) else [values]
        path.write_text("\n".join([head, *map(json.dumps, lines)]) + "\n")
        said = refusal(lambda: report.build(report.read_runs([path]), pictures))
        assert said is None or str(path) in said, what


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_files_of_a_run_folder_are_named_and_the_rest_is_used(count: int, tmp_path: Path) -> None:
    first, second = records()[:2]
    for record in (first, second):
        folder = tmp_path / "cells" / record["cell"]
        folder.mkdir(parents=True)
        (folder / "cell.json").write_text(json.dumps(record))
    path = tmp_path / "cells" / second["cell"] / "cell.json"
    for what, data in byte_mutations(path.read_bytes(), count, seed=7):
        path.write_bytes(data)
        runs = report.read_runs([tmp_path])
        assert first in [*runs.records, *runs.studies], what
        assert len(runs.records) + len(runs.studies) + runs.sweep + len(runs.failed) == 2, what


def runner(out: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "experiments/run.py", "--matrix", "tests/experiments/tiny.yaml"]
    return subprocess.Popen(
        [*command, "--cells", "*/loop/*", "--out", str(out)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def wait_for_child(process: "subprocess.Popen[str]", script: str) -> int:
    """The id of the runner's child that executes `script`, once there is one."""
    children = Path(f"/proc/{process.pid}/task")
    while process.poll() is None:
        found = " ".join(path.read_text() for path in children.glob("*/children")).split()
        for child in map(int, found):
            with suppress(FileNotFoundError):  # it has ended
                if script.encode() in Path(f"/proc/{child}/cmdline").read_bytes():
                    return child
    raise AssertionError(process.communicate()[0])


@pytest.mark.slow
def test_sigterm_ends_the_cells_and_the_same_command_resumes(tmp_path: Path) -> None:
    process = runner(tmp_path)
    child = wait_for_child(process, "pretrain/main.py")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "the same command resumes" in said
    assert not Path(f"/proc/{child}").exists()
    assert not list(tmp_path.rglob("failed.json"))
    again = runner(tmp_path)
    assert "1 of 1 cells done" in again.communicate()[0]


@pytest.mark.slow
def test_a_second_runner_waits_for_what_a_killed_one_left_running(tmp_path: Path) -> None:
    process = runner(tmp_path)
    orphan = wait_for_child(process, "pretrain/main.py")
    os.kill(orphan, signal.SIGSTOP)
    process.kill()
    process.communicate()
    again = runner(tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):  # the orphan has the cell's lock
        again.wait(timeout=15)
    os.kill(orphan, signal.SIGCONT)
    assert "1 of 1 cells done" in again.communicate()[0]
    (log,) = tmp_path.rglob("train.log")
    assert log.read_text().count("parameters (") == 1  # trained once
