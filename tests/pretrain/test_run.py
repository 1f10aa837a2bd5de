"""The training command itself: run folder, resume, export."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.loading.loader import Loader
from data_pipeline.shards.manifest import open_manifest
from data_pipeline.tokenization.tokenizer import Tokenizer
from model import ModelConfig, load_pretrained
from model.recurrence import sample_depths
from pretrain import checkpoint
from pretrain.export import export_run
from pretrain.run_config import load_run_config

from ..conftest import ROOT, TINY

FIELDS = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "mfu", "recurrence_depth"}
DEPTH = [
    "model.recurrence.depth_sampling=poisson",
    "model.recurrence.depth_schedule=[{step: 1, num_steps: 2}, {step: 5, num_steps: 4.5}]",
    "model.recurrence.max_steps=6",
    "model.recurrence.halting.kind=ponder",
    "model.recurrence.halting.threshold=0.3",
    "model.recurrence.halting.sparsity_weight=0.01",
    "save_every=3",
    "data.packing=best_fit",
]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(train, tmp_path_factory) -> tuple[Path, Path]:
    """Six uninterrupted steps, and three steps resumed for three more."""
    folder = tmp_path_factory.mktemp("runs")
    whole, parts = folder / "whole", folder / "parts"
    train(whole, "max_steps=6", "eval_every=3", "eval_batches=1", *DEPTH)
    train(parts, "max_steps=3", "optimizer.decay_steps=6", *DEPTH)
    assert (parts / "DONE").read_text() == "3\n"
    with (parts / "metrics.jsonl").open("a") as log:  # a killed run may leave lines beyond its checkpoint
        log.write(json.dumps({**metrics(parts)[-1], "step": 4}) + '\n{"step": 5, "lo')
    resumed = train(parts, "max_steps=6", "optimizer.decay_steps=6", *DEPTH, "wandb.mode=offline")
    assert f"resuming from {parts}/checkpoints/step-3" in resumed.stdout
    assert "done: 6 steps" in resumed.stdout
    return whole, parts


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_exactly(runs):
    whole, parts = (metrics(run) for run in runs)
    assert [r["step"] for r in parts] == [r["step"] for r in whole] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "grad_norm", "lr", "recurrence_depth", "expert_load", "target_tokens"):
        assert [r[key] for r in parts] == [r[key] for r in whole], key
    exported = [load_file(run / "export/model.safetensors") for run in runs]
    assert all(torch.equal(exported[0][name], exported[1][name]) for name in exported[0])


def test_one_process_without_a_launcher_trains_the_same_model(runs, data_folder, tmp_path):
    """Two ranks with expert parallelism against one without, through the whole command."""
    run = tmp_path / "alone"
    arguments = ["--ds_config", "ds_configs/zero3_ep.json", "--config", "pretrain/configs/demo.yaml"]
    overrides = [*TINY, *DEPTH, f"output_dir={run}", f"data.path={data_folder}", "max_steps=6", "ep_size=1"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "pretrain/main.py", *arguments, *overrides, "eval_every=0"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300, capture_output=True)
    for alone, together in zip(metrics(run), metrics(runs[0]), strict=True):
        assert abs(alone["loss"] - together["loss"]) < 1e-5
        assert abs(alone["grad_norm"] - together["grad_norm"]) < 1e-5
        assert alone["expert_load"] == together["expert_load"]


def test_torchrun_trains_bit_exactly_as_deepspeed_does(runs, training, tmp_path):
    torchrun = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, *training(tmp_path, "max_steps=6", "eval_every=0", *DEPTH)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300, capture_output=True)
    for key in ("loss", "grad_norm", "expert_load"):
        assert [r[key] for r in metrics(tmp_path)] == [r[key] for r in metrics(runs[0])], key


ROW_DEPTHS = [
    "model.recurrence.depth_sampling=poisson",
    "model.recurrence.depth_per=sequence",
    "model.recurrence.depth_schedule=[{step: 0, num_steps: 2, backprop_steps: 1}, "
    "{step: 3, num_steps: 4, backprop_steps: 3}]",
    "model.recurrence.max_steps=6",
    "optimizer.decay_steps=4",
    "eval_every=0",
    "save_every=2",
]


def test_metrics_show_the_depths_that_rows_draw(train, tmp_path):
    train(tmp_path, "max_steps=2", "micro_batch_size=2", *ROW_DEPTHS)
    config = load_run_config(str(tmp_path / "config.yaml"), [])
    model = ModelConfig.from_dict(config.model)
    for step, record in enumerate(metrics(tmp_path)):
        depths = sample_depths(model, config.seed, step, 8)
        assert record["recurrence_depth"] == record["steps_mean"] == depths.double().mean()
        assert record["steps_histogram"] == (depths.bincount()[1:] / 8).tolist()
        assert record["dropped_tokens"] == 0  # experts count the steps that rows take, no others


@pytest.mark.slow
def test_rows_of_different_depths_train_the_same_in_other_micro_batches_and_after_a_resume(train, tmp_path):
    train(tmp_path / "whole", "max_steps=4", "micro_batch_size=4", *ROW_DEPTHS)
    for steps in (2, 4):
        train(tmp_path / "parts", f"max_steps={steps}", "micro_batch_size=1", *ROW_DEPTHS)
    whole, parts = (metrics(tmp_path / name) for name in ("whole", "parts"))
    assert [r["step"] for r in parts] == [r["step"] for r in whole] == [1, 2, 3, 4]
    for a, b in zip(whole, parts, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5
        assert abs(a["grad_norm"] - b["grad_norm"]) < 1e-5
        for key in ("recurrence_depth", "steps_histogram", "halting_distribution", "expert_load"):
            assert a[key] == b[key], key
        assert a["residuals"] == pytest.approx(b["residuals"], rel=1e-4)
        assert a["dropped_tokens"] == b["dropped_tokens"] == 0


@pytest.mark.slow
def test_zero_1_resumes_bit_exactly_and_exports_offline(data_folder, tmp_path):
    """What the experiments use: one process, dense layers."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}

    def start(run: Path, max_steps: int) -> list[dict]:
        paths = [f"output_dir={run}", f"data.path={data_folder}", f"max_steps={max_steps}"]
        options = [
            "ep_size=1",
            "eval_every=0",
            "model.use_moe=false",
            "optimizer.decay_steps=4",
            "save_every=2",
        ]
        arguments = ["--ds_config", "ds_configs/zero1.json", "--config", "pretrain/configs/demo.yaml"]
        command = [sys.executable, "pretrain/main.py", *arguments, *TINY, *paths, *options]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300, capture_output=True)
        return metrics(run)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = start(whole, 4)
    start(parts, 2)
    resumed = start(parts, 4)
    for key in ("loss", "grad_norm", "lr"):
        assert [r[key] for r in resumed] == [r[key] for r in expected], key
    exported = load_file(parts / "export/model.safetensors")
    export_run(parts, 4, tmp_path / "offline")
    offline = load_file(tmp_path / "offline/model.safetensors")
    assert all(torch.equal(exported[name], offline[name]) for name in exported)


def test_the_run_folder_is_complete(runs, data_folder):
    run, records = runs[0], metrics(runs[0])
    for name in ("config.yaml", "ds_config.json", "environment.json", "DONE", "tokenizer.model"):
        assert (run / name).is_file(), name
    described = json.loads((run / "export/training_data.json").read_text())
    assert described["manifest_sha256"] == open_manifest(data_folder).sha256
    assert described["decontaminated_against"] == []  # generated programs only
    assert (run / "checkpoints/latest").read_text() == "step-6\n"
    assert checkpoint.damage(run / "checkpoints/step-6") is None
    for record in records:
        assert set(record) >= FIELDS
        assert record["damaged_rows"] == 0
        assert record["dropped_tokens"] == 0  # the loads add up to every choice of every token and loop step
        assert 0 <= record["expert_load_entropy"] <= 1
        depth = record["recurrence_depth"]
        for name in ("halting_distribution", "steps_histogram", "residuals"):
            assert len(record[name]) == depth
        assert sum(record["halting_distribution"]) == pytest.approx(1)
        used = sum(n * share for n, share in enumerate(record["steps_histogram"], 1))
        assert record["steps_mean"] == pytest.approx(used)
        assert record["loss_ponder"] >= 0
        assert 0 < record["loss_sparsity"] < 1
        for shares in record["expert_load"]:
            assert abs(sum(shares) - 1) < 1e-9
    assert len({r["recurrence_depth"] for r in records}) > 1
    assert [r["step"] for r in records if "save_seconds" in r] == [4]
    assert 0 < sum(r["padded_tokens"] for r in records) < 8 * 64
    assert any(0 < share < 1 for r in records for share in r["steps_histogram"])  # tokens halted apart
    assert [r["step"] for r in records if "val_loss" in r] == [3, 6]
    assert records[-1]["tokens"] == 6 * 8 * 64
    resolved = load_run_config(str(run / "config.yaml"), [])
    assert resolved.model["hidden_size"] == 32
    assert resolved.model["vocab_size"] == Tokenizer(data_folder / "tokenizer.model").vocab_size
    assert list((runs[1] / "wandb").glob("offline-run-*"))


def test_the_exported_model_has_the_loss_that_training_reported(runs, data_folder):
    model = load_pretrained(runs[0] / "export")
    batch = Loader(data_folder, 64, 8, seed=0, split="validation", packing="best_fit").batch(0)
    tokens, targets = (torch.from_numpy(x).long() for x in (batch.tokens, batch.targets))
    with torch.no_grad():
        out = model(tokens, targets=targets, cu_seqlens=torch.from_numpy(batch.cu_seqlens))
    loss = float(out.loss_sums["cross_entropy"]) / int((targets != -100).sum())
    assert abs(loss - metrics(runs[0])[-1]["val_loss"]) < 1e-5


def test_offline_export_equals_the_live_one(runs, tmp_path):
    export_run(runs[0], None, tmp_path / "last")
    export_run(runs[0], 3, tmp_path / "middle")
    live = load_file(runs[0] / "export/model.safetensors")
    last, middle = (load_file(tmp_path / name / "model.safetensors") for name in ("last", "middle"))
    assert live.keys() == last.keys() == middle.keys()
    assert all(torch.equal(live[name], last[name]) for name in live)
    assert any(not torch.equal(live[name], middle[name]) for name in live)
    assert load_pretrained(tmp_path / "last").config == load_pretrained(runs[0] / "export").config
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 5; it has 6, 3"):
        export_run(runs[0], 5, tmp_path / "none")


def test_a_damaged_row_within_the_budget_is_counted_and_skipped(data_folder, train, tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(data_folder, data)
    shard = max(data.glob("*-train-*.tar"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    options = ("max_steps=3", "eval_every=0", "ep_size=1", f"data.path={data}")
    refused = train(run, *options, ranks=1, check=False)
    assert refused.returncode
    assert f"{shard.name} member" in refused.stderr
    train(run, *options, "data.max_damaged_rows=1000", ranks=1)
    last = metrics(run)[-1]
    assert last["damaged_rows"] > 0
    assert last["padded_tokens"] > 0
    assert last["dropped_tokens"] == 0
