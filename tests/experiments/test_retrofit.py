"""A matrix of conversions of a pretrained model: planning, and a tiny one from a Hugging Face folder."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.matrix_file import MATRICES
from experiments.retrofit import read_retrofit
from experiments.run import jobs_of, read
from model.hf.deepseek import import_folder

from ..conftest import ROOT
from ..model.hf_folders import llama_folder

BITS = "perplexity bits_per_byte"
SHIPPED = MATRICES / "retrofit.yaml"


def write(folder: Path, **changes: Any) -> Path:
    """The shipped matrix over a base in `folder`, with other values."""
    base = folder / "base"
    base.mkdir(exist_ok=True)
    (base / "tokenizer.model").touch()
    path = folder / "matrix.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(SHIPPED.read_text()), "retrofit": str(base), **changes}))
    return path


def test_every_group_trains_on_the_same_data_and_is_scored_alike(tmp_path):
    jobs = jobs_of(read(write(tmp_path)))
    assert [job.name for job in jobs] == ["A", "B", "C", "D"]
    assert len({(job.training, job.data, str(job.evaluations)) for job in jobs}) == 1
    first, latent, fixed, adaptive = (job.start.conversions for job in jobs if job.start is not None)
    assert (first, len(latent)) == ((), 1)
    assert fixed[:1] == adaptive[:1] == latent
    assert fixed != adaptive
    assert f"tokenizer.file={tmp_path / 'base' / 'tokenizer.model'}" in jobs[0].data.overrides


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"groups": {}}, "groups and evaluations need one entry or more"),
        ({"training": ["optimizer.lrr=1"]}, "lrr"),
        (
            {"retrofit": "no/such/base"},
            "no/such/base has no tokenizer.model; write it with python -m model.hf",
        ),
        ({"base": "x"}, "base is not a known key"),
    ],
)
def test_a_mistake_in_a_matrix_is_one_line(changes, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)) as caught:
        read_retrofit(write(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def tiny_groups() -> dict[str, list[list[str]]]:
    """The shipped groups with ranks of the tiny model, whose keys are 16 wide, and little text."""
    sizes = {"128": "12", "64": "8", "4096": "256"}
    groups = yaml.safe_load(SHIPPED.read_text())["groups"]
    little = ["--calibration_tokens", "512"]
    return {
        name: [
            [sizes.get(part, part) for part in given] + (little if given[0] == "mla" else [])
            for given in conversions
        ]
        for name, conversions in groups.items()
    }


@pytest.mark.slow
def test_a_tiny_matrix_converts_scores_trains_and_writes_its_table(tmp_path, data_root):
    llama_folder(tmp_path / "hf", max_position_embeddings=256, num_attention_heads=4, num_key_value_heads=2)
    import_folder(tmp_path / "hf", tmp_path / "base")
    changes = {
        "steps": 2,
        "groups": tiny_groups(),
        "training": ["data.sequence_length=64", "global_batch_size=2", "optimizer.warmup_steps=1"],
        "evaluations": {
            "wikipedia": ["eval/perplexity.py", "--data", "DATA", "--limit", "2", "--max_length", "64"]
        },
        "recipe_overrides": ["sources.0.max_bytes=200000", "validation_fraction=0.5"],
    }
    out = tmp_path / "out"
    command = [sys.executable, "experiments/run.py", "--matrix", write(tmp_path, **changes), "--out", out]
    for _ in range(2):  # the second time everything is there
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    groups = json.loads((out / "results.json").read_text())["groups"]
    assert list(groups) == ["A", "B", "C", "D"]
    scores = {
        when: {name: record[when]["wikipedia"][BITS]["value"] for name, record in groups.items()}
        for when in ("before", "after")
    }
    assert groups["A"]["before"]["wikipedia"][BITS]["stderr"] > 0
    assert scores["before"]["B"] == pytest.approx(scores["before"]["C"], rel=1e-5)  # a unit: the identity
    assert all(scores["before"][name] != scores["after"][name] for name in groups)
    assert groups["B"]["cached_numbers"] < groups["A"]["cached_numbers"]
    assert len({record["tokens"] for record in groups.values()}) == 1
