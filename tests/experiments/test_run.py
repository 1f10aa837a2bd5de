"""Cells that really run: the same losses twice, by number or by name, after a kill or a failure."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ..conftest import ROOT

LOOP = "p_hop/small/4/loop/0"
# Of a record, what depends on the clock or the memory.
OF_THE_RUN = {"tokens_per_second", "train_seconds", "peak_memory_bytes"}


def start(matrix: str, out: Path, *more: str, data_root: Path | None = None) -> subprocess.Popen[str]:
    """A runner with its children in a process group of their own."""
    environment = {**os.environ, **({} if data_root is None else {"DATA_ROOT": str(data_root)})}
    command = [sys.executable, "experiments/run.py", "--matrix", f"tests/experiments/{matrix}.yaml"]
    return subprocess.Popen(
        [*command, "--out", str(out), *more],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run(matrix: str, out: Path, *more: str, code: int = 0, data_root: Path | None = None) -> str:
    process = start(matrix, out, *more, data_root=data_root)
    said, _ = process.communicate(timeout=400)
    assert process.returncode == code, said
    return said


def record(out: Path, name: str = LOOP) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "cells" / name / "cell.json").read_text())
    return {key: value for key, value in found.items() if key not in OF_THE_RUN}


def losses(out: Path, name: str = LOOP) -> list[tuple[float, float]]:
    lines = (out / "cells" / name / "metrics.jsonl").read_text().splitlines()
    return [(entry["loss"], entry["grad_norm"]) for entry in map(json.loads, lines)]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The loop's cell, chosen by its name."""
    out = tmp_path_factory.mktemp("experiments") / "done"
    assert "1 of 1 cells done" in run("tiny", out, "--cells", "*/loop/*")
    return out


def test_a_cell_has_its_record(done):
    found = record(done)
    assert (found["cell"], found["matrix"], found["budget"]) == (LOOP, "tiny", "4")
    assert found["trained_steps"] == 4
    assert set(found["accuracy"]) == set(found["inference_flops_per_token"]) == {"1", "4", "8"}
    assert len(found["correct"]) == found["num_samples"] == 20
    assert found["correct"].count("1") / 20 == pytest.approx(found["accuracy"]["4"])
    assert set(found["gaps"]) == {"half as long again", "twice as long"}
    assert len(found["convergence"]["8"]["residuals"]) == 8
    assert found["mean_steps"] == 4
    assert found["tokens"] == 4 * 8 * 26
    assert len(losses(done)) == found["optimizer_steps"] == 4
    assert not {"variant", "by_depth", "spearman_steps_depth", "votes", "perplexity"} & set(found)
    assert json.loads((done / "tiny.matrix.json").read_text())["cells"] == [
        LOOP,
        "p_hop/small/4/dense_narrow/0",
    ]


@pytest.mark.slow
def test_by_number_a_killed_cell_resumes_and_has_the_same_losses(done, tmp_path):
    """Killed after its first checkpoint, with all that it started."""
    process = start("tiny", tmp_path, "--index", "0")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "cells").glob(f"{LOOP}/checkpoints/step-*/*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "cells" / LOOP / "cell.json").exists()
    run("tiny", tmp_path, "--index", "0")
    assert losses(tmp_path) == losses(done)
    assert record(tmp_path) == record(done)


@pytest.mark.slow
def test_a_failed_cell_is_reported_and_costs_no_other(done, tmp_path):
    narrow = tmp_path / "cells/p_hop/small/4/dense_narrow/0"
    (narrow / "config.yaml").mkdir(parents=True)  # in the way of the run's own
    said = run("tiny", tmp_path, "--jobs", "2", code=1)
    problem = f"main.py failed with code 2: see {narrow / 'train.log'}"
    assert f"failed: p_hop/small/4/dense_narrow/0: {problem}" in said
    assert json.loads((narrow / "failed.json").read_text())["problem"] == problem
    assert record(tmp_path) == record(done)  # the same cell twice
    assert losses(tmp_path) == losses(done)
    loop = tmp_path / "cells" / LOOP
    before = {path: path.stat().st_mtime_ns for path in loop.rglob("*")}
    (narrow / "config.yaml").rmdir()
    run("tiny", tmp_path, "--jobs", "2")
    assert {path: path.stat().st_mtime_ns for path in loop.rglob("*")} == before
    assert not (narrow / "failed.json").exists()
    assert record(tmp_path, "p_hop/small/4/dense_narrow/0")["parameters"] == pytest.approx(
        record(tmp_path)["parameters"], rel=0.01
    )


@pytest.mark.slow
def test_chains_of_thought_vote_and_text_has_a_perplexity(tmp_path, data_root):
    run("kinds", tmp_path, data_root=data_root)
    cot = record(tmp_path, "causal_loop_v2_traced/small/2/cot/0")
    assert set(cot["votes"]) == {"1", "4"}
    assert set(cot["by_depth"]) == {"1", "2", "3", "4", "5", "6"}
    assert set(cot["ood_accuracy"]) == set(cot["accuracy"]) == {"1"}
    assert len(cot["correct"]) == 6
    text = record(tmp_path, "wikipedia/small/2-flops-of-loop/loop/0")
    assert set(text["bits_per_byte"]) == set(text["perplexity"]) == {"1", "4", "8"}
    for steps, bits in text["bits_per_byte"].items():
        assert text["perplexity"][steps] == pytest.approx(2**bits)
    assert text["num_samples"] == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--index", "2"), "error: --index 2 must be from 0 to 1, of 2 cells"),
        (("--cells", "p_hip/*"), "error: --cells p_hip/*: none of 2 cells matches; --list names them"),
        (("--jobs", "0"), "error: --jobs 0 must be at least 1"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(more, message, tmp_path):
    said = run("tiny", tmp_path, *more, code=2)
    assert said.startswith(message)
    assert len(said.splitlines()) == 1
