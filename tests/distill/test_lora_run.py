"""Runs with LoRA from the command line: killed, resumed, exported."""

import argparse
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.loading.loader import Loader
from data_pipeline.tokenization.tokenizer import Tokenizer
from distill.main import prepare_distillation
from model import ModelConfig, ZeroModel, load_pretrained
from model.export_files import TOKENIZER_NAME, save_weights
from pretrain.export import export_run

from ..conftest import ROOT
from ..pretrain.conftest import finish, unlink_buffer
from ..pretrain.test_stopping import wait_for_step

STEPS = 8
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "max_position_embeddings": 512}
SIZES |= {"use_mla": True, "n_routed_experts": 4, "moe_intermediate_size": 16, "initializer_range": 0.05}


@pytest.fixture(scope="module")
def teacher(traced_data, tmp_path_factory) -> Path:
    """An export of untrained weights."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = Loader(traced_data, 240, 4, 0, 0, 1, "train", packing="best_fit").tokenizer_path
    config = ModelConfig.from_dict({**SIZES, "vocab_size": Tokenizer(tokenizer).vocab_size})
    save_weights(folder, config, dict(ZeroModel(config, seed=7).state_dict()))
    shutil.copyfile(tokenizer, folder / TOKENIZER_NAME)
    return folder


def command(teacher: Path, data: Path, run: Path, *more: str) -> list[str]:
    """KaVa with adapters whose dropout draws, and the average of what is trained."""
    return [
        *("distill/main.py", "--ds_config", "ds_configs/zero2.json", "--config", "distill/configs/kava.yaml"),
        *("--init", str(teacher), f"data.path={data}", f"output_dir={run}", "data.sequence_length=240"),
        *("global_batch_size=4", "micro_batch_size=1", "eval_every=2", "eval_batches=1", "save_every=2"),
        *("keep_last=9", "optimizer.lr=1e-2", "optimizer.warmup_steps=1", "optimizer.ema_decay=0.5"),
        *("lora.r=4", f"max_steps={STEPS}", *more),
    ]


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path, name: str = "export") -> dict[str, torch.Tensor]:
    return load_file(run / name / "model.safetensors")


@pytest.fixture(scope="module")
def whole(launch, teacher, traced_data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    said = launch(2, *command(teacher, traced_data, run)).stdout
    thoughts = 32 + 2 * (32 * 32 + 32) + 2 * 32
    model = load_pretrained(run / "export")
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "latent_" not in n]
    adapters = sum(4 * (m.in_features + m.out_features) for m in linears)
    assert f"{adapters + thoughts:,} trained (LoRA)" in said
    return run


def test_the_export_is_plain_and_frozen_weights_are_unchanged(whole, teacher):
    ours, start = weights(whole), load_file(teacher / "model.safetensors")
    assert {name for name in ours if not name.startswith("latent_thoughts")} == set(start)
    model = load_pretrained(whole / "export")
    adapted = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, value in start.items():
        if name in adapted:
            rank = torch.linalg.matrix_rank(ours[name] - value, atol=1e-4)
            assert 0 < rank <= 4, name
        elif not name.endswith("e_score_correction_bias"):  # the trainer's, which balances loads
            assert torch.equal(ours[name], value), name
    averaged = weights(whole, "export_ema")
    assert any(not torch.equal(ours[name], averaged[name]) for name in adapted)


def test_checkpoints_hold_what_is_trained_and_export_the_same(whole, tmp_path):
    """They are smaller than the frozen weights alone; the export needs only the run's folder."""
    checkpoint = whole / f"checkpoints/step-{STEPS}"
    [path] = checkpoint.glob("mp_rank_*_model_states.pt")
    names = torch.load(path, weights_only=False)["module"]
    assert names
    held = [name for name in names if "lora_" not in name and not name.startswith("latent_thoughts.")]
    assert all(name.endswith("e_score_correction_bias") for name in held)
    out = tmp_path / "out"
    export_run(whole, STEPS, out)
    for name in ("", "_ema"):
        ours, theirs = load_file(f"{out}{name}/model.safetensors"), weights(whole, f"export{name}")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.slow
def test_a_killed_run_ends_like_an_undisturbed_one(begin, launch, whole, teacher, traced_data, tmp_path):
    """Bit-exactly, including each step's dropout."""
    run = tmp_path / "run"
    launcher = begin(2, *command(teacher, traced_data, run))
    wait_for_step(run, 3, launcher)
    processes = [launcher.rank(number) for number in (0, 1)]
    for process in processes:
        process.send_signal(signal.SIGKILL)
    finish(launcher, check=False)
    unlink_buffer(launcher)
    assert not (run / "DONE").exists()
    said = launch(2, *command(teacher, traced_data, run)).stdout
    assert "resuming from" in said
    for key in ("step", "loss", "loss_kv", "grad_norm", "val_loss"):
        assert [r.get(key) for r in records(run)] == [r.get(key) for r in records(whole)], key
    for name in ("export", "export_ema"):
        ours, theirs = weights(run, name), weights(whole, name)
        assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


@pytest.mark.slow
def test_another_layout_resumes(launch, whole, teacher, traced_data, tmp_path):
    """One rank and two after two, without dropout, which draws by rank."""
    seen = []
    for ranks in (1, 2):
        run = tmp_path / str(ranks)
        shutil.copytree(whole, run)
        for later in range(4, STEPS + 1, 2):
            shutil.rmtree(run / f"checkpoints/step-{later}")
        more = ("lora.dropout=0", "max_steps=4")
        said = launch(ranks, *command(teacher, traced_data, run, *more)).stdout
        assert "checkpoints/step-2" in said
        assert ("converted: world_size 2 -> 1" in said) == (ranks == 1)
        seen.append(records(run))
    assert [r["step"] for r in seen[0]] == [1, 2, 3, 4]
    for key in ("loss", "grad_norm", "loss_kv"):
        ours, theirs = ([r[key] for r in records] for records in seen)
        assert ours == pytest.approx(theirs, rel=1e-5), key
    for name in ("export", "export_ema"):
        ours, theirs = (weights(tmp_path / ranks, name) for ranks in "12")
        assert max((ours[n] - theirs[n]).abs().max() for n in theirs) < 1e-4


@pytest.mark.slow
def test_zero3_shards_frozen_weights(launch, teacher, traced_data, tmp_path):
    """A method without thoughts, which ZeRO-3 takes: a resumed run and the offline export are the same."""
    run, again = tmp_path / "run", tmp_path / "again"
    for folder in (run, again):
        flags = command(teacher, traced_data, folder, "max_steps=4", "model.distillation.method=cot")
        flags[flags.index("ds_configs/zero2.json")] = "ds_configs/zero3_ep.json"
        said = launch(2, *flags).stdout
        assert ("resuming from" in said) == (folder == again)
        if folder == run:
            shutil.copytree(run, again)
            shutil.rmtree(again / "checkpoints/step-4")
    export_run(run, 4, tmp_path / "offline")
    whole = weights(run)
    for other in (weights(again), load_file(tmp_path / "offline/model.safetensors")):
        assert all(torch.equal(other[name], whole[name]) for name in whole)
    frozen = load_file(teacher / "model.safetensors")
    assert torch.equal(whole["model.embed_tokens.weight"], frozen["model.embed_tokens.weight"])
    assert not torch.equal(
        whole["model.layers.0.self_attn.o_proj.weight"], frozen["model.layers.0.self_attn.o_proj.weight"]
    )


def test_other_adapters_or_another_start_are_refused(whole, teacher, traced_data, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    changed = load_file(other / "model.safetensors")
    changed["model.norm.weight"] += 1
    save_weights(other, load_pretrained(teacher).config, changed)
    for init, more in ((other, ()), (teacher, ("lora.alpha=8",)), (teacher, ("lora=null",))):
        _, *flags = command(teacher, traced_data, whole, *more)
        given = {
            "ds_config": flags[1],
            "config": [flags[3]],
            "init": init,
            "overrides": flags[6:],
            "dry_run": False,
        }
        with pytest.raises(ValueError, match="same lora.r, lora.alpha and --init, or another output_dir"):
            prepare_distillation(argparse.Namespace(**given))
