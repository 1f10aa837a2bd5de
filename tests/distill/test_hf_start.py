"""From a Hugging Face folder to a model that thinks: import, build, distil, evaluate."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

from data_pipeline.build import build
from data_pipeline.recipe import load_recipe
from data_pipeline.tokenization.encode import encode_question
from data_pipeline.tokenization.tokenizer import Tokenizer
from distill.main import prepare_distillation
from eval import thoughts
from model import load_pretrained
from model.hf.deepseek import import_folder
from model.latent_cot.thoughts import generate_with_thoughts
from pretrain.export import export_run

from ..conftest import ROOT
from ..model.hf_folders import gpt2_folder, llama_folder
from .test_run import records

RECIPE = ROOT / "data_pipeline/recipes/distill_gsm8k.yaml"
SMALL_RUN = ["eval_every=2", "eval_batches=1", "global_batch_size=2", "micro_batch_size=2"]
SMALL_RUN += ["data.sequence_length=1024", "max_steps=3", "save_every=3"]
KINDS = {
    "gpt2": (gpt2_folder, {"n_positions": 2048}),
    "llama": (llama_folder, {"max_position_embeddings": 2048, "tie_word_embeddings": True}),
}


def prepared(kind: str, folder: Path, data_root: Path) -> tuple[Path, Path]:
    """The converted start, and GSM8K in its tokens."""
    make, sizes = KINDS[kind]
    make(folder / "hf", **sizes)
    import_folder(folder / "hf", folder / "start")
    overrides = [f"tokenizer.file={folder / 'start' / 'tokenizer.model'}", "tokenizer.vocab_size=null"]
    overrides += ["sources.0.max_documents=40", "sources.0.cleaning=[]", "validation_fraction=0.1"]
    build(load_recipe(RECIPE, overrides), data_root, folder / "data")
    return folder / "start", folder / "data"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_kava_from_a_hugging_face_folder(kind, launch, data_root, tmp_path, monkeypatch):
    start, data = prepared(kind, tmp_path, data_root)
    run = tmp_path / "kava"
    command = ["distill/main.py", "--ds_config", "ds_configs/zero2.json"]
    command += ["--config", "distill/configs/kava.yaml", "--init", start, "optimizer.warmup_steps=1"]
    launch(1, *map(str, command), *SMALL_RUN, f"data.path={data}", f"output_dir={run}")
    seen = records(run)
    assert [record["step"] for record in seen] == [1, 2, 3]
    for record in seen:
        assert min(record[f"loss_{name}"] for name in ("teacher", "hidden", "kv")) > 0
    before, done = load_pretrained(start).state_dict(), load_pretrained(run / "export")
    after = done.state_dict()
    assert {name for name in after if name not in before} == {
        name for name in after if name.startswith("latent_thoughts.")
    }
    assert all(not torch.equal(after[name], value) for name, value in before.items())
    assert "lm_head.weight" not in after  # tied to the embedding
    export_run(run, None, tmp_path / "again")  # from the checkpoint
    again = load_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(again[name], value) for name, value in after.items())
    tokenizer = Tokenizer(run / "export" / "tokenizer.model")
    assert tokenizer.sha256 == Tokenizer(start / "tokenizer.model").sha256
    question = torch.tensor([encode_question("How many apples?", tokenizer)])
    assert tokenizer.eot_id is not None
    answer, _ = generate_with_thoughts(done, question, tokenizer.eot_id, 3)
    assert answer.shape == (1, 3)
    arguments = ["--checkpoint", run / "export", "--task", "gsm8k", "--data", data_root, "--limit", 3]
    arguments += ["--max_new_tokens", 5, "--output_path", tmp_path / "scores"]
    monkeypatch.setattr(sys, "argv", ["thoughts.py", *map(str, arguments)])
    thoughts.main(thoughts.TASK, thoughts.__doc__)
    (scores,) = (tmp_path / "scores").glob("results_*.json")
    assert "thoughts_gsm8k" in json.loads(scores.read_text())["results"]


def test_mistakes_are_one_line(data_root, tmp_path, monkeypatch):
    """A folder that was not converted, a position beyond a learned table."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(KINDS, "gpt2", (gpt2_folder, {"n_positions": 700}))
    start, data = prepared("gpt2", tmp_path, data_root)
    paths = {"config": "distill/configs/kava.yaml", "ds_config": "ds_configs/zero2.json", "dry_run": False}
    overrides = [
        *SMALL_RUN,
        f"data.path={data}",
        f"output_dir={tmp_path / 'run'}",
        "data.sequence_length=700",
    ]
    for init, message in (
        (tmp_path / "hf", "convert it first: python -m model.hf import --hf .* --out DIR"),
        (start, "max_position_embeddings=700 may be too short .*leave long documents out"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            prepare_distillation(argparse.Namespace(**paths, overrides=overrides, init=init))
        assert "\n" not in str(caught.value)
