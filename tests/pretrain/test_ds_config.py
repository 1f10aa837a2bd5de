"""The DeepSpeed JSON: our table of keys against the installed DeepSpeed, and mistakes in one line."""

import dataclasses
import json
import re
from typing import Any

import pytest
from pydantic import BaseModel

from pretrain.config import RunConfig
from pretrain.ds_config import fit_buckets, load_ds_config
from pretrain.ds_keys import (
    REFUSED,
    STAGES,
    Bf16,
    CommsLogger,
    DataTypes,
    DeepSpeedJson,
    FlopsProfiler,
    Fp16,
    Monitor,
    Offload,
    ZeroOptimization,
)
from tests.conftest import ROOT


class Asked(dict):
    """Values that note which keys were asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.asked = set[str]()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> "Asked":
        return self


def names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def refused(section: str) -> set[str]:
    """Keys of a section, `a.b.`, that are refused."""
    inside = {key.removeprefix(section) for key in REFUSED if key.startswith(section)}
    return {key for key in inside if "." not in key}


@pytest.fixture(scope="module")
def deepspeed_config() -> Any:
    from deepspeed.runtime import config

    return config


def test_every_key_that_deepspeed_reads_is_supported_or_refused(deepspeed_config):
    values = Asked({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4})
    deepspeed_config.DeepSpeedConfig(values)
    ours, removed = names(DeepSpeedJson), set(deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert sorted(values.asked - ours) == sorted(refused("") - {"fp8"})
    assert ours <= values.asked
    assert removed <= refused("")


def test_every_key_of_a_section_is_supported_or_refused(deepspeed_config):
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CSVConfig, TensorBoardConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    sections: tuple[tuple[type, type[BaseModel], str], ...] = (
        (ZeroOptimization, DeepSpeedZeroConfig, "zero_optimization."),
        (Offload, DeepSpeedZeroOffloadOptimizerConfig, "zero_optimization.offload_optimizer."),
        (Offload, DeepSpeedZeroOffloadParamConfig, "zero_optimization.offload_param."),
        (Bf16, DeepSpeedBF16Config, "bf16."),
        (Fp16, DeepSpeedFP16Config, "fp16."),
        (Monitor, TensorBoardConfig, "tensorboard."),
        (Monitor, CSVConfig, "csv_monitor."),
        (CommsLogger, CommsLoggerConfig, "comms_logger."),
    )
    for kind, model, section in sections:
        known = {field.alias or name for name, field in model.model_fields.items()}
        removed = deepspeed_config._REMOVED_ZERO_CONFIG_KEYS if kind is ZeroOptimization else {}
        assert sorted(known | set(removed)) == sorted(names(kind) | refused(section)), section
        defaults = {field.alias or name: field.default for name, field in model.model_fields.items()}
        for field in dataclasses.fields(kind):  # all have DeepSpeed's types and defaults, but for `stage`
            if field.default is not dataclasses.MISSING:
                assert defaults[field.name] == field.default, (section, field.name)
                model(**{field.name: field.default})
    assert names(ZeroOptimization) >= STAGES.keys()


def test_sections_read_by_hand(deepspeed_config):
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig

    profiler, types = Asked({}), Asked({})
    DeepSpeedFlopsProfilerConfig({"flops_profiler": profiler})
    assert profiler.asked == names(FlopsProfiler)
    batch = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4}
    deepspeed_config.DeepSpeedConfig({**batch, "data_types": types})
    assert types.asked == names(DataTypes) | refused("data_types.")


@pytest.fixture
def load(tmp_path):
    """load_ds_config of values or text, for a run with the default config."""

    def read(values: dict[str, Any] | str, config: RunConfig | None = None) -> dict[str, Any]:
        path = tmp_path / "ds.json"
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        return load_ds_config(str(path), config or RunConfig(), 8, 4)

    return read


ZERO = {"stage": 3}


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"foo": 1}, "foo is not a known key; known: "),
        ({"bf_16": {"enabled": True}}, "bf_16 is not a known key; did you mean 'bf16'?"),
        ({"fp8": {"enabled": True}}, "fp8 is not supported: DeepSpeed has no such section; enable bf16; "),
        ({"bf16": {"enable": True}}, "bf16.enable is not a known key; did you mean 'enabled'?"),
        ({"bf16": True}, "bf16=True is not a mapping of keys to values"),
        ({"bf16": {"enabled": "true"}}, "bf16.enabled='true' is not true or false"),
        ({"bf16": {"enabled": "auto"}}, 'bf16.enabled="auto" is not filled in; write a value'),
        ({"bf16": {"check_grad_overflow": False}}, "bf16.check_grad_overflow=False is unknown; known: True"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16.enabled=true is not supported"),
        ({"zero_optimization": {}}, "zero_optimization.stage is missing; add it"),
        ({"zero_optimization": True}, "zero_optimization=True is not a mapping of keys to values"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage=0 is not supported: without ZeRO"),
        (
            {"zero_optimization": {"stage": True}},
            "zero_optimization.stage=True is unknown; known: 0, 1, 2, 3",
        ),
        ({"zero_optimization": {**ZERO, "overlapcomm": 1}}, "zero_optimization.overlapcomm is not a known k"),
        (
            {"zero_optimization": {**ZERO, "reduce_bucket_size": 0.5}},
            "zero_optimization.reduce_bucket_size=0.5 is not an integer",
        ),
        (
            {"zero_optimization": {"stage": 1, "stage3_max_reuse_distance": 3}},
            "zero_optimization.stage3_max_reuse_distance is for stage 3, but stage=1; delete it",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param is for stage 3, but stage=2",
        ),
        (
            {"zero_optimization": {**ZERO, "offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.offload_optimizer.device='nvme' is unknown; did you mean 'none'?",
        ),
        (
            {"zero_optimization": {**ZERO, "offload_optimizer": {"ratio": 0.5}}},
            "zero_optimization.offload_optimizer.ratio is not supported: it needs DeepSpeed's own optimizer",
        ),
        ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer=true is not supported: the opt"),
        ({"train_batch_size": 64}, "train_batch_size=64 is also set by global_batch_size of the YAML"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype=bf16 does not go with"),
        ({"steps_per_print": 0}, "steps_per_print=0 must be at least 1"),
        ({"activation_checkpointing": {}}, "activation_checkpointing is not supported: execution.check"),
    ],
)
def test_mistakes_are_one_line(load, tmp_path, values, line):
    with pytest.raises(ValueError, match=re.escape(f"--ds_config {tmp_path / 'ds.json'}: {line}")) as caught:
        load({"zero_optimization": ZERO, **values})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{", "is not valid JSON"),
        ("[" * 10**5, "is not valid JSON"),
        ("[1]", "config=[1] is not a mapping of keys to values"),
        ('{"bf16": {}, "bf16": {"enabled": true}}', "the key 'bf16' stands in one section twice; delete one"),
        (
            '{"zero_optimization": {"stage": 3, "sub_group_size": NaN}}',
            "sub_group_size=nan is not an integer",
        ),
        ('{"zero_optimization": {"stage": 1' + "0" * 5000 + "}}", "is not valid JSON"),
    ],
)
def test_hostile_text_is_one_line(load, text, line):
    with pytest.raises(ValueError, match=re.escape(line)) as caught:
        load(text)
    assert "\n" not in str(caught.value)


def test_sizes_may_be_written_as_floats(load):
    zero = load({"zero_optimization": {"stage": 3, "sub_group_size": 1e9}})["zero_optimization"]
    assert zero == {"stage": 3, "sub_group_size": 10**9}
    assert type(zero["sub_group_size"]) is int


def test_offload_runs_torchs_optimizer(load):
    values = load({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}})
    assert values["zero_force_ds_cpu_optimizer"] is False


def test_buckets_are_no_larger_than_the_model(load):
    values = load({"zero_optimization": {"stage": 2}})
    fit_buckets(values, 36_576)
    assert values["zero_optimization"]["reduce_bucket_size"] == 36_576
    values = load({"zero_optimization": {"stage": 2}})
    fit_buckets(values, 10**12)
    assert values["zero_optimization"]["reduce_bucket_size"] == 500_000_000
    values = load({"zero_optimization": {"stage": 2, "reduce_bucket_size": 2e9}})
    fit_buckets(values, 36_576)
    assert values["zero_optimization"]["reduce_bucket_size"] == 2 * 10**9


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").iterdir()), ids=lambda path: path.name)
def test_the_shipped_files_are_accepted_by_both(deepspeed_config, path):
    values = load_ds_config(str(path), RunConfig(), 8, 4)
    deepspeed_config.DeepSpeedConfig({**values, "gradient_accumulation_steps": 4})
