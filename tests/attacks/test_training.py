"""Attacks on training: nothing to learn from, weights that are not finite, kills, layouts, damaged saves."""

import hashlib
import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.loading.loader import Loader
from model.losses import IGNORE_INDEX
from pretrain.checkpoint import MANIFEST
from pretrain.export import export_run
from pretrain.init import BASE
from pretrain.lora import merged

from ..pretrain.conftest import begin, finish, launch, seal, six_steps, train, unlink_buffer
from ..pretrain.test_stopping import wait_for_step
from .mutations import byte_mutations

__all__ = ["begin", "launch", "six_steps", "train"]

ONE_RANK = ("ep_size=1", "global_batch_size=1", "micro_batch_size=1")
MUON = ("optimizer.kind=muon", "optimizer.clip=0", "save_every=1", "keep_last=9", "eval_every=0")


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def validated_targets(data: Path, seed: int) -> int:
    """How many targets the first validation batch of one row of four tokens holds."""
    batch = Loader(data, 4, 1, seed, 0, 1, "validation").batch(0)
    return int((batch.targets != IGNORE_INDEX).sum())


def test_batches_and_validation_without_targets_are_null_and_a_warning(train, data_folder, tmp_path):
    """Rows of four tokens of a task whose questions are masked: most hold no target."""
    run = tmp_path / "run"
    seed = next(seed for seed in range(99) if not validated_targets(data_folder, seed))
    options = (
        f"seed={seed}",
        "data.sequence_length=4",
        "max_steps=12",
        "eval_every=1",
        "eval_batches=1",
        "log_every=1",
    )
    said = train(run, *ONE_RANK, *options, ranks=1).stdout
    steps = metrics(run)
    without = [step for step in steps if step["target_tokens"] == 0]
    assert 0 < len(without) < len(steps)
    assert all(step["loss"] is None and "skipped" not in step for step in without)
    assert all(step["val_loss"] is None for step in steps)
    assert said.count("warning: none of the 1 validation batches has a target") == len(steps)
    assert "val_loss none" in said
    assert all(step["loss"] > 1 for step in steps if step not in without)
    assert said.count("loss without targets") == len(without)
    assert said.count(f"warning: no token of step {without[0]['step']} is a target") == 1
    assert said.count("warning: no token of step") == 1
    assert "loss 0.0000" not in said


@pytest.mark.parametrize("stage", ["1", pytest.param("2", marks=pytest.mark.slow), "3"])
def test_weights_that_are_not_finite_are_never_saved(launch, stage):
    """NaN in one rank's shard: every rank raises the same line, so that none is left waiting."""
    output = launch(2, Path(__file__).with_name("broken_weights.py"), stage).stdout
    lines = [line for line in output.splitlines() if line.startswith("REFUSED")]
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert "since model.norm.weight holds NaN or infinity; the older checkpoints are untouched" in lines[0]


@pytest.fixture(scope="module")
def poisoned(six_steps, tmp_path_factory) -> Path:
    """A run whose newest checkpoint holds a NaN, as a version that did not look would have written it."""
    run = tmp_path_factory.mktemp("poisoned") / "run"
    shutil.copytree(six_steps, run)
    checkpoint = run / "checkpoints/step-6"
    for path in checkpoint.glob("*_optim_states.pt"):
        contents = torch.load(path, weights_only=False)
        for flat in contents["optimizer_state_dict"]["fp32_flat_groups"]:
            flat[-1] = torch.nan
        torch.save(contents, path)
    seal(checkpoint)
    return run


def test_a_checkpoint_with_nan_is_not_resumed(train, poisoned, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(poisoned, run)
    result = train(run, "max_steps=8", "optimizer.decay_steps=6", check=False)
    assert result.returncode
    assert "holds NaN or infinity in checkpoint " in result.stderr
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr


def test_a_checkpoint_with_nan_is_not_exported(poisoned, tmp_path):
    with pytest.raises(ValueError, match="holds NaN or infinity in the weights to export to"):
        export_run(poisoned, 6, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_never_exported(six_steps, tmp_path, count):
    """Whatever byte of whatever file: a line, and no export."""
    draw = random.Random(4)
    files = sorted(path for path in (six_steps / "checkpoints/step-4").iterdir() if path.is_file())
    for number in range(count):
        run = tmp_path / str(number)
        shutil.copytree(six_steps, run)
        file = run / "checkpoints/step-4" / draw.choice(files).name
        content = file.read_bytes()
        [(_, damaged)] = byte_mutations(content, 1, seed=number)
        if file.name == MANIFEST and b"".join(damaged.split()) == b"".join(content.split()):
            continue  # a space of JSON
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="is not a whole checkpoint") as error:
            export_run(run, 4, tmp_path / "out")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()
        shutil.rmtree(run)


def test_the_export_of_an_older_checkpoint_is_a_warning(six_steps, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(six_steps, run)
    (run / "checkpoints/step-6/state.json").write_text("{}")
    assert export_run(run, None, tmp_path / "out").name == "step-4"
    assert "warning: " in (said := capsys.readouterr().err)
    assert "step-6 is not whole (state.json has 2 bytes" in said
    shutil.rmtree(run / "checkpoints/step-4")
    shutil.rmtree(run / "checkpoints/step-2")
    with pytest.raises(FileNotFoundError, match=r"holds no whole checkpoint; .* \(.*step-6 is not whole"):
        export_run(run, None, tmp_path / "other")


def test_a_checkpoint_of_another_model_than_it_says_is_refused(six_steps, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(six_steps, run)
    path = run / "checkpoints/step-6/state.json"
    state = json.loads(path.read_text())
    state["model"]["hidden_size"] *= 2
    path.write_text(json.dumps(state))
    seal(path.parent)
    with pytest.raises(
        ValueError, match=r"does not hold the model of its state.json: \S+ has [\d,]+ numbers"
    ):
        export_run(run, 6, tmp_path / "out")


@pytest.mark.parametrize("count", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_a_damaged_base_of_adapters_is_refused(tmp_path, count):
    content = random.Random(1).randbytes(4000)
    adapters = {"r": 1, "alpha": 1, "base": hashlib.sha256(content).hexdigest()[:16]}
    for _, damaged in byte_mutations(content, count, seed=2):
        (tmp_path / BASE).write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged: it does not hold the weights"):
            list(merged(tmp_path, [], adapters))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def farthest(one: Path, other: Path) -> float:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs)


@pytest.fixture(scope="module")
def undisturbed(train, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("muon") / "run"
    train(run, *MUON, "max_steps=6")
    return run


@pytest.mark.slow
@pytest.mark.parametrize("killed_after", [1, 3])
def test_muon_survives_kills(begin, train, training, undisturbed, tmp_path, killed_after):
    """kill -9 of both ranks, then the same command: the export is the undisturbed run's, bit for bit."""
    run = tmp_path / "run"
    launcher = begin(2, *training(run, *MUON, "max_steps=6"))
    wait_for_step(run, killed_after, launcher)
    for process in [launcher.rank(number) for number in (0, 1)]:
        process.send_signal(signal.SIGKILL)
    finish(launcher, check=False)
    unlink_buffer(launcher)
    train(run, *MUON, "max_steps=6")
    assert farthest(run / "export", undisturbed / "export") == 0


@pytest.mark.slow
def test_muon_moves_through_layouts(launch, training, undisturbed, tmp_path):
    """Two ranks with expert parallelism, then one, then two with ZeRO-2 and offload, which also exports."""
    run = tmp_path / "run"
    offload = tmp_path / "offload.json"
    offload.write_text(
        json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    )
    for ranks, ds_config, steps, more in (
        (2, "ds_configs/zero3_ep.json", 2, ()),
        (1, "ds_configs/zero1.json", 4, ("ep_size=1",)),
        (2, str(offload), 6, ("ep_size=1",)),
    ):
        command = training(run, *MUON, f"max_steps={steps}", "optimizer.decay_steps=6", *more)
        command[command.index("ds_configs/zero3_ep.json")] = ds_config
        launch(ranks, *command)
    # Newton-Schulz in bf16 magnifies the rounding of another order of summation.
    assert farthest(run / "export", undisturbed / "export") < 0.05
    pairs = zip(metrics(run), metrics(undisturbed), strict=True)
    assert max(abs(ours["loss"] - theirs["loss"]) for ours, theirs in pairs) < 0.02
    export_run(run, 6, tmp_path / "offline")
    assert farthest(tmp_path / "offline", run / "export") == 0
