"""Whole runs with a kill or a full disk at any change of their files: the same command then ends as if
undisturbed.
"""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ..conftest import ROOT

OPTIONS = ("save_every=1", "keep_last=1", "ep_size=1", "optimizer.ema_decay=0.5")
SAME = ("step", "loss", "grad_norm", "lr", "expert_load")


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def started(train, tmp_path_factory) -> Path:
    """A run that has ended after step 1."""
    run = tmp_path_factory.mktemp("started") / "run"
    train(run, "max_steps=1", "optimizer.decay_steps=3", *OPTIONS, ranks=1)
    return run


def attack(launch, training, run: Path, kind: str, at: int):
    command = training(run, "max_steps=3", "optimizer.decay_steps=3", *OPTIONS)
    worker = [ROOT / "tests/attacks/faulty_run.py", kind, at, run]
    return launch(1, *worker, *command, check=False)


@pytest.mark.parametrize("count", [1, pytest.param(25, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["kill", "fail", "full"])
def test_a_run_survives_a_fault_at_any_change(launch, training, started, tmp_path, kind, count):
    whole = tmp_path / "whole"
    shutil.copytree(started, whole)
    counted = attack(launch, training, whole, kind, 0)
    points = int(re.search(r"CHANGES (\d+)", counted.stdout)[1])
    assert points > 100
    for at in sorted(random.Random(len(kind)).sample(range(1, points + 1), count)):
        run = tmp_path / "run"
        shutil.copytree(started, run)
        done = attack(launch, training, run, kind, at)
        said = done.stdout + done.stderr
        assert "Traceback" not in said, (at, said[-3000:])
        if kind != "kill" and done.returncode:
            (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
            assert str(run) in line, at
            assert "No space left on device" in line, at
        done = attack(launch, training, run, kind, 0)
        assert not done.returncode, (at, done.stderr[-3000:])
        for key in SAME:
            assert [r[key] for r in metrics(run)] == [r[key] for r in metrics(whole)], (at, key)
        for name in ("export", "export_ema"):
            ours, theirs = (load_file(path / name / "model.safetensors") for path in (run, whole))
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs), at
        assert (run / "DONE").read_text() == "3\n"
        left = {path.name for path in run.rglob("*") if kind != "kill" or path.suffix != ".tmp"}
        assert left <= {path.name for path in whole.rglob("*")} | {"metrics.dropped.jsonl"}, at
        shutil.rmtree(run)
