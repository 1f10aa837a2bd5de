"""Models built shard by shard: what exists at once, in elements, and on real ranks in resident memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model import ModelConfig, ZeroModel
from model.initialization import fill_initial
from pretrain.building import materialize, outlined
from pretrain.planning.communication import gather_schedule
from pretrain.planning.layout import Layout, ZeroSettings, model_parts
from pretrain.planning.memory import memory, start_memory

WORKER = Path(__file__).with_name("memory_worker.py")
LOOP = {"placement": "block", "ranges": [[1, 1]], "num_steps": 2, "update": "gated", "injection": "concat"}
SMALL = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_nextn_predict_layers": 1,
    "recurrence": LOOP,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_parameter_is_whole_at_a_time_with_the_same_initial_values(dtype):
    config, given = ModelConfig.from_dict(SMALL), {}
    model = outlined(lambda: ZeroModel(config, seed=3))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    largest = max(parameter.numel() for parameter in model.parameters())
    expected = dict(ZeroModel(config, seed=3).named_parameters())
    marks = [parameter.__dict__.setdefault("mark", object()) for parameter in model.parameters()]
    at_once = []

    def write(value, module, path, name, outline):
        fill_initial(value, module, path, name, config.initializer_range, seed=3)
        given[f"{path}.{name}"] = value.clone()

    def keep(parameter):
        real = [p for p in model.parameters() if not p.is_meta]
        at_once.append(sum(p.untyped_storage().nbytes() // dtype.itemsize for p in real))
        assert real[-1] is parameter
        parameter.data = torch.empty(0, dtype=dtype)

    materialize(model, write, keep, dtype)
    assert max(at_once) == largest
    assert len(at_once) == len(expected)
    assert list(given) == list(expected)  # DeepSpeed shards parameters in the order of the model's
    assert [parameter.mark for parameter in model.parameters()] == marks
    for name, value in expected.items():
        assert torch.equal(given[name], value.to(dtype)), name


CASE = {
    "rows": 1,
    "sequence_length": 64,
    "steps": 2,
    "freed": True,
    "model": {
        "vocab_size": 8000,
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "intermediate_size": 768,
        "moe_intermediate_size": 320,
        "n_routed_experts": 64,
        "num_attention_heads": 4,
        "recurrence": {"placement": "none"},
    },
}  # 85 million parameters


def case(stage: int, ep: int, bf16: bool = True) -> dict[str, Any]:
    zero = {
        "stage": stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": 6 * 10**6,
    }
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "sub_group_size": 2 * 10**7}
        zero |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    return CASE | {"ep": ep, "ds_config": {"zero_optimization": zero, "bf16": {"enabled": bf16}}}


def predictions(given: dict[str, Any], ranks: int) -> tuple[dict[str, int], dict[str, int]]:
    """Of the start, and of a step."""
    zero, config = given["ds_config"]["zero_optimization"], ModelConfig.from_dict(given["model"])
    layout = Layout(
        gpus=ranks,
        ep=given["ep"],
        stage=zero["stage"],
        micro_batch_size=given["rows"],
        sequence_length=given["sequence_length"],
        element_bytes=2 if given["ds_config"]["bf16"]["enabled"] else 4,
        gpus_per_node=ranks,
        zero=ZeroSettings(zero["reduce_bucket_size"], 0, zero.get("sub_group_size", 1e9)),
    )
    parts = model_parts(config)
    gathering = gather_schedule(config, parts, layout) if layout.stage == 3 else None
    return start_memory(parts, layout, cpu=True), memory(config, parts, layout, gathering, 1.0, cpu=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "ep", "bf16"), [(3, 1, True), (3, 2, True), (3, 1, False), (2, 2, True), (1, 1, True)]
)
def test_ranks_hold_what_is_predicted(launch, tmp_path, stage, ep, bf16):
    """Peaks of resident memory, net of the process's own, in a start and in the second step."""
    given = case(stage, ep, bf16)
    launch(2, WORKER, tmp_path, json.dumps(given))
    start, step = predictions(given, 2)
    for path in tmp_path.glob("*.json"):
        found = json.loads(path.read_text())
        assert found["start"] == pytest.approx(sum(start.values()), rel=0.1), (found, start)
        assert found["step 2"] == pytest.approx(sum(step.values()), rel=0.1), (found, step)
    assert len(list(tmp_path.glob("*.json"))) == 2
