"""Attacks on --init: damaged, hostile and vanished folders of weights; the record of one in a run."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.loading.loader import Loader
from data_pipeline.tokenization.tokenizer import Tokenizer
from model import ModelConfig, ZeroModel
from model.export_files import (
    CONFIG_NAME,
    TOKENIZER_NAME,
    WEIGHTS_NAME,
    load_config,
    save_weights,
    saving_weights,
)
from model.weight_writer import describe, weights_digest
from pretrain import setup
from pretrain.init import BASE, RECORD, base_weights, given_values, save_base, write_record
from pretrain.setup import Run, prepare

from ..conftest import ROOT
from .mutations import byte_mutations, config_mutations, refusal

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "moe_intermediate_size": 32}
SIZES |= {"n_routed_experts": 4, "max_position_embeddings": 128}
NAME = "model.layers.1.self_attn.o_proj.weight"
few_or_all = pytest.mark.parametrize("count", [8, pytest.param(200, marks=pytest.mark.slow)])
Prepared = Callable[..., Run]


@pytest.fixture
def folder(data_folder: Path, tmp_path: Path) -> Path:
    start = tmp_path / "start"
    tokenizer = Loader(data_folder, 64, 4, 0, 0, 1, "train").tokenizer_path
    config = ModelConfig.from_dict({**SIZES, "vocab_size": Tokenizer(tokenizer).vocab_size})
    save_weights(start, config, dict(ZeroModel(config, seed=7).state_dict()))
    shutil.copyfile(tokenizer, start / TOKENIZER_NAME)
    return start


@pytest.fixture
def started(folder: Path, data_folder: Path, tmp_path: Path, monkeypatch) -> Prepared:
    """Prepares a run and reads the weights into a model, as the engine does."""
    monkeypatch.chdir(ROOT)

    def attempt(*overrides: str, init: Path = folder) -> Run:
        given = [f"data.path={data_folder}", f"output_dir={tmp_path / 'run'}", "data.sequence_length=64"]
        given += ["eval_every=0", "optimizer.warmup_steps=1", "max_steps=4", *overrides]
        run = prepare("pretrain/configs/continue.yaml", "ds_configs/zero2.json", given, init=init)
        assert isinstance(run, Run)
        assert run.start is not None
        model = ZeroModel(run.model_config)
        with given_values(run.start) as given:
            for name, value in model.state_dict().items():
                value.copy_(given(name))
        assert all(value.isfinite().all() for value in model.state_dict().values())
        return run

    return attempt


@few_or_all
@pytest.mark.parametrize("name", [CONFIG_NAME, TOKENIZER_NAME, WEIGHTS_NAME])
def test_damaged_bytes(started, folder, name, count):
    whole = (folder / name).read_bytes()
    for _, content in byte_mutations(whole, count, seed=1):
        (folder / name).write_bytes(content)
        refusal(started)
    (folder / name).write_bytes(whole)
    assert refusal(started) is None


@few_or_all
def test_wrong_values_in_the_config(started, folder, count):
    values = json.loads((folder / CONFIG_NAME).read_text())
    for _, mutated in config_mutations(values, count, seed=2):
        (folder / CONFIG_NAME).write_text(json.dumps(mutated))
        refusal(started)


def test_a_header_that_lies(started, folder):
    """About the shape of a tensor whose bytes it gives correctly; about bytes that are not there."""
    content = (folder / WEIGHTS_NAME).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]

    def written(**changes: Any) -> None:
        text = json.dumps({**header, NAME: {**header[NAME], **changes}}).encode()
        (folder / WEIGHTS_NAME).write_bytes(len(text).to_bytes(8, "little") + text + data)

    rows, columns = header[NAME]["shape"]
    written(shape=[columns * 2, rows // 2])
    assert f"{NAME} is {(columns * 2, rows // 2)}, expected {(rows, columns)}" in (refusal(started) or "")
    written(shape=[10**6, 10**6])
    assert "is damaged" in (refusal(started) or "")
    written(data_offsets=[0, 10**12])
    assert "is damaged" in (refusal(started) or "")
    (folder / WEIGHTS_NAME).write_bytes((10**15).to_bytes(8, "little") + content[8:])
    assert "is damaged" in (refusal(started) or "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(NAME), f"does not fit the model: {NAME} is missing, expected "),
        (lambda w: w.update(more=torch.zeros(1)), "does not fit the model: more is (1,), expected no such"),
        (lambda w: w.update({NAME: w[NAME].to(torch.int8)}), f"{NAME} has type I8, expected one of BF16"),
        (lambda w: w[NAME].view(-1)[5:6].fill_(torch.nan), f"{NAME} holds NaN or infinity; export"),
        (lambda w: w[NAME].view(-1)[5:6].fill_(torch.inf), f"{NAME} holds NaN or infinity; export"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(started, folder, change, message):
    weights = load_file(folder / WEIGHTS_NAME)
    change(weights)
    save_file(weights, folder / WEIGHTS_NAME)
    assert message in (refusal(started) or "")


def test_no_folder_a_file_and_folders_without_files(started, folder, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for init in (tmp_path / "nowhere", tmp_path / "file", tmp_path / "empty"):
        assert f"{init / CONFIG_NAME} is missing; give the export/ folder" in (
            refusal(lambda init=init: started(init=init)) or ""
        )
    (folder / WEIGHTS_NAME).unlink()
    assert f"{folder / WEIGHTS_NAME} is missing" in (refusal(started) or "")


def test_the_model_that_the_config_makes_of_it_is_not_built_if_it_is_too_large(started):
    line = refusal(lambda: started("model.intermediate_size=1000000000", "init.missing=allow"))
    assert "parameters, and a rank holds" in (line or "")


@pytest.fixture
def begun(started, folder, tmp_path, monkeypatch) -> Prepared:
    """The same start from the record in the run's folder, as if a checkpoint of it existed."""
    run = started("init.frozen=[lm_head.*]")
    run.folder.mkdir()
    write_record(run.folder, run.start)
    save_base(run.folder, run.start)
    shutil.move(folder, tmp_path / "moved")
    monkeypatch.setattr(setup, "choose_checkpoint", lambda *_, **__: tmp_path)
    return lambda: started("init.frozen=[lm_head.*]")


@few_or_all
def test_a_damaged_record_is_refused_in_a_line_or_fits(begun, tmp_path, count):
    whole = begun()
    assert whole.start.weights == whole.folder / BASE
    path = whole.folder / RECORD
    values = json.loads(path.read_text())
    assert values == json.loads(json.dumps(asdict(whole.start.source)))
    for _, mutated in config_mutations(values, count, seed=4):
        path.write_text(json.dumps(mutated))
        refusal(begun)
    for _, content in byte_mutations(json.dumps(values).encode(), count, seed=5):
        path.write_bytes(content)
        refusal(begun)
    path.unlink()
    assert "config.json is missing" in (refusal(begun) or "")


def test_another_folder_that_is_missing_too_is_not_taken_for_the_recorded_one(begun, started, tmp_path):
    line = refusal(lambda: started("init.frozen=[lm_head.*]", init=tmp_path / "typo"))
    assert f"--init {tmp_path / 'typo'} is missing; the run in {tmp_path / 'run'} began with " in (line or "")


def test_weights_in_shards_are_the_same_start(started, folder, tmp_path):
    whole = started("init.frozen=[lm_head.*]")
    split, state = tmp_path / "split", load_file(folder / WEIGHTS_NAME)
    stored = {name: describe(value) for name, value in state.items()}
    with saving_weights(split, load_config(folder), stored, limit=10**5) as writer:
        for name, value in state.items():
            writer.write(name, value)
    shutil.copyfile(folder / TOKENIZER_NAME, split / TOKENIZER_NAME)
    run = started("init.frozen=[lm_head.*]", init=split)
    assert len(list(split.glob("*.safetensors"))) > 1
    assert run.start.source.sha256 == whole.start.source.sha256
    assert run.start.origin == whole.start.origin
    run.folder.mkdir()
    save_base(run.folder, run.start)
    assert (run.folder / BASE).read_bytes() == (folder / WEIGHTS_NAME).read_bytes()
    next(split.glob("*.safetensors")).unlink()
    assert "is missing; export the checkpoint again" in (
        refusal(lambda: started("init.frozen=[lm_head.*]", init=split)) or ""
    )


def test_a_changed_base_is_copied_again_or_refused(started, folder, tmp_path):
    run = started("init.frozen=[lm_head.*]")
    run.folder.mkdir()
    save_base(run.folder, run.start)
    base, sha256 = run.folder / BASE, weights_digest(folder / WEIGHTS_NAME, "")
    content = bytearray(base.read_bytes())
    content[-1] ^= 64
    base.write_bytes(content)
    assert "is damaged: it does not hold the weights" in (
        refusal(lambda: base_weights(run.folder, sha256)) or ""
    )
    save_base(run.folder, run.start)
    assert weights_digest(base, "") == sha256
    base.unlink()
    (folder / WEIGHTS_NAME).write_bytes(content)
    assert "has changed since it was read" in (refusal(lambda: save_base(run.folder, run.start)) or "")
    assert not base.exists()
