"""Predictions of pretrain/plan.py against DeepSpeed on real ranks, autograd and hand calculation."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model import ModelConfig, ZeroModel
from model.config.execution import ExecutionConfig
from model.counts import flops_per_token, num_parameters
from pretrain.plan import main
from pretrain.planning.communication import Collective, collectives, gather_schedule
from pretrain.planning.layout import Hardware, Layout, ZeroSettings, model_parts
from pretrain.planning.memory import activation_bytes, partitions
from pretrain.planning.search import plan, search

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("plan_worker.py")
LOOP = {"placement": "block", "ranges": [[1, 2]], "num_steps": 2}
SMALL = {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_hidden_layers": 5,
    "intermediate_size": 80,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "recurrence": LOOP,
}
PLAIN = {"recurrence": {"placement": "none"}}
EVERY_USE = {"max_reuse_distance": 0, "prefetch_bucket_size": 0}
# Layers of about 60,000 parameters: early ones are released and gathered again, late ones stay.
SOME_USES = {"max_reuse_distance": 150_000, "prefetch_bucket_size": 0}


def case(stage: int, ep: int, accumulation: int = 1, **other: Any) -> dict[str, Any]:
    return {
        "stage": stage,
        "ep": ep,
        "micro_batch_size": 2,
        "accumulation": accumulation,
        "sequence_length": 64,
        "checkpointing": other.pop("checkpointing", "none"),
        "element_bytes": other.pop("element_bytes", 2),
        "reduction_bytes": other.pop("reduction_bytes", None),
        "model": SMALL | other.pop("model", {}),
        **other,
    }


TWO_RANKS = {
    "kept": case(3, 2),
    "gathered at every use": case(3, 2, zero=EVERY_USE),
    "gathered at some uses": case(3, 2, zero=SOME_USES, model=PLAIN),
    "blocks recomputed": case(3, 2, zero=EVERY_USE, checkpointing="block", element_bytes=4),
    "steps recomputed": case(3, 2, 2, zero=EVERY_USE, checkpointing="iteration"),
    "no expert parallelism": case(3, 1, 2),
    "reduced in fp32": case(3, 2, 2, reduction_bytes=4),
    "ZeRO-2": case(2, 2, 2),
    "ZeRO-1": case(1, 2, 2, model={"num_nextn_predict_layers": 1}),
    "ZeRO-1, no expert parallelism": case(1, 1),
    "ZeRO-1, reduced in fp32": case(1, 2, 2, reduction_bytes=4),
}
FOUR_RANKS = {
    "experts sharded twice": case(3, 2, 2, zero=EVERY_USE),
    "ZeRO-2": case(2, 2),
    "one expert per rank": case(3, 4),
}


def layout_of(given: dict[str, Any], gpus: int) -> Layout:
    fields = {name: value for name, value in given.items() if name not in ("model", "zero")}
    distance = given.get("zero", {}).get("max_reuse_distance", ZeroSettings().max_reuse_distance)
    return Layout(gpus=gpus, zero=ZeroSettings(max_reuse_distance=distance), **fields)


def check_ranks(folder: Path, cases: dict[str, dict[str, Any]], ranks: int) -> None:
    reports = [json.loads(line) for path in folder.iterdir() for line in path.read_text().splitlines()]
    assert len(reports) == len(cases) * ranks
    for report in reports:
        given = cases[report["case"]]
        config, layout = ModelConfig.from_dict(given["model"]), layout_of(given, ranks)
        parts = model_parts(config)
        loads = [[n / sum(layer) for n in layer] for layer in report["loads"]]
        predicted: dict[str, float] = {}
        for c in collectives(config, parts, layout, loads, ep_rank=report["rank"] % layout.ep):
            predicted[c.operation] = predicted.get(c.operation, 0) + c.bytes
        logged = {
            name: size for name, size in report["logged"].items() if size > 1000 and name != "broadcast"
        }
        # The loads are those of all expert-parallel groups together; all else is exact except lone vectors.
        assert predicted == pytest.approx(logged, rel=0.05 if ranks > layout.ep > 1 else 1e-3), report
        kept = partitions(parts, layout)
        for name, size in report["held"].items():
            # Stages 1 and 2 pad each of three flat groups; AdamW counts its steps in another few bytes.
            assert kept[name] == pytest.approx(size, abs=100 * ranks), (name, report)


def test_what_two_ranks_send_and_keep(launch, tmp_path):
    launch(2, WORKER, tmp_path, json.dumps(TWO_RANKS))
    check_ranks(tmp_path, TWO_RANKS, 2)


@pytest.mark.slow
def test_what_four_ranks_send_and_keep(launch, tmp_path):
    launch(4, WORKER, tmp_path, json.dumps(FOUR_RANKS))
    check_ranks(tmp_path, FOUR_RANKS, 4)


class FusedNorm(torch.autograd.Function):
    """RMSNorm that saves what a GPU's fused kernel saves; the CPU's also saves a normalised copy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return x * scale * (1 if weight is None else weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> None:
        raise NotImplementedError


def saved_bytes(config: ModelConfig, rows: int, length: int) -> int:
    """Bytes that autograd saves in the layers' forward pass, each storage once, without parameters."""
    # Blockwise attention, the CPU default, saves other tensors than a GPU's fused kernels.
    model = ZeroModel(config, execution=ExecutionConfig(attention="sdpa")).train()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in parameters:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    tokens = torch.zeros(rows, length, dtype=torch.int64)
    context = model.attention_context(tokens)
    context.statistics, context.num_steps = True, config.recurrence.num_steps
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = model.model(model.model.embed(tokens, context), context)
    assert out.hidden.requires_grad
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize(
    "given",
    [
        {"first_k_dense_replace": 0},
        {"use_moe": False, "q_lora_rank": 48},
        {"use_mla": False, "use_moe": False, "hidden_act": "relu2", "qk_norm": True},
        {"hidden_act": "relu2", "qk_norm": True},
        {"use_moe": False, "qk_norm": True, "rms_norm_affine": False},
        {"recurrence": {"placement": "block", "ranges": [[1, 1]], "num_steps": 3}},
        {"use_moe": False, "recurrence": {"placement": "kv", "num_steps": 3}},
    ],
)
def test_activations_are_what_autograd_keeps(monkeypatch, given):
    monkeypatch.setattr(
        torch.nn.functional, "rms_norm", lambda x, shape, weight, eps: FusedNorm.apply(x, weight, eps)
    )
    sizes = {"hidden_size": 128, "num_hidden_layers": 3, "vocab_size": 101, "moe_intermediate_size": 160}
    # Equal widths of keys and values: the CPU's attention pads the narrower.
    config = ModelConfig.from_dict({**sizes, "v_head_dim": 48, **given})
    layout = Layout(gpus=1, micro_batch_size=2, sequence_length=128, element_bytes=4)
    assert activation_bytes(config, layout) == pytest.approx(saved_bytes(config, 2, 128), rel=0.1)


@pytest.mark.parametrize("model", ["small", "base", "large", "nano"])
def test_the_modules_hold_all_parameters(model):
    config = ModelConfig.from_dict({"preset": model})
    held = sum(part.held(1) for part in model_parts(config).values())
    assert held == num_parameters(config)


# 16 GPUs on two nodes, 16 bytes. A ring sends 15/16 of the full tensor from every GPU; of it 1/2 (of two
# nodes) enters a node, through 8 ports. Every second GPU's group: 4 on each node.
@pytest.mark.parametrize(
    ("operation", "group", "ep", "nvlink", "network"),
    [
        ("all_gather_into_tensor", "world", 1, 16 * 15 - 16, 16.0),
        ("reduce_scatter_tensor", "world", 1, 15 - 1, 1.0),
        ("all_reduce", "world", 1, 2 * (15 - 1), 2.0),
        ("reduce_scatter_tensor", "expert_data", 2, 14 - 2, 2.0),
        ("reduce_scatter_tensor", "expert_data", 8, 0.0, 8.0),
        ("all_to_all_single", "expert", 8, 14.0, 0.0),
        ("all_to_all_single", "expert", 16, 7.0, 8.0),
        ("reduce_scatter_tensor", "expert_data", 16, 0.0, 0.0),
    ],
)
def test_bytes_by_link(operation, group, ep, nvlink, network):
    links = Collective(operation, group, "backward", 16.0, 1).links(Layout(gpus=16, ep=ep))
    assert links == pytest.approx((nvlink, network))


def test_the_whole_trace_decides_what_stays_gathered():
    """large has 1.25e9 parameters per rank at ep 8: its first layers are gathered again, its last stay."""
    config = ModelConfig.from_dict({"preset": "large"})
    parts = model_parts(config)
    gathering = gather_schedule(config, parts, Layout(gpus=256, ep=8))
    back = [name for name in gathering.backward if name.startswith("layers")]
    assert back == [f"layers.{i}" for i in range(len(back) - 1, -1, -1)]
    distance = sum(parts[f"layers.{i}"].held(8) for i in range(len(back), config.num_hidden_layers))
    assert distance < 1e9 <= distance + parts["layers.0"].held(8)


def test_step_time_by_hand():
    """One GPU: 3 x the forward FLOPs at 40% of 989 TFLOP/s, then AdamW over 30 bytes per parameter."""
    config = ModelConfig.from_dict({"preset": "small"})
    predicted = plan(config, Layout(gpus=1, micro_batch_size=4, accumulation=3), Hardware())
    flops = 3 * flops_per_token(config, 2048) * 3 * 4 * 2048
    assert predicted.seconds["compute"] == pytest.approx(flops / (0.4 * 989e12))
    update = 30 * num_parameters(config) / (0.7 * 3.35e12)
    assert predicted.step_seconds == pytest.approx(predicted.seconds["compute"] + update, rel=1e-6)
    assert predicted.limit == "compute"


def test_uneven_loads_cost_time_and_memory():
    config = ModelConfig.from_dict({"preset": "base"})
    layout, layers = Layout(gpus=8, ep=8), config.num_hidden_layers
    even = plan(config, layout, Hardware(), [[1 / 8] * 8] * layers)
    skewed = plan(config, layout, Hardware(), [[0.3, *[0.1] * 7]] * layers)
    assert even == plan(config, layout, Hardware())
    assert skewed.memory["activations"] > even.memory["activations"]
    assert skewed.seconds["compute"] > even.seconds["compute"]
    # Of the rows there and back, those that come to the rank are 2.4 times as many.
    assert skewed.nvlink_bytes > even.nvlink_bytes


def test_the_search_finds_the_best_that_fits():
    config, given = ModelConfig.from_dict({"preset": "base"}), {"gpus": 8, "sequence_length": 2048}
    found = search(config, Hardware(), 64, given)
    best = found.tokens_per_second
    for stage in (1, 2, 3):
        for ep in (1, 2, 4, 8):
            for micro in (1, 2, 4, 8):
                layout = Layout(8, ep, stage, micro, 8 // micro, gradient_bytes=4, reduction_bytes=4)
                other = plan(config, layout, Hardware())
                assert other.tokens_per_second <= best + 10 or other.memory_bytes > Hardware().usable_bytes
    tight = Hardware(memory_bytes=found.memory_bytes / 0.9 * 0.7)
    assert search(config, tight, 64, given).memory_bytes <= tight.usable_bytes


@pytest.fixture
def run_plan(monkeypatch, capsys) -> Callable[..., str]:
    """The command line in this process, from the root of the repository; returns what it prints."""

    def run(*arguments: Any) -> str:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--gpus 256 --ep 3", "ep=3 does not divide the 8 experts; choose one of their divisors"),
        ("--gpus 4 --ep 8", "ep=8 does not divide the 4 GPUs; choose one of its divisors"),
        ("--gpus 12 --global_batch_size 12", "gpus=12 does not fill nodes of 8; choose a multiple of 8"),
        ("--gpus 3", "--global_batch_size 2048 is not divisible by the 3 GPUs; choose a multiple of 3"),
        ("--gpus 8 --hardware speed=1", "hardware.speed is not a known key; known: "),
        ("--gpus 8 --hardware memory_bytes=0", "hardware.memory_bytes=0 must be at least 1"),
        ("--gpus 8 --hardware memory_bytes=1e10", "nothing fits 9,000,000,000 usable bytes on 8 GPUs: "),
        ("--gpus 8 --loads pyproject.toml", "--loads pyproject.toml has no expert_load in any line"),
        ("--gpus 0", "gpus=0 must be at least 1"),
        ("--gpus 8 --ep 0", "ep=0 must be at least 1"),
        ("--gpus 8 --micro_batch_size 0", "micro_batch_size=0 must be at least 1"),
        ("--gpus 8 --sequence_length -5", "sequence_length=-5 must be at least 1"),
        ("--gpus 8 --global_batch_size -8", "--global_batch_size=-8 must be at least 1"),
        ("--gpus 8 --hardware overlap=5", "hardware.overlap=5 must be at least 0 and at most 1"),
        ("--gpus 8 --hardware peak_flops=inf", "hardware.peak_flops=inf is not a finite number"),
        ("--gpus 8 --hardware gpus_per_node=1e3", "hardware.gpus_per_node=1000.0 is not an integer"),
    ],
)
def test_mistakes_are_one_line(run_plan, capsys, arguments, line):
    with pytest.raises(SystemExit) as stopped:
        run_plan("--model", "large", *arguments.split())
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert said.out == ""
    assert said.err.startswith(f"error: {line}")
    assert said.err.count("\n") == 1


def test_a_run_is_planned_with_its_own_loads(run_plan, tmp_path):
    """The model of a YAML, loads of a metrics.jsonl, JSON out."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(
        '{"step": 1}\n' + json.dumps({"step": 2, "expert_load": [[0.4, 0.2, 0.2, 0.2]] * 2}) + "\n"
    )
    demo = ("--model", "pretrain/configs/demo.yaml", "--gpus", 2, "--ep", 2, "--stage", 3, "--json")
    small = ("--sequence_length", 256, "--global_batch_size", 16, "--micro_batch_size", 8)
    (even,) = json.loads(run_plan(*demo, *small))
    (own,) = json.loads(run_plan(*demo, *small, "--loads", metrics))
    # 2 looped runs and 1 more, 8 x 256 tokens to 2 experts: 1.2 times as many come as are sent.
    rows = 3 * 8 * 256 * 2 * 128 * 2
    sent = [c["bytes"] for c in own["traffic"] if c["operation"] == "all_to_all_single"]
    assert own["layout"]["gpus"] == 2
    assert sum(sent) == pytest.approx(2 * rows * 2.2, rel=0.001)
    assert own["memory_bytes"] > even["memory_bytes"]


def test_the_page_matches_its_commands(run_plan):
    """Every command in docs/PLAN.md prints the block below it."""
    page = (ROOT / "docs/PLAN.md").read_text()
    found = re.findall(
        r"```bash\npython pretrain/plan.py (.*?)\n```\n+(.*?)\n\n<!-- end -->", page, flags=re.S
    )
    assert len(found) == 3
    for arguments, printed in found:
        output = run_plan(*arguments.split()).strip()
        assert output == printed.removeprefix("```text\n").removesuffix("\n```")
