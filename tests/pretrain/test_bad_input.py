"""User errors: one clear line naming value, limit and fix, and a non-zero exit."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from safetensors.torch import save_file

from data_pipeline.tokenization.tokenizer import train_tokenizer
from pretrain import checkpoint
from pretrain.setup import prepare

from ..conftest import ROOT, TINY
from .conftest import finish, seal
from .conftest import start as start_launcher

CONFIG, DS_CONFIG = ROOT / "pretrain/configs/demo.yaml", ROOT / "ds_configs/zero3_ep.json"


@pytest.fixture
def start(data_folder, tmp_path, monkeypatch):
    """prepare() of a two-rank run with overrides, as main.py calls it."""

    def run(*overrides: str, world_size: int = 2, config: Path = CONFIG, ds_config: Path = DS_CONFIG):
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        monkeypatch.setenv("RANK", "0")
        paths = [f"output_dir={tmp_path / 'run'}", f"data.path={data_folder}"]
        return prepare(str(config), str(ds_config), [*TINY, *paths, *overrides])

    return run


def test_the_shipped_config_is_accepted(start):
    run = start()
    assert (run.micro_batch_size, run.ds_config["gradient_accumulation_steps"]) == (4, 1)
    assert start("micro_batch_size=3").ds_config["gradient_accumulation_steps"] == 2
    assert start("global_batch_size=14", "micro_batch_size=6").micro_batch_size == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_step=3", "max_step is not a known key; did you mean 'max_steps'"),
        ("optimizer.lrr=1", "optimizer.lrr is not a known key; did you mean 'lr'"),
        ("model.hiden_size=8", "model.hiden_size is not a known key; did you mean 'hidden_size'"),
        ("model.recurrence.steps=2", "model.recurrence.steps is not a known key; did you mean 'num_steps'"),
        ("optimizer=3", "optimizer=3 is not a mapping of keys"),
        ("max_steps=many", "max_steps='many' is not an integer"),
        ("model.hidden_size=big", "model.hidden_size='big' is not an integer"),
        ("max_steps", "override 'max_steps' is not of the form a.b=c"),
        ("max_steps=0", "max_steps=0 must be at least 1"),
        (
            "optimizer.schedule=linear",
            "optimizer.schedule='linear' is unknown; choose one of cosine, wsd, constant",
        ),
        ("data.path=nowhere", "data folder nowhere does not exist"),
        ("data.sequence_length=1000", "sequence_length=1000 exceeds model.max_position_embeddings=512"),
        ("data.sequence_length=500000", "less than one row of sequence_length 500000"),
        ("ep_size=4", "ep_size=4 does not divide the 2 ranks"),
        ("model.n_routed_experts=5", "n_routed_experts=5 cannot be spread over ep_size=2"),
        ("global_batch_size=7", "global_batch_size 7 does not divide among 2 ranks"),
        ("model.vocab_size=77", "model.vocab_size=77 is not the tokenizer's"),
        ("resume=runs/absent", "resume=runs/absent does not exist"),
        ("data.tokenizer=absent.model", "absent.model"),
    ],
)
def test_wrong_values(start, override, message):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        start(override)
    assert "\n" not in str(caught.value)


def test_a_run_cannot_share_the_folder_of_its_data(start, data_folder):
    with pytest.raises(ValueError, match="is also data.path, the folder of the data; give the run its own"):
        start(f"output_dir={data_folder}")


def test_a_world_size_that_ep_size_does_not_divide(start):
    with pytest.raises(
        ValueError, match="ep_size=2 does not divide the 3 ranks; choose ep_size from the div"
    ):
        start("global_batch_size=9", world_size=3)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"gradient_clipping": 1.0}, "gradient_clipping=1 is also set by optimizer.clip of the YAML"),
        ({"train_batch_size": 64}, "train_batch_size=64 .* global_batch_size"),
        ({"optimizer": {"type": "Adam"}}, "optimizer is not supported: .* delete it from the JSON"),
        ({"expert_parallel": {"enabled": True}}, "expert_parallel is not supported: .* ep_size"),
    ],
)
def test_a_key_that_yaml_and_json_both_set(start, tmp_path, section, message):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**json.loads(DS_CONFIG.read_text()), **section}))
    with pytest.raises(ValueError, match=message):
        start(ds_config=path)


def test_unreadable_configs(start, tmp_path):
    broken = tmp_path / "broken"
    for text in ("a: [", "- 1\n- 2", "{"):
        broken.write_text(text)
        with pytest.raises(ValueError, match="broken") as caught:
            start(config=broken)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="not valid JSON"):
        start(ds_config=broken)
    with pytest.raises(FileNotFoundError, match="absent.yaml does not exist"):
        start(config=tmp_path / "absent.yaml")
    with pytest.raises(FileNotFoundError, match="absent.json does not exist"):
        start(ds_config=tmp_path / "absent.json")


def test_a_tokenizer_that_does_not_belong_to_the_shards(start, data_folder, tmp_path):
    other = tmp_path / "other.model"
    other.write_bytes(train_tokenizer(["some other text"], 300))
    with pytest.raises(ValueError, match="other.model .* did not encode the *shards"):
        start(f"data.tokenizer={other}")
    copied = tmp_path / "data"
    shutil.copytree(data_folder, copied)
    shutil.copyfile(other, copied / "tokenizer.model")
    with pytest.raises(ValueError, match="tokenizer.model"):
        start(f"data.path={copied}")


def test_a_checkpoint_of_another_run(start, tmp_path):
    folder = tmp_path / "run/checkpoints/step-4"
    folder.mkdir(parents=True)

    def write(state: checkpoint.TrainingState) -> None:
        save_file({}, folder / checkpoint.BUFFERS)
        (folder / checkpoint.STATE).write_text(json.dumps(asdict(state)))
        seal(folder)

    state = replace(start().state, step=4)
    older = {key: value for key, value in state.model.items() if key != "qk_norm"}
    write(replace(state, model=older))  # from before the key existed
    assert start().resume_from == folder
    write(state)
    assert start().resume_from == folder
    with pytest.raises(ValueError, match="is of another model: its hidden_size is 32, the config's is 48"):
        start("model.hidden_size=48")
    with pytest.raises(ValueError, match="seed=0, this run has 1; use the same seed"):
        start("seed=1")
    with pytest.raises(ValueError, match="data_fingerprint"):
        start("data.sequence_length=32")
    with pytest.raises(ValueError, match="at step 4, beyond max_steps=3"):
        start("max_steps=3")
    with pytest.raises(ValueError, match="resume=none would overwrite"):
        start("resume=none")
    write(replace(state, ep_size=1, world_size=4, zero_stage=1))
    assert start(f"resume={folder}").resume_from == folder
    later = folder.with_name("step-6")
    later.mkdir()
    with pytest.raises(ValueError, match=r"holds checkpoints of later steps \(6\) than .*step-4, which"):
        start(f"resume={folder}")
    later.rmdir()
    later.write_text("a file")
    with pytest.raises(ValueError, match="step-6 is not a folder, but checkpoints have such names; move it"):
        start()
    later.unlink()
    values = json.loads((folder / checkpoint.STATE).read_text())
    for key, value, message in (
        ("steps", 4, "state.json.steps is not a known key; did you mean 'step'"),
        ("step", "4", "state.json.step='4' is not an integer"),
    ):
        (folder / checkpoint.STATE).write_text(json.dumps({**values, key: value}))
        seal(folder)
        with pytest.raises(ValueError, match=f"checkpoint {folder} cannot be used: {message}"):
            start()
    (folder / checkpoint.MANIFEST).write_text("{")
    with pytest.raises(
        ValueError, match=r"is whole: step-4 \(manifest.json is not valid JSON\); restore one"
    ):
        start()
    with pytest.raises(ValueError, match="not a whole checkpoint: manifest.json is not valid JSON"):
        start(f"resume={folder}")


def test_the_command_prints_the_line_and_exits_with_2(data_folder):
    command = ["pretrain/main.py", "--ds_config", DS_CONFIG, "--config", CONFIG, "max_step=3"]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "RANK"},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: max_step is not a known key; did you mean 'max_steps'")
    assert done.stderr.count("\n") == 1


def test_the_launcher_reports_the_failure(data_folder):
    command = ("pretrain/main.py", "--ds_config", DS_CONFIG, "--config", CONFIG, f"data.path={data_folder}")
    done = finish(start_launcher(2, *command, "ep_size=4"), check=False)
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count("error: ep_size=4 does not divide the 2 ranks") == 1
    assert "Traceback" not in done.stdout + done.stderr
