"""Runs resumed under another layout: other ranks, another ep_size, another ZeRO stage."""

import json
import shutil
from pathlib import Path

import pytest

from ..conftest import ROOT

SAME = ("lr", "recurrence_depth", "target_tokens", "tokens", "expert_load")


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check(output: str, pairs: int, clipped: bool = True) -> None:
    reports = [json.loads(line[7:]) for line in output.splitlines() if line.startswith("REPORT ")]
    assert len(reports) == pairs
    for report in reports:
        assert report["different"] == [], report  # weights, moments or momentum, biases: bit-exact
        assert report["loss"] < 1e-5, report
        assert report["norm"] < 1e-5, report
        assert not clipped or report["smallest_norm"] > 0.3, report  # clipping took place
        assert report["left"] == ["latest", "step-3"], report  # the conversion's files are gone


def test_every_layout_of_two_ranks_loads_the_checkpoint_of_another(launch, tmp_path):
    done = launch(2, ROOT / "tests/pretrain/elastic_worker.py", "adamw", tmp_path, "save,each")
    check(done.stdout, 6)


@pytest.mark.slow
def test_with_muon_too(launch, tmp_path):
    done = launch(2, ROOT / "tests/pretrain/elastic_worker.py", "muon", tmp_path, "save,each")
    check(done.stdout, 6, clipped=False)


@pytest.mark.slow
def test_muon_on_one_two_and_four_ranks(launch, tmp_path):
    worker = ROOT / "tests/pretrain/elastic_worker.py"
    check(launch(2, worker, "muon", tmp_path, "save,all").stdout, 36, clipped=False)
    check(launch(1, worker, "muon", tmp_path, "all").stdout, 18, clipped=False)
    check(launch(4, worker, "muon", tmp_path, "each").stdout, 6, clipped=False)


@pytest.mark.slow
def test_every_layout_of_one_two_and_four_ranks_loads_every_checkpoint_of_two(launch, tmp_path):
    worker = ROOT / "tests/pretrain/elastic_worker.py"
    check(launch(2, worker, "adamw", tmp_path, "save,all").stdout, 36)
    check(launch(1, worker, "adamw", tmp_path, "all").stdout, 18)
    check(launch(4, worker, "adamw", tmp_path, "each").stdout, 6)


@pytest.mark.slow
def test_every_checkpoint_of_one_and_four_ranks_is_loaded_by_two(launch, tmp_path):
    worker = ROOT / "tests/pretrain/elastic_worker.py"
    for ranks, saved in ((1, 3), (4, 6)):
        check(launch(ranks, worker, "adamw", tmp_path / str(ranks), "save,each").stdout, saved)
        check(launch(2, worker, "adamw", tmp_path / str(ranks), "each").stdout, saved)


def continued(launch, training, run: Path, ranks: int, stage: str, max_steps: int, *more: str) -> str:
    command = training(run, f"max_steps={max_steps}", "optimizer.decay_steps=6", *more)
    command[command.index("ds_configs/zero3_ep.json")] = f"ds_configs/{stage}.json"
    return launch(ranks, *command).stdout


def equal_to_rounding(run: Path, whole: Path) -> None:
    assert len(metrics(run)) == len(metrics(whole))
    for ours, theirs in zip(metrics(run), metrics(whole), strict=True):
        assert abs(ours["loss"] - theirs["loss"]) < 1e-5
        assert abs(ours["grad_norm"] - theirs["grad_norm"]) < 1e-5
        assert [ours[key] for key in SAME] == [theirs[key] for key in SAME]


def test_the_same_command_continues_on_one_rank(launch, training, six_steps, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(six_steps, run)
    for step in (4, 6):
        shutil.rmtree(run / f"checkpoints/step-{step}")
    (run / "checkpoints/converting").mkdir()  # left by a killed conversion
    said = continued(launch, training, run, 1, "zero1", 6, "ep_size=1", "save_every=2")
    changes = "world_size 2 -> 1, ep_size 2 -> 1, zero_stage 3 -> 1"
    assert f"resuming from {run}/checkpoints/step-2, converted: {changes}" in said
    equal_to_rounding(run, six_steps)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-4", "step-6"]


@pytest.mark.slow
def test_a_run_moves_from_two_ranks_to_four_to_one_and_back(launch, training, six_steps, tmp_path):
    run = tmp_path / "run"
    continued(launch, training, run, 2, "zero3_ep", 2)
    continued(launch, training, run, 4, "zero2", 3, "ep_size=4")
    continued(launch, training, run, 1, "zero1", 4, "ep_size=1")
    continued(launch, training, run, 4, "zero3_ep", 5, "ep_size=2")
    continued(launch, training, run, 2, "zero1", 6, "ep_size=2")
    equal_to_rounding(run, six_steps)
