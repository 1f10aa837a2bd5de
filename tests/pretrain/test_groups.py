"""Experiment groups: each builds a different model, and differs from the others as its header says."""

import hashlib
import itertools
import re
import subprocess
import sys

import pytest
import torch
import yaml
from torch import Tensor

from experiments.group_files import FILES, file_text
from model import ModelConfig, ZeroModel, dense_twin
from model.counts import flops_per_token
from pretrain.main import _parse, _write_run_folder
from pretrain.run_config import load_run_config
from pretrain.setup import build_model_config, prepare

from ..conftest import ROOT, TINY

CONFIGS = ROOT / "pretrain/configs"
DEMO = str(CONFIGS / "demo.yaml")
GROUPS = {path.stem: path for path in sorted((CONFIGS / "groups").glob("*.yaml"))}
VOCABULARY = 316  # of the demo's tokenizer
UNLOOPED = [f"model.recurrence.{key}" for key in ("placement=none", "ranges=null", "num_steps=1")]
NOT_HALTING = ["model.recurrence.halting.kind=fixed", "model.recurrence.halting.expectation=null"]


def configured(name: str, *overrides: str) -> ModelConfig:
    """A group's model as pretrain/main.py builds it for the demo."""
    return build_model_config(load_run_config([DEMO, str(GROUPS[name])], list(overrides)), VOCABULARY)


def share_weights(model: ZeroModel) -> None:
    """Noise that depends on a parameter's name and shape alone: two models agree wherever these agree.

    Nothing keeps an initial value that would hide it, as zeros do.
    """
    for name, parameter in model.named_parameters():
        seed = int.from_bytes(
            hashlib.sha256(f"{name}:{list(parameter.shape)}".encode()).digest()[:7], "little"
        )
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        parameter.data = noise * 0.1 + ("norm" in name)


def behaviour(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Logits in evaluation, loss in training, on the same tokens: 1.5 segments of the memory transformer."""
    model = ZeroModel(config)
    share_weights(model)
    tokens = torch.randint(0, VOCABULARY, (2, 97), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = model.eval()(tokens[:, :-1]).logits
        loss = model.train()(tokens[:, :-1], targets=tokens[:, 1:]).loss
    return logits, loss


@pytest.fixture(scope="module")
def behaviours() -> dict[str, tuple[Tensor, Tensor]]:
    return {name: behaviour(configured(name)) for name in GROUPS}


def test_the_groups_of_the_plan_are_there():
    letters = {"a_attention", "b_mla", "c_lru_fixed", "d_lru_adaptive", "dense_parameters", "dense_flops"}
    published = {"universal_transformer", "universal_transformer_act", "recurrent_memory", "pause_tokens"}
    assert set(GROUPS) == set(FILES) == letters | published


@pytest.mark.parametrize("name", GROUPS)
def test_a_file_holds_a_model_of_the_same_sizes_and_says_what_it_is_for(name):
    text = GROUPS[name].read_text()
    values = yaml.safe_load(text)
    assert set(values) == {"model"}
    assert values["model"]["preset"] == "nano"
    assert not {"vocab_size", "hidden_size", "num_attention_heads"} & set(values["model"])
    header = " ".join(
        line.lstrip("# ") for line in itertools.takewhile(lambda s: s[0] == "#", text.split("\n"))
    )
    compared = re.search(r"Compare with (.*)", header)
    assert compared
    for other in re.findall(r"\b(?:\w+_\w+)\b", compared[1].split("Made by")[0]):
        assert other in GROUPS


@pytest.mark.parametrize("pair", itertools.combinations(GROUPS, 2), ids="-".join)
def test_no_two_groups_build_the_same_model(pair, behaviours):
    """Even where weights are shared: a switch that nothing reads would leave two groups equal."""
    (logits, loss), (other_logits, other_loss) = (behaviours[name] for name in pair)
    assert (logits - other_logits).abs().max() > 0.01
    assert abs(loss - other_loss) > 1e-4


def test_models_that_are_the_same_are_found_to_be(behaviours):
    """The comparison above can fail: here are configs that differ in keys which nothing reads."""
    logits, loss = behaviour(configured("c_lru_fixed", "model.recurrence.halting.ponder_prior=0.7"))
    assert configured("c_lru_fixed", "model.recurrence.halting.ponder_prior=0.7") != configured("c_lru_fixed")
    assert torch.equal(logits, behaviours["c_lru_fixed"][0])
    assert torch.equal(loss, behaviours["c_lru_fixed"][1])


@pytest.mark.parametrize(
    ("name", "overrides", "other"),
    [
        ("a_attention", ["model.use_mla=true", "model.num_key_value_heads=null"], "b_mla"),
        ("c_lru_fixed", UNLOOPED, "b_mla"),
        ("d_lru_adaptive", NOT_HALTING, "c_lru_fixed"),
        ("universal_transformer_act", NOT_HALTING, "universal_transformer"),
        ("pause_tokens", ["model.num_pause_tokens=0"], "b_mla"),
        (
            "recurrent_memory",
            ["model.num_memory_tokens=0", "model.segment_length=null", "model.use_moe=true"],
            "b_mla",
        ),
    ],
)
def test_a_group_differs_in_one_thing_only(name, overrides, other):
    assert configured(name) != configured(other)
    assert configured(name, *overrides) == configured(other)


def test_one_step_of_c_is_not_b(behaviours):
    """The unit itself differs too, not only how often the layers run."""
    logits, _ = behaviour(configured("c_lru_fixed", "model.recurrence.num_steps=1"))
    assert (logits - behaviours["b_mla"][0]).abs().max() > 0.01
    assert (logits - behaviours["c_lru_fixed"][0]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("b_mla", [1, 1, 1]),
        ("c_lru_fixed", [1, 4, 1]),
        ("universal_transformer", [6]),
        ("dense_flops", [1] * 6),
        ("recurrent_memory", [2, 2, 2]),  # once for each segment
    ],
)
def test_layer_runs(name, runs):
    model, counted = ZeroModel(configured(name)).eval(), [0] * len(runs)
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: counted.__setitem__(i, counted[i] + 1))
    with torch.no_grad():
        model(torch.ones(1, 96, dtype=torch.long))
    assert counted == runs


@pytest.mark.parametrize("by", ["parameters", "flops"])
def test_dense_twins_are_what_the_match_command_prints(by, capsys, monkeypatch):
    like = str(GROUPS["c_lru_fixed"].relative_to(ROOT))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["model.config", "match", "--like", like, "--by", by])
    dense_twin.main()
    printed, stored = (
        yaml.safe_load(t) for t in (capsys.readouterr().out, GROUPS[f"dense_{by}"].read_text())
    )
    assert ModelConfig.from_dict(printed["model"]) == ModelConfig.from_dict(stored["model"])


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_what_its_group_says(name):
    assert GROUPS[name].read_text() == file_text(name), "run: python experiments/group_files.py"


def test_the_command_writes_every_file(tmp_path):
    command = [sys.executable, "experiments/group_files.py", "--out", str(tmp_path / "groups")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    written = {path.name: path.read_text() for path in (tmp_path / "groups").iterdir()}
    assert written == {path.name: path.read_text() for path in GROUPS.values()}


def test_dense_twins_match_with_the_demos_vocabulary_too():
    c, parameters, flops = (configured(n) for n in ("c_lru_fixed", "dense_parameters", "dense_flops"))
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in ZeroModel(config).parameters()) for config in (c, parameters)]
    assert abs(sizes[1] / sizes[0] - 1) <= 0.01
    for length in (64, 256, 2048):
        assert abs(flops_per_token(flops, length) / flops_per_token(c, length) - 1) <= 0.01


def test_later_files_override_earlier_ones_and_overrides_both(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(
        "data: {path: d, sequence_length: 64}\nseed: 1\nmodel: {hidden_size: 32, recurrence: {num_steps: 2}}"
    )
    two.write_text("seed: 2\nmodel: {recurrence: {num_steps: 5, max_steps: '${max_steps}'}}\nmax_steps: 9")
    config = load_run_config([str(one), str(two)], ["max_steps=8"])
    assert (config.seed, config.data.sequence_length, config.max_steps) == (2, 64, 8)
    assert config.model == {"hidden_size": 32, "recurrence": {"num_steps": 5, "max_steps": 8}}
    assert load_run_config([str(two), str(one)], []).seed == 1
    assert load_run_config(str(one), []).seed == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: x", "seed='x' is not an integer"),
        ("model: {hiden_size: 3}", "model.hiden_size is not a known key; did you mean 'hidden_size'"),
        ("model: {hidden_size: big}", "model.hidden_size='big' is not an integer"),
        ("model:", "model=None is not a mapping of keys"),
        ("data: 3", "data=3 is not a mapping of keys"),
        ("a: [", "cannot be read"),
        ("- 1", "holds no keys"),
    ],
)
def test_an_error_names_the_file_that_is_wrong(tmp_path, text, message):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(text)
    with pytest.raises(ValueError, match=f"config {wrong}:? .*{re.escape(message)}") as caught:
        load_run_config([DEMO, str(wrong)], [])
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="absent.yaml does not exist"):
        load_run_config([DEMO, str(tmp_path / "absent.yaml")], [])


def test_the_command_line_and_the_resolved_config(data_folder, tmp_path, monkeypatch):
    given = ["main.py", "--ds_config", "x.json", "--config", DEMO, "--config", str(GROUPS["b_mla"]), "seed=3"]
    monkeypatch.setattr(sys, "argv", given)
    arguments = _parse()
    assert arguments.overrides == ["seed=3"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    overrides = [*TINY, f"output_dir={tmp_path}", f"data.path={data_folder}", *arguments.overrides]
    run = prepare(arguments.config, str(ROOT / "ds_configs/zero3_ep.json"), overrides)
    _write_run_folder(run, trained=0)
    resolved = load_run_config(str(tmp_path / "config.yaml"), [])
    assert (resolved.seed, resolved.max_steps, resolved.model["hidden_size"]) == (3, 680, 32)
    assert ModelConfig.from_dict(resolved.model) == run.model_config
    assert run.model_config.recurrence.placement == "none"
