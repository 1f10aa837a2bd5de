"""Predictions of pretrain/plan.py against DeepSpeed on real ranks, autograd and arithmetic done by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model import ModelConfig, ZeroModel
from model.execution import ExecutionConfig
from pretrain.plan_communication import Collective, collectives, gather_schedule
from pretrain.plan_layout import Hardware, Layout, ZeroSettings, model_parts
from pretrain.plan_memory import activation_bytes, partitions
from pretrain.plan_search import plan, search

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
# Layers of about 60,000 parameters: early ones go and come back, late ones stay.
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
    "ZeRO-2": case(2, 2, 2),
    "ZeRO-1": case(1, 2, 2, model={"num_nextn_predict_layers": 1}),
    "ZeRO-1, no expert parallelism": case(1, 1),
}
FOUR_RANKS = {
    "experts sharded twice": case(3, 2, 2, zero=EVERY_USE),
    "ZeRO-2": case(2, 2),
    "one expert a rank": case(3, 4),
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
        assert predicted == pytest.approx(logged, rel=0.05), report
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
