"""Dry runs and profiles: what a run would be, and where it spends its time."""

import argparse
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import yaml

from data_pipeline.errors import DataError
from distill.main import prepare_distillation
from model import ModelConfig, ZeroModel
from model.counts import num_parameters
from pretrain import setup
from pretrain.dry_run import describe
from pretrain.setup import prepare
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


def test_a_dry_run_needs_no_data(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    later = tmp_path / "later"
    overrides = ["ep_size=1", f"data.path={later}", f"output_dir={tmp_path}"]
    given = ("pretrain/configs/demo.yaml", "ds_configs/zero1.json")
    assert f"{later} IS NOT BUILT YET: a vocabulary of 8,192, assumed" in describe(
        prepare(*given, overrides, dry_run=True)
    )
    run = prepare(*given, [*overrides, "model.vocab_size=77"], dry_run=True)
    assert "a vocabulary of 77, from model.vocab_size" in describe(run)
    left = [*overrides, "model.use_mla=false", "model.kv_lora_rank=24"]
    described = describe(prepare(*given, left, dry_run=True))
    assert "\nset but unused   model.kv_lora_rank=24: not used with use_mla=false\n" in described
    with pytest.raises(DataError, match="later does not exist"):
        prepare(*given, overrides)
    distill = {"config": "distill/configs/small.yaml", "ds_config": "ds_configs/zero2.json", "init": None}
    overrides.append("model.distillation.method=kava")
    arguments = argparse.Namespace(**distill, overrides=overrides, dry_run=True)
    assert "IS NOT BUILT YET" in describe(prepare_distillation(arguments))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_memory_of_a_small_model_is_small(monkeypatch, stage, tmp_path):
    """The buckets, 2,000 to 4,000 MB by default, hold one gradient of every parameter."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", "1")
    files = {1: "zero1", 2: "zero2", 3: "zero3_ep"}
    sizes = ["hidden_size=16", "intermediate_size=32", "moe_intermediate_size=16", "vocab_size=300"]
    overrides = ["ep_size=1", "data.sequence_length=32", *(f"model.{size}" for size in sizes)]
    overrides.append(f"data.path={tmp_path / 'unbuilt'}")  # the checkout may hold the demo's
    run = prepare("pretrain/configs/demo.yaml", f"ds_configs/{files[stage]}.json", overrides, dry_run=True)
    total = num_parameters(run.model_config)
    assert run.ds_config["zero_optimization"]["reduce_bucket_size"] == total
    parts = dict(re.findall(r"^  ([a-z' ]+?) +([0-9,.]+) MB$", describe(run), re.MULTILINE))
    assert float(parts["gradient buckets"]) == pytest.approx(4 * total * (1 + (stage < 3)) / 1e6, abs=0.051)
    assert sum(float(size) for size in parts.values()) < 20


def test_a_model_that_the_host_cannot_hold_is_refused_and_described(monkeypatch, tmp_path):
    monkeypatch.setattr(setup, "host_memory", lambda: 11 * 10**6)
    monkeypatch.setattr("pretrain.dry_run.host_memory", lambda: 11 * 10**6)
    monkeypatch.chdir(ROOT)
    overrides = ["ep_size=1", f"data.path={tmp_path / 'unbuilt'}"]
    run = prepare(
        "pretrain/configs/demo.yaml", "ds_configs/zero1.json", overrides, dry_run=True
    )  # 2.9 million
    with pytest.raises(
        ValueError, match="but this machine has 11,000,000; lower the model's sizes, or raise"
    ):
        setup.check_host_memory(run.model_config, sharded_over=1)
    setup.check_host_memory(run.model_config, sharded_over=2)
    setup.check_host_memory(run.model_config, sharded_over=1, element_bytes=2)
    assert ": MORE THAN THIS MACHINE'S 11.0 MB" in describe(run)


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
