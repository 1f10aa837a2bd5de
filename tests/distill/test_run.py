"""Two ranks with ZeRO-2 train what one plain torch process trains; and the command line."""

import argparse
import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from distill.main import prepare_distillation
from model import load_pretrained
from pretrain.setup import prepare

from ..conftest import ROOT
from ..pretrain.conftest import Launch

WORKER = Path(__file__).with_name("equality_worker.py")
TINY = ["model.hidden_size=32", "model.num_hidden_layers=2", "model.intermediate_size=48", "eval_every=2"]
TINY += ["global_batch_size=4", "micro_batch_size=2", "eval_batches=1", "optimizer.warmup_steps=1"]


def test_two_ranks_equal_one_plain_process(launch):
    output = launch(2, WORKER, "ds_configs/zero2.json").stdout
    reports = [json.loads(line[7:]) for line in output.splitlines() if line.startswith("REPORT ")]
    assert [report["method"] for report in reports] == [
        "kava",
        "coconut",
        "lotus",
        "kava, experts on both ranks",
        "kava, lora",
        "codi, lora",
    ]
    for report in reports:
        assert report["loss"] < 1e-5, report
        assert report["norm"] < 1e-4, report
        assert report["smallest_norm"] > 0.3, report  # clipping took place
        assert report["weights"] < 1e-4, report
        # Coconut's stages begin at 0, 1 and 2: earlier losses say nothing about spikes.
        assert report["remembered"] == (3 - 2 if report["method"] == "coconut" else 3), report


def records(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if "loss" in json.loads(line)]


def distill(launch: Launch, ranks: int, data: Path, run: Path, *more: str) -> None:
    command = ["distill/main.py", "--ds_config", "ds_configs/zero2.json"]
    command += ["--config", "distill/configs/small.yaml", *more]
    launch(ranks, *command, *TINY, f"data.path={data}", f"output_dir={run}")


def test_a_teacher_is_trained_and_teaches_itself(launch, traced_data, tmp_path):
    """cot from scratch, kava from its export on two ranks; a resumed run continues where it stopped."""
    teacher, student = tmp_path / "cot", tmp_path / "kava"
    distill(launch, 1, traced_data, teacher, "model.distillation.method=cot", "max_steps=2")
    init = ["--init", str(teacher / "export"), "model.distillation.method=kava"]
    distill(launch, 2, traced_data, student, *init, "max_steps=3", "save_every=3")
    seen = records(student)
    assert [record["step"] for record in seen] == [1, 2, 3]
    for record in seen:
        assert min(record[f"loss_{name}"] for name in ("teacher", "hidden", "kv")) > 0
        assert record["target_tokens"] > 0
    assert "val_loss" in seen[1]
    before = records(teacher)[-1]["loss"]
    assert seen[0]["loss_teacher"] == pytest.approx(before, rel=0.2)  # it starts from the teacher's weights
    done = load_pretrained(student / "export")
    assert done.config.latent_cot.num_latents == 24
    assert done.config.distillation.prefix_length > 0
    distill(launch, 1, traced_data, student, *init, "max_steps=4", "save_every=4")
    assert [record["step"] for record in records(student)] == [1, 2, 3, 4]
    assert OmegaConf.load(student / "config.yaml").model.distillation.method == "kava"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overrides": ["data.packing=concat"]}, "set data.packing=best_fit"),
        ({"overrides": ["data.sequence_length=64"]}, "which would be cut; raise it"),
        (
            {"overrides": ["model.distillation.method=magic"]},
            "method='magic' is unknown; choose one of cot",
        ),
        ({"overrides": ["model.max_position_embeddings=142"]}, "set it to .* or more, which adds no weights"),
        ({"init": Path("nowhere")}, "nowhere/config.json is missing"),
        ({"init": Path("nowhere"), "overrides": ["model.preset=nano"]}, "both give sizes; leave one of them"),
        ({"ds_config": "ds_configs/zero3_ep.json"}, "use ds_configs/zero2.json"),
        ({"overrides": ["lora={}"]}, "give them with --init, or leave lora out"),
    ],
)
def test_a_user_error_is_one_line(traced_data, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(ROOT)
    given = {
        "config": "distill/configs/small.yaml",
        "ds_config": "ds_configs/zero2.json",
        "init": None,
        "dry_run": False,
    }
    paths = [
        *TINY,
        "model.distillation.method=kava",
        f"data.path={traced_data}",
        f"output_dir={tmp_path}",
    ]
    paths += changes.pop("overrides", [])
    with pytest.raises((ValueError, OSError), match=message) as error:
        prepare_distillation(argparse.Namespace(**{**given, "overrides": paths, **changes}))
    assert "\n" not in str(error.value)


def test_coconut_stages_have_equal_length(traced_data, tmp_path, monkeypatch):
    """3 stages that add 2 latents each, and one without the rest of the trace, in 8 steps."""
    monkeypatch.chdir(ROOT)
    overrides = [*TINY, f"data.path={traced_data}", f"output_dir={tmp_path}", "max_steps=8"]
    overrides.append("model.distillation.method=coconut")
    paths = {
        "config": "distill/configs/small.yaml",
        "ds_config": "ds_configs/zero2.json",
        "init": None,
        "dry_run": False,
    }
    run = prepare_distillation(argparse.Namespace(**paths, overrides=overrides))
    assert run.model_config.distillation.stage_steps == 2
    with pytest.raises(ValueError, match="is for distill/main.py"):
        prepare(paths["config"], paths["ds_config"], overrides)
