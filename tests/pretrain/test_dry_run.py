"""Dry runs and profiles: what a run would be, and where it spends its time."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import yaml

from model import ModelConfig, ZeroModel
from tests.conftest import ROOT


@pytest.fixture
def alone():
    """Runs a command as one process without a launcher and returns what it printed."""

    def run(command: list[str]) -> str:
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        command = [sys.executable, *command]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_dry_run_describes_the_run_and_writes_nothing(alone, training, tmp_path):
    run = tmp_path / "run"
    printed = alone([*training(run, "ep_size=1", "max_steps=7"), "--dry-run"])
    assert not run.exists()
    assert "max_steps: 7" in printed
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32}
    assert all(f"  {name}: {size}" in printed for name, size in sizes.items())
    config = ModelConfig.from_dict(yaml.safe_load(printed[: printed.index("\nstarts from")])["model"])
    with torch.device("meta"):
        total = sum(p.numel() for p in ZeroModel(config).parameters())
    assert f"parameters       {total:,} (" in printed
    # fp32 weights, gradients, and AdamW's copy of the weights and two moments, on a single rank.
    parts = dict(re.findall(r"^  ([a-z]+) +([0-9,.]+) MB$", printed, re.MULTILINE))
    assert float(parts["optimizer"]) == pytest.approx(12 * total / 1e6, abs=0.1)
    assert float(parts["parameters"]) == pytest.approx(4 * total / 1e6, abs=0.1)


def test_a_profiled_step_leaves_a_trace(alone, training, tmp_path):
    run = tmp_path / "run"
    printed = alone(training(run, "ep_size=1", "max_steps=2", "profile_step=2", "peak_tflops=0.1"))
    assert "MFU and HFU of 0.1 TFLOP/s per device" in printed
    names = {
        event.get("name") for event in json.loads((run / "profile/step-2.json").read_text())["traceEvents"]
    }
    assert "aten::mm" in names
    assert "aten::mm" in (run / "profile/step-2.txt").read_text()
    assert [p.name for p in (run / "profile").iterdir() if p.suffix == ".json"] == ["step-2.json"]
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert 0 < record["mfu"] == record["hfu"]
