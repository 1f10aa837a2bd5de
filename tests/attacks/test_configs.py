"""Configs with one thing wrong: every one is refused in one line or understood, never a traceback."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from model import ModelConfig
from model.config.model import PRESETS
from model.export_files import load_config
from pretrain.config import RunConfig
from pretrain.dry_run import describe
from pretrain.ds_config import load_ds_config
from pretrain.run_config import load_run_config
from pretrain.setup import check_host_memory, prepare

from ..conftest import ROOT
from .mutations import byte_mutations, config_mutations, paths, refusal

CONFIGS = sorted((ROOT / "pretrain/configs").rglob("*.yaml"))
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
# (in all, of them as text with damaged bytes) by default and in `make test-slow`
YAML_COUNTS = [(130, 40), pytest.param((800, 400), marks=pytest.mark.slow)]
JSON_COUNTS = [(100, 30), pytest.param((600, 300), marks=pytest.mark.slow)]


def finite(values: Any) -> bool:
    places = list(paths(values))
    for place in places:
        value = values
        for key in place:
            value = value[key]
        if isinstance(value, float) and not math.isfinite(value):
            return False
    return True


def mutated(
    files: list[Any], counts: tuple[int, int], text: Callable[[Any], str]
) -> Iterator[tuple[str, bytes]]:
    """(what was done, the file) of mutated values and of damaged bytes, spread over `files`."""
    whole, damaged = (-(-count // len(files)) for count in counts)
    for number, values in enumerate(files):
        for what, changed in config_mutations(values, whole - damaged, seed=number):
            yield what, text(changed).encode()
        for what, data in byte_mutations(text(values).encode(), damaged, seed=number):
            yield what, data


@pytest.mark.parametrize("counts", YAML_COUNTS)
def test_run_configs(counts, tmp_path, monkeypatch):
    """Through the command's own path up to the first step; what is accepted is described in a dry run."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    path, described = tmp_path / "run.yaml", 0
    files = [yaml.safe_load(file.read_text()) for file in CONFIGS]
    for values in files:
        values.setdefault("data", {}).setdefault("path", str(tmp_path / "data"))
    for what, text in mutated(files, counts, lambda v: yaml.safe_dump(v, allow_unicode=True)):
        path.write_bytes(text)
        runs = []

        def read(runs: list[Any] = runs) -> None:
            runs.append(prepare(str(path), str(DS_CONFIGS[0]), [], dry_run=True))

        line = refusal(read)
        if what.endswith("misspelt") or what.startswith("a key added"):
            assert line is not None, what
        for run in runs:
            assert finite(dataclasses.asdict(run.config)), what
            assert finite(run.model_config.to_dict()), what
            if described < 20 and run.model_config.num_hidden_layers < 10:
                described += 1
                assert refusal(lambda run=run: describe(run)) is None, what
    assert described >= 10


@pytest.mark.parametrize("counts", JSON_COUNTS)
def test_model_configs_of_an_export(counts, tmp_path):
    files = [ModelConfig.from_dict({"preset": name}).to_dict() for name in sorted(PRESETS)]
    files[0]["rope_scaling"] = dataclasses.asdict(ModelConfig.from_dict({"rope_scaling": {}}).rope_scaling)
    files[1]["distillation"] = {"kv_weight": 0.0, "method": "cot"}
    for what, text in mutated(files, counts, json.dumps):
        (tmp_path / "config.json").write_bytes(text)
        configs = []
        line = refusal(lambda configs=configs: configs.append(load_config(tmp_path)))
        if what.endswith("misspelt") or what.startswith("a key added"):
            assert line is not None, what
        assert all(finite(config.to_dict()) for config in configs), what


@pytest.mark.parametrize("counts", JSON_COUNTS)
def test_deepspeed_configs(counts, tmp_path):
    path = tmp_path / "ds.json"
    everything = {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "sub_group_size": 1e9},
        "data_types": {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": ["norm"]},
        "comms_logger": {"enabled": True, "prof_ops": ["all_gather"]},
        "bf16": {"enabled": True},
    }
    files = [everything, *(json.loads(file.read_text()) for file in DS_CONFIGS)]
    for what, text in mutated(files, counts, json.dumps):
        path.write_bytes(text)
        read: list[Any] = []
        line = refusal(lambda read=read: read.append(load_ds_config(str(path), RunConfig(), 8, 4)))
        if what.endswith("misspelt") or what.startswith("a key added"):
            assert line is not None, what
        assert finite(read), what


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            "model.num_hidden_layers=1000000000",
            "model.num_hidden_layers=1000000000 must be at least 1 and at m",
        ),
        ("model.hidden_size=2000000", "bytes of them or more, but this machine has"),
        ("model.vocab_size=1000000000", "bytes of them or more, but this machine has"),
        ("model.n_routed_experts=9223372036854775808", "model.n_routed_experts=9223372036854775808 must be"),
        ("model.recurrence.max_steps=1000000000", "model.recurrence.max_steps=1000000000 must be at least 1"),
        ("model.initializer_range=1e308", "model.initializer_range=1e+308 must be above 0 and at most 10"),
        ("model.initializer_range=.nan", "model.initializer_range=nan is not a finite number"),
        ("optimizer.lr=.inf", "optimizer.lr=inf is not a finite number"),
        ("optimizer.lr=1e308", "optimizer.lr=1e+308 must be above 0 and at most 100"),
        ("eval_batches=0", "eval_batches=0 must be at least 1"),
        ("global_batch_size=1000000000000", "global_batch_size=1000000000000 must be at least 1"),
        ("peak_tflops=0", "peak_tflops=0 must be above 0"),
        ("data.stages={}", "data.stages={} is not a list"),
        ("data.stages=[{tokens: 1, weights: [1]}]", "data.stages[0].weights=[1] is not a mapping of keys"),
        ("model.recurrence.num_steps=[3,2]", "model.recurrence.num_steps=[3, 2] is not an integer"),
        ("output_dir=[]", "output_dir=[] is not text"),
        ("model=null", "model=None is not a mapping of keys to values"),
        ("wandb.project=a/b", "wandb.project='a/b' is not a name that W&B takes"),
        ("seed=1" + "0" * 5000, "config cannot be read: "),
    ],
)
def test_absurd_values_are_refused_before_anything_is_built(overrides, line):
    """Nothing is allocated: it is refused by types, limits and arithmetic."""

    def read() -> None:
        given = ["data.path=x", "model.recurrence.placement=none", overrides]
        config = load_run_config(str(ROOT / "pretrain/configs/real_cpu.yaml"), given)
        check_host_memory(ModelConfig.from_dict(config.model), sharded_over=config.ep_size)

    found = refusal(read)
    assert found is not None
    assert line in found, found


@pytest.mark.parametrize(
    "text", [b"\xff\xfe", b"a: !!python/object:os.system x", b"[" * 5_000, b"a: &a [*a]", b"? [1]\n"]
)
def test_hostile_yaml_is_one_line(tmp_path: Path, text: bytes):
    path = tmp_path / "run.yaml"
    path.write_bytes(text)
    found = refusal(lambda: load_run_config(str(path), []))
    assert found is not None
    assert str(path) in found
