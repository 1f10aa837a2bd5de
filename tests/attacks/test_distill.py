"""Attacks on distill/: traces that no data set should hold, damaged teachers, contradictory configs."""

import argparse
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from data_pipeline.loading.loader import Loader
from data_pipeline.tokenization.tokenizer import Tokenizer
from distill.main import prepare_distillation
from distill.methods import METHODS
from model import ModelConfig, ZeroModel
from model.export_files import CONFIG_NAME, TOKENIZER_NAME, WEIGHTS_NAME, save_weights

from ..conftest import ROOT
from ..distill.conftest import begin, launch, traced_data
from ..distill.test_student import model
from ..distill.traces import Document, documents, packed
from .mutations import byte_mutations, config_mutations

__all__ = ["begin", "launch", "traced_data"]

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "max_position_embeddings": 512}
SIZES |= {"use_mla": True, "n_routed_experts": 4, "moe_intermediate_size": 16}
NORMAL = documents(2)
ODD = {
    "empty trace": Document([9, 10], [], [11]),
    "one token": Document([9, 10], [[25]], [11]),
    "empty steps": Document([9, 10], [[], []], [11]),
    "empty question": Document([], [[25, 26]], [11]),
    "empty answer": Document([9], [[25, 26]], []),
    "long trace": Document([9], [[25] * 60], [11]),
}


def odd_batches() -> dict[str, list[list[Document]]]:
    alone = {name: [[document]] for name, document in ODD.items()}
    beside = {f"{name}, beside others": [[d, NORMAL[0]], [NORMAL[1]]] for name, d in ODD.items()}
    return {**alone, **beside, "no documents": [[]], "an empty row": [[], [NORMAL[0]]]}


FAST = ("cot", "coconut", "kava", "lotus")


@pytest.mark.parametrize(
    "method", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_odd_traces_give_finite_losses_and_gradients(method):
    """Every weight gets a gradient, or ranks would wait for each other."""
    student = model("latent attention", method)
    for name, rows in odd_batches().items():
        for step in (0, 5) if method == "coconut" else (0,):
            student.zero_grad()
            student.training_step = step
            output = student(**packed(rows, 160))
            output.loss.backward()
            assert all(value.isfinite().all() for value in output.loss_sums.values()), name
            for weight, parameter in student.named_parameters():
                assert parameter.grad is not None, (name, weight)
                assert parameter.grad.isfinite().all(), (name, weight)


@pytest.fixture(scope="module")
def teacher(traced_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of untrained weights."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = Loader(traced_data, 240, 4, 0, 0, 1, "train", packing="best_fit").tokenizer_path
    config = ModelConfig.from_dict({**SIZES, "vocab_size": Tokenizer(tokenizer).vocab_size})
    save_weights(folder, config, dict(ZeroModel(config, seed=7).state_dict()))
    shutil.copyfile(tokenizer, folder / TOKENIZER_NAME)
    return folder


@pytest.fixture
def refused(teacher, traced_data, tmp_path, monkeypatch):
    """Prepares a run; returns the one line by which it is refused, or None if it is not."""
    monkeypatch.chdir(ROOT)

    def attempt(
        init: Path = teacher, config: str = "distill/configs/kava.yaml", overrides: tuple[str, ...] = ()
    ) -> str | None:
        flags = [f"data.path={traced_data}", f"output_dir={tmp_path / 'run'}", "data.sequence_length=240"]
        flags += ["global_batch_size=4", "micro_batch_size=1", "max_steps=4", *overrides]
        given = argparse.Namespace(
            config=[config], ds_config="ds_configs/zero2.json", init=init, overrides=flags, dry_run=False
        )
        line = None
        try:
            prepare_distillation(given)
        except (ValueError, OSError) as error:
            line = str(error)
        assert line is None or "\n" not in line
        return line

    return attempt


COUNT = [6, pytest.param(150, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNT)
@pytest.mark.parametrize("name", [CONFIG_NAME, TOKENIZER_NAME, WEIGHTS_NAME])
def test_a_damaged_teacher_is_refused_in_a_line_or_fits(refused, teacher, tmp_path, name, count):
    """No checksum covers an export: a weight whose bit changed is read, unless it is NaN or infinity."""
    damaged = tmp_path / "teacher"
    shutil.copytree(teacher, damaged)
    for _, content in byte_mutations((teacher / name).read_bytes(), count, seed=1):
        (damaged / name).write_bytes(content)
        refused(damaged)
    (damaged / name).unlink()
    assert f"{damaged / name} " in (refused(damaged) or "")
    (damaged / name).mkdir()
    assert f"{damaged / name} " in (refused(damaged) or "")


def changed_weights(teacher: Path, folder: Path, change: Any) -> Path:
    shutil.copytree(teacher, folder)
    weights = load_file(folder / WEIGHTS_NAME)
    change(weights)
    save_file(weights, folder / WEIGHTS_NAME)
    return folder


NAME = "model.layers.1.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(NAME), f"does not fit the model: {NAME} is missing"),
        (lambda w: w.update(more=torch.zeros(1)), r"does not fit the model: more is \(1,\)"),
        (lambda w: w.update({NAME: w[NAME].T[:8].contiguous()}), f"does not fit the model: {NAME} is "),
        (lambda w: w.update({NAME: w[NAME].to(torch.int8)}), f"{NAME} has type I8, expected one of BF16"),
        (lambda w: w.update({NAME: w[NAME] > 0}), f"{NAME} has type BOOL, expected one of BF16"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(refused, teacher, tmp_path, change, message):
    assert re.search(message, refused(changed_weights(teacher, tmp_path / "teacher", change)) or "")


def test_a_teacher_with_nan_is_refused_by_name(launch, teacher, traced_data, tmp_path):
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[NAME][3, 5] = torch.nan

    init, run = changed_weights(teacher, tmp_path / "teacher", change), tmp_path / "run"
    command = ["distill/main.py", "--ds_config", "ds_configs/zero2.json", "--init", init]
    command += ["--config", "distill/configs/kava.yaml", f"data.path={traced_data}", f"output_dir={run}"]
    command += ["data.sequence_length=240", "global_batch_size=2", "micro_batch_size=1", "max_steps=1"]
    result = launch(2, *command, check=False)
    assert result.returncode
    assert result.stderr.count(f"error: {init / WEIGHTS_NAME}: {NAME} holds NaN or infinity; export") == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("count", [10, pytest.param(300, marks=pytest.mark.slow)])
def test_a_mutated_config_is_prepared_or_refused_in_a_line(refused, tmp_path, count):
    values = yaml.safe_load((ROOT / "distill/configs/kava.yaml").read_text())
    for number, (_, mutated) in enumerate(config_mutations(values, count, seed=3)):
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump(mutated))
        refused(config=str(path))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.distillation=null",), "method=None is unknown; choose one of cot"),
        (
            ("model.distillation.method=coconut", "model.distillation.latents_per_step=0"),
            "must be at least 1",
        ),
        (("model.distillation.method=coconut", "model.distillation.kv_weight=1"), "set hidden_weight"),
        (("model.latent_cot.num_latents=100000",), "may be too short for a question and an answer"),
        (("lora.r=0",), "lora.r=0 must be at least 1"),
    ],
)
def test_contradictions_are_one_line(refused, overrides, message):
    assert message in (refused(overrides=overrides) or "")
