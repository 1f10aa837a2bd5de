"""Dense twins against built models and torch's own FLOP counter."""

import dataclasses
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import ModelConfig, ZeroModel
from model.config.execution import ExecutionConfig
from model.counts import num_parameters
from model.dense_twin import dense_twin, main, solve_widths

from .conftest import SMALL

ROOT = Path(__file__).parents[2]
# Heads as wide in values as in keys: no zero columns that the counter sees and the formula leaves out.
SIZES: dict[str, Any] = {
    **SMALL,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "v_head_dim": 10,
    "intermediate_size": 200,
    "moe_intermediate_size": 60,
}
MODELS: dict[str, dict[str, Any]] = {
    "block": {"recurrence": {"placement": "block", "ranges": [[1, 2]], "num_steps": 3}},
    "two_ranges": {
        "recurrence": {
            "placement": "block",
            "ranges": [[0, 0], [2, 3]],
            "num_steps": 3,
            "injection": "concat",
            "sandwich_norm": True,
        }
    },
    "whole_stack_act": {
        "use_moe": False,
        "recurrence": {
            "placement": "block",
            "num_steps": 2,
            "injection": "none",
            "update": "simple",
            "iteration_embedding": True,
            "halting": {"kind": "act", "expectation": "state"},
        },
    },
    "latent": {"recurrence": {"placement": "kv", "num_steps": 5, "position_mixing": 3}},
    "plain": {
        "use_mla": False,
        "num_key_value_heads": 1,
        "recurrence": {"placement": "post_attention", "ranges": [[1, 2]], "num_steps": 4},
    },
    "all_experts": {
        "first_k_dense_replace": 0,
        "num_nextn_predict_layers": 1,
        "recurrence": {"placement": "block", "ranges": [[2, 3]], "num_steps": 4, "update": "gated"},
    },
}
KEPT = (
    *("vocab_size", "hidden_size", "num_attention_heads", "use_mla", "num_key_value_heads", "kv_lora_rank"),
    *("use_moe", "n_routed_experts", "num_experts_per_tok", "n_shared_experts", "num_nextn_predict_layers"),
)


def configured(name: str) -> ModelConfig:
    return ModelConfig.from_dict({**SIZES, **MODELS[name]})


def built_parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in ZeroModel(config).parameters())


def counted_flops(config: ModelConfig, T: int) -> int:
    """Of a forward pass that predicts the next token; see test_config.py for the settings."""
    model = ZeroModel(config, execution=ExecutionConfig(experts="loop", attention="sdpa")).eval()
    if config.learns_to_halt:  # as many steps as it can take
        for parameter in (p for n, p in model.named_parameters() if "halting" in n):
            parameter.data.fill_(-1e4 if parameter.ndim == 1 else 0.0)
    mask = torch.ones(2, T)
    mask[0, 0] = 0
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.ones(2, T, dtype=torch.long), attention_mask=mask)
    return counter.get_total_flops()


def ffn_kinds(config: ModelConfig) -> list[str]:
    """Class of each built layer's feed-forward layer."""
    with torch.device("meta"):
        return [type(layer.mlp).__name__ for layer in ZeroModel(config).model.layers]


@pytest.mark.parametrize("name", MODELS)
def test_equal_parameters(name):
    config = configured(name)
    twin = dense_twin(config, "parameters")
    assert abs(built_parameters(twin) / built_parameters(config) - 1) <= 0.01
    assert (twin.num_hidden_layers, ffn_kinds(twin)) == (config.num_hidden_layers, ffn_kinds(config))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("T", [16, 64])
def test_equal_flops(name, T):
    config = configured(name)
    twin = dense_twin(config, "flops", T)
    assert abs(counted_flops(twin, T) / counted_flops(config, T) - 1) <= 0.011  # the counter's own 0.1%
    ranges = config.recurrence.ranges or [[0, 3]]
    if config.recurrence.placement == "block":
        looped = [i for first, last in ranges for i in range(first, last + 1)]
        runs = [kind for i, kind in enumerate(ffn_kinds(config)) for _ in range(_steps(config, i in looped))]
        assert sorted(ffn_kinds(twin)) == sorted(runs)
    else:
        assert ffn_kinds(twin) == ffn_kinds(config)


def _steps(config: ModelConfig, looped: bool) -> int:
    return config.recurrence.num_steps if looped else 1


@pytest.mark.parametrize("by", ["parameters", "flops"])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_but_the_sizes_changes(name, by):
    config = configured(name)
    twin = dense_twin(config, by)
    assert twin.recurrence.placement == "none"
    assert not any("recurrence" in n or "halting" in n for n in _names(twin))
    assert [getattr(twin, key) for key in KEPT] == [getattr(config, key) for key in KEPT]
    if config.has_experts and config.first_k_dense_replace:
        before, after = (c.intermediate_size / c.moe_intermediate_size for c in (config, twin))
        assert abs(after / before - 1) < 0.2  # in proportion, as far as multiples of 8 go
    assert dense_twin(twin, by) == twin


def _names(config: ModelConfig) -> list[str]:
    with torch.device("meta"):
        return list(ZeroModel(config).state_dict())


def test_widths_are_multiples_of_8_only_where_that_hits():
    wide = dense_twin(ModelConfig.from_dict({"preset": "nano"}), "parameters")
    assert (wide.intermediate_size % 8, wide.moe_intermediate_size % 8) == (0, 0)
    small = configured("block")  # widths 200 and 60
    twin, goal = dense_twin(small, "parameters"), built_parameters(small)
    for widths in itertools.product((200, 208), (56, 64)):
        sizes = dict(zip(("intermediate_size", "moe_intermediate_size"), widths, strict=True))
        assert abs(built_parameters(dataclasses.replace(twin, **sizes)) / goal - 1) > 0.01
    assert 200 <= twin.intermediate_size <= 208
    assert 56 <= twin.moe_intermediate_size <= 64


def test_a_twin_that_no_whole_width_reaches():
    coarse = {**SIZES, "hidden_size": 8, "vocab_size": 8, "n_routed_experts": 64, "first_k_dense_replace": 0}
    loop = {"placement": "block", "ranges": [[0, 0]], "num_steps": 2, "injection": "concat"}
    config = ModelConfig.from_dict(
        {**coarse, "num_hidden_layers": 1, "moe_intermediate_size": 2, "recurrence": loop}
    )
    goal = built_parameters(config)
    nearest = min(
        (
            built_parameters(
                ModelConfig.from_dict({**coarse, "num_hidden_layers": 1, "moe_intermediate_size": width})
            )
            for width in range(1, 9)
        ),
        key=lambda found: abs(found - goal),
    )
    assert abs(nearest / goal - 1) > 0.01
    message = (
        rf"equal parameters: .*within 1\.00% of {goal:,}: .*give {nearest:,} \({nearest / goal - 1:+.1%}\)"
    )
    with pytest.raises(ValueError, match=message.replace("+", r"\+")) as caught:
        dense_twin(config, "parameters")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wanted", [20_000, 23_456, 31_000])
def test_the_exact_width_is_the_nearest_of_all(wanted):
    config = ModelConfig.from_dict({**SIZES, "use_moe": False})
    goal = built_parameters(config) - 40_000 + wanted
    found = solve_widths(config, ["intermediate_size"], num_parameters, goal, multiples=(1,), tolerance=None)

    def miss(width: int) -> int:
        return abs(num_parameters(dataclasses.replace(config, intermediate_size=width)) - goal)

    assert miss(found.intermediate_size) == min(map(miss, range(1, 400)))


def test_of_two_widths_equally_near_the_odd_one_is_taken():
    config = ModelConfig.from_dict({**SIZES, "use_moe": False})
    sizes = {
        width: num_parameters(dataclasses.replace(config, intermediate_size=width)) for width in (90, 91, 92)
    }
    for even in (90, 92):
        goal = (sizes[91] + sizes[even]) / 2
        found = solve_widths(config, ["intermediate_size"], num_parameters, goal, (1,), tolerance=None)
        assert found.intermediate_size == 91


def test_an_exact_width_below_1_is_refused():
    config = ModelConfig.from_dict({**SIZES, "use_moe": False})
    one = num_parameters(dataclasses.replace(config, intermediate_size=1))
    step = num_parameters(dataclasses.replace(config, intermediate_size=2)) - one
    solve_widths(config, ["intermediate_size"], num_parameters, one - step // 2, (1,), tolerance=None)
    with pytest.raises(
        ValueError, match="no whole widths come within .* intermediate_size=1, give"
    ) as caught:
        solve_widths(config, ["intermediate_size"], num_parameters, one - step // 2 - 1, (1,), tolerance=None)
    assert "\n" not in str(caught.value)


def matched(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> dict:
    monkeypatch.setattr(sys, "argv", ["model.config", "match", *map(str, arguments)])
    main()
    return yaml.safe_load(capsys.readouterr().out)


def test_every_kind_of_input_gives_the_same_twin(tmp_path, capsys, monkeypatch):
    values = {**SIZES, **MODELS["two_ranges"], "rms_norm_eps": 1e-6}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"data": {"sequence_length": 48}, "model": values}))
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "bare.json").write_text(json.dumps(values))
    ZeroModel(ModelConfig.from_dict(values)).save_pretrained(tmp_path / "export")
    expected = dense_twin(ModelConfig.from_dict(values), "flops", 48)
    for name in ("run.yaml", "bare.yaml", "bare.json", "export"):
        length = () if name == "run.yaml" else ("--sequence_length", 48)
        printed = matched(capsys, monkeypatch, "--like", tmp_path / name, "--by", "flops", *length)
        assert set(printed) == {"model"}
        assert ModelConfig.from_dict(printed["model"]) == expected, name
    override = ("--like", tmp_path / "run.yaml", "--by", "flops", "model.recurrence.num_steps=5")
    deeper = {**values, "recurrence": {**values["recurrence"], "num_steps": 5}}
    printed = matched(capsys, monkeypatch, *override)
    assert ModelConfig.from_dict(printed["model"]) == dense_twin(ModelConfig.from_dict(deeper), "flops", 48)


def test_a_preset_keeps_its_loop_out(tmp_path, capsys, monkeypatch):
    """What is printed overrides the loop that the preset, or the config it is laid over, has."""
    section = {"preset": "nano", "recurrence": {"ranges": None, "num_steps": 2, "halting": {"kind": "act"}}}
    (tmp_path / "bare.json").write_text(json.dumps(section))
    printed = matched(capsys, monkeypatch, "--like", tmp_path / "bare.json", "--by", "flops")["model"]
    laid_over = {**section, **printed, "recurrence": {**section["recurrence"], **printed["recurrence"]}}
    for values in (printed, laid_over):
        config = ModelConfig.from_dict(values)
        assert config == dense_twin(ModelConfig.from_dict(section), "flops")
        assert config.num_hidden_layers == 6


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("hidden_size: 32", ["hidden_size=3"], "override 'hidden_size=3' is not of the form model.a.b=c"),
        (
            "hidden_size: 32",
            ["model.hiden_size=3"],
            "hiden_size is not a known key; did you mean 'hidden_size'",
        ),
        ("hidden_size: 32", ["model.hidden_size.x=3"], "hidden_size is not a section"),
        ("hidden_size: 32", ["--sequence_length", "0"], "--sequence_length=0 must be at least 1"),
        (
            "data: {sequence_length: x}\nmodel: {hidden_size: 32}",
            [],
            "--sequence_length='x' is not an integer",
        ),
        ("data: 3\nmodel: 4", ["model.hidden_size=3"], "model=4 is not a mapping of keys to values"),
        ("hidden_size: .nan", [], "model.hidden_size=nan is not an integer"),
        ("hidden_size: big", [], "hidden_size='big' is not an integer"),
        ("model: {preset: huge}", [], "preset='huge' is unknown"),
        ("- 1", [], "holds no keys"),
        ("a: [", [], "cannot be read"),
    ],
)
def test_mistakes_are_one_line(tmp_path, text, arguments, message, capsys, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as caught:
        matched(capsys, monkeypatch, "--like", path, "--by", "flops", *arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_a_folder_without_a_config(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        matched(capsys, monkeypatch, "--like", tmp_path, "--by", "flops")
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/config.json does not exist; give a config")


def test_the_command():
    path = ROOT / "pretrain/configs/groups/c_lru_fixed.yaml"
    command = [sys.executable, "-m", "model.config", "match", "--by", "parameters", "--like", path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    config = ModelConfig.from_dict(yaml.safe_load(path.read_text())["model"])
    assert ModelConfig.from_dict(yaml.safe_load(done.stdout)["model"]) == dense_twin(config, "parameters")
