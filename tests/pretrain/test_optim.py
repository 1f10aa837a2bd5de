"""Schedules, the optimizer and weight decay of each parameter, Muon and the moving average."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model import ModelConfig, RecurrenceConfig, ZeroModel
from model.config.recurrence import HaltingConfig
from pretrain.config import OptimizerConfig
from pretrain.ds_config import load_ds_config
from pretrain.export import export_run
from pretrain.muon import optimizer_states
from pretrain.optim import choose_adamw_kernel, learning_rate, parameter_groups
from pretrain.run_config import load_run_config

from .conftest import ROOT, seal

WORKER = Path(__file__).with_name("optim_worker.py")
DEMO = str(ROOT / "pretrain/configs/demo.yaml")
SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "intermediate_size": 64,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
ACT = HaltingConfig(kind="act", expectation="state", granularity="mixed")
BLOCK = RecurrenceConfig(
    "block", [[1, 1]], 2, sandwich_norm=True, injection="gate", iteration_embedding=True, halting=ACT
)
MODELS = {
    "block": {"recurrence": BLOCK, "num_nextn_predict_layers": 1, "embedding_mixing": 3, "q_lora_rank": 16},
    "latent": {
        "recurrence": RecurrenceConfig("kv", num_steps=2, position_mixing=3, query_conditioned=True),
    },
    "pause": {"num_pause_tokens": 2, "use_mla": False, "num_key_value_heads": 2},
    "memory": {"num_memory_tokens": 2, "segment_length": 8, "use_moe": False},
}
# Written out, every name of these models: what the code finds by type and shape.
NOT_DECAYED = re.compile(r"norm\.weight$|\.bias$|iteration\.scale$|embed_tokens|pause_tokens|memory\.initial")
DECAYED_BY_ADAMW = re.compile(
    r"^lm_head\.weight$|mlp\.gate\.weight$|mixing\.weight$|halting\.(token|sequence)\.weight$"
)
BY_MUON = re.compile(
    r"self_attn\.(q|q_a|q_b|k|v|o|kv_b)_proj\.weight$|kv_a_proj_with_mqa\.weight$|eh_proj\.weight$"
    r"|(gate|up|down|query|k_latent)_proj\.weight$|injection\.weight$|\.(unit|recurrence\.0)\.gate\.weight$"
    r"|experts\.w[123]$"
)


def config(**values: object) -> OptimizerConfig:
    return OptimizerConfig(**{"lr": 1.0, "min_lr": 0.1, "warmup_steps": 4, **values})


def test_cosine_at_its_corners():
    rates = [learning_rate(config(), step, 104) for step in range(130)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[54] == pytest.approx(0.55)  # half way from step 4 to 104
    assert rates[29] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert rates[104:] == pytest.approx([0.1] * 26)
    assert all(a > b for a, b in zip(rates[4:103], rates[5:104], strict=True))
    assert learning_rate(config(decay_steps=54), 29, 10_000) == pytest.approx(0.55)  # the horizon is given


def test_wsd_at_its_corners():
    wsd = config(schedule="wsd", wsd_decay_steps=16)
    rates = [learning_rate(wsd, step, 100) for step in range(120)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:85] == [1.0] * 81  # stable until 16 steps before the end
    assert rates[85] == pytest.approx(0.1 + 0.9 * (1 - 1 / 4))
    assert rates[88] == pytest.approx(0.1 + 0.9 * (1 - 2 / 4))
    assert rates[93] == pytest.approx(0.1 + 0.9 * (1 - 3 / 4))
    assert rates[100:] == pytest.approx([0.1] * 20)
    earlier = config(schedule="wsd", wsd_decay_steps=16, decay_steps=50)
    assert [learning_rate(earlier, step, 100) for step in (34, 38, 50)] == pytest.approx([1.0, 0.55, 0.1])
    tenth = config(schedule="wsd")  # by default the last tenth
    assert [learning_rate(tenth, step, 100) for step in (90, 100)] == pytest.approx([1.0, 0.1])
    assert learning_rate(tenth, 91, 100) == pytest.approx(0.1 + 0.9 * (1 - 0.1**0.5))


def test_constant_and_a_run_without_warm_up():
    assert [learning_rate(config(schedule="constant"), s, 10) for s in (0, 3, 4, 99)] == [0.25, 1, 1, 1]
    assert learning_rate(config(warmup_steps=0), 0, 10) == 1.0


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_where_its_name_says(name, kind):
    model = ZeroModel(ModelConfig(**SIZES, **MODELS[name]))
    groups = parameter_groups(model, OptimizerConfig(kind=kind, weight_decay=0.2, muon_lr=0.5))
    names = {id(p): n for n, p in model.named_parameters()}
    found = {g["name"]: {names[id(p)] for p in g["params"]} for g in groups}
    rules = {"no_decay": NOT_DECAYED, "decay": DECAYED_BY_ADAMW, "muon": BY_MUON}
    expected = {key: {n for n in names.values() if rule.search(n)} for key, rule in rules.items()}
    assert sum(map(len, expected.values())) == len(names)  # each name fits one rule
    if kind == "adamw":
        expected["decay"] |= expected.pop("muon")
    assert found == expected
    assert sum(len(g["params"]) for g in groups) == len(names)
    assert {g["name"]: g["weight_decay"] for g in groups} == {k: 0.2 * (k != "no_decay") for k in expected}
    if kind == "muon":
        assert {n for n, p in model.named_parameters() if p.use_muon} == expected["muon"]
        assert {g["name"]: g["lr"] for g in groups} == {"muon": 0.5, "decay": 1e-3, "no_decay": 1e-3}


def test_fused_adamw_takes_over_a_checkpoint_of_the_plain_one_and_back():
    """Fused on a GPU, plain on a CPU, whichever wrote the checkpoint; the same steps to rounding."""

    def trained(kinds: list[str]) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (7, 1000)]
        optimizer = torch.optim.AdamW(weights, lr=0.01, weight_decay=0.1)
        for kind in kinds:
            saved, optimizer = optimizer.state_dict(), torch.optim.AdamW(weights, lr=0.01)
            optimizer.load_state_dict(saved)
            choose_adamw_kernel(optimizer, kind)
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step()
            assert [group["fused"] for group in optimizer.param_groups] == [True if kind == "cuda" else None]
        return weights

    plain = trained(["cpu"] * 6)
    for kinds in (["cuda"] * 6, ["cpu", "cuda", "cuda", "cpu", "cpu", "cuda"]):
        for found, expected in zip(trained(kinds), plain, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_counts_of_steps_lie_where_the_kernel_reads_them():
    weight = torch.nn.Parameter(torch.zeros(3, device="meta"))
    optimizer = torch.optim.AdamW([weight])
    optimizer.state[weight]["step"] = torch.ones(())
    choose_adamw_kernel(optimizer, "cuda")
    assert optimizer.state[weight]["step"].device.type == "meta"
    optimizer.state[weight]["step"] = torch.ones(())
    choose_adamw_kernel(optimizer, "cpu")
    assert optimizer.state[weight]["step"].device.type == "cpu"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kind=sgd", "optimizer.kind='sgd' is unknown; choose one of adamw, muon"),
        ("lr=0", "optimizer.lr=0 must be above 0"),
        ("min_lr=1", "optimizer.min_lr=1.0 must be at most lr=0.003"),
        ("ema_decay=1", "optimizer.ema_decay=1 must be above 0 and below 1"),
        ("beta2=1", "optimizer.beta2=1 must be at least 0 and below 1"),
        ("wsd_decay_steps=0", "optimizer.wsd_decay_steps=0 must be at least 1"),
        ("kind=muon", "optimizer.clip=1.0 would scale Muon's update, not its gradient; set optimizer.clip=0"),
    ],
)
def test_wrong_values(override, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_run_config(DEMO, [f"optimizer.{override}"])
    assert "\n" not in str(caught.value)


def test_a_decay_that_does_not_fit():
    wsd = ["optimizer.schedule=wsd", "max_steps=100"]
    load_run_config(DEMO, [*wsd, "optimizer.wsd_decay_steps=60"])
    with pytest.raises(ValueError, match="warmup_steps=40 and wsd_decay_steps=61 do not fit into the 100"):
        load_run_config(DEMO, [*wsd, "optimizer.wsd_decay_steps=61"])
    with pytest.raises(ValueError, match="warmup_steps=95 and wsd_decay_steps=10 do not fit"):
        load_run_config(DEMO, [*wsd, "optimizer.warmup_steps=95"])


def test_what_the_optimizer_requires_of_zero(tmp_path):
    path = tmp_path / "ds.json"

    def resolved(zero: dict, *overrides: str, **rest: dict) -> dict:
        path.write_text(json.dumps({"zero_optimization": zero, **rest}))
        return load_ds_config(str(path), load_run_config(DEMO, list(overrides)), 4, 1)

    muon = ("optimizer.kind=muon", "optimizer.clip=0")
    assert resolved({"stage": 3}, *muon)["zero_optimization"] == {"stage": 3, "reduce_scatter": False}
    assert resolved({"stage": 3})["zero_optimization"] == {"stage": 3}
    with pytest.raises(ValueError, match=r"reduce_scatter=true does not go with optimizer.kind=muon"):
        resolved({"stage": 3, "reduce_scatter": True}, *muon)
    with pytest.raises(ValueError, match=r"zero_optimization.stage=0 is not supported"):
        resolved({"stage": 0}, "optimizer.ema_decay=0.9")
    for stage in (1, 2, 3):
        assert resolved({"stage": stage}, bf16={"enabled": True})["data_types"] == {
            "grad_accum_dtype": "fp32"
        }


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_muon_and_average_equal_a_plain_loop(launch, ranks, tmp_path):
    """3 steps of every ZeRO stage, with experts as batches of matrices, against Muon written in the test."""
    output = launch(ranks, WORKER, "ds_configs", tmp_path).stdout
    reports = [json.loads(line[7:]) for line in output.splitlines() if line.startswith("REPORT ")]
    assert [r["case"].split(",")[0] for r in reports] == ["ZeRO-3", "ZeRO-3", "ZeRO-1", "ZeRO-2"]
    for report in reports:
        assert report["moved"] > 0.01, report
        if report["iterated_in"] == "torch.float32":
            assert report["muon"] < 2e-6, report
            assert report["adamw"] < 1e-5, report
            assert report["average"] < 2e-6, report
        assert report["muon_relative"] < 0.1, report  # in bf16 the iteration magnifies rounding
        assert report["average_lags"] > 0.01, report
        assert report["resumed_alike"], report
        assert report["average_taken"], report
        calls, banks = report["calls"], 6 * report["ep_size"]
        assert report["hidden"] == [30, 6], report
        assert calls[1] == 3 * banks, report  # every rank its own experts
        if "ZeRO-3" in report["case"]:  # each matrix on one rank
            assert calls[0] == 3 * (24 + banks), report
        else:  # a matrix that two ranks share is orthogonalised on both
            assert 3 * (24 + banks) <= calls[0] <= 3 * (24 + banks + ranks - 1), report


@pytest.fixture(scope="module")
def runs(train, tmp_path_factory) -> tuple[Path, Path]:
    """Four uninterrupted steps with Muon and an average, and the same resumed after the second."""
    folder = tmp_path_factory.mktemp("runs")
    whole, parts = folder / "whole", folder / "parts"
    options = ["max_steps=4", "save_every=2", "eval_every=0", "optimizer.kind=muon", "optimizer.clip=0"]
    train(whole, *options, "optimizer.ema_decay=0.5")
    shutil.copytree(whole / "checkpoints/step-2", parts / "checkpoints/step-2")
    resumed = train(parts, *options, "optimizer.ema_decay=0.5")
    assert f"resuming from {parts}/checkpoints/step-2" in resumed.stdout
    return whole, parts


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_exactly(runs):
    for name in ("export", "export_ema"):
        whole, parts = (load_file(run / name / "model.safetensors") for run in runs)
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[n], parts[n]) for n in whole), name
    records = [[json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    for key in ("loss", "grad_norm", "lr"):
        assert [r[key] for r in records[0]][2:] == [r[key] for r in records[1]], key


def test_offline_export_equals_the_runs_own(runs, tmp_path):
    export_run(runs[0], 4, tmp_path / "export")
    for name in ("export", "export_ema"):
        ours, theirs = (load_file(folder / name / "model.safetensors") for folder in (tmp_path, runs[0]))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) for n in theirs), name


def older(checkpoint: Path) -> None:
    """Rewrites a checkpoint with Muon's momentum as older versions stored it."""
    for path in checkpoint.glob("*_optim_states.pt"):
        contents = torch.load(path, weights_only=False)
        for state in optimizer_states(contents["optimizer_state_dict"]).values():
            if state["exp_avg_sq"].stride() == (0,) and len(state["exp_avg_sq"]) > 1:
                momentum = state["exp_avg"]
                state.clear()
                state["momentum_buffer"] = momentum
        torch.save(contents, path)
    seal(checkpoint)


@pytest.mark.slow
def test_a_momentum_of_an_older_version_resumes_in_its_layout_alone(train, runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0] / "checkpoints/step-2", run / "checkpoints/step-2")
    older(run / "checkpoints/step-2")
    options = ["max_steps=4", "save_every=2", "eval_every=0", "optimizer.kind=muon", "optimizer.clip=0"]
    options.append("optimizer.ema_decay=0.5")
    refused = train(run, *options, "ep_size=1", check=False).stderr
    assert "error: checkpoint " in refused
    assert "of an older version stores Muon's momentum for one layout; resume" in refused
    assert "Traceback" not in refused
    train(run, *options)
    ours, theirs = (load_file(folder / "export/model.safetensors") for folder in (run, runs[0]))
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_the_average_of_a_run_averages_its_weights(train, tmp_path):
    """ZeRO-3 with expert parallelism and AdamW: from the checkpoints of every step, offline."""
    run = tmp_path / "run"
    switches = ("max_steps=3", "save_every=1", "keep_last=3", "eval_every=0")
    train(run, *switches, "optimizer.ema_decay=0.75", "optimizer.lr=0.01")
    config = ModelConfig.from_dict(json.loads((run / "export/config.json").read_text()))
    expected = {n: p.detach().clone() for n, p in ZeroModel(config, seed=0).named_parameters()}
    for step in (1, 2, 3):
        export_run(run, step, tmp_path / f"step-{step}")
        weights = load_file(tmp_path / f"step-{step}" / "model.safetensors")
        for name, value in expected.items():
            value.mul_(0.75).add_(weights[name], alpha=0.25)
        offline = load_file(tmp_path / f"step-{step}_ema" / "model.safetensors")
        assert offline.keys() == weights.keys()
        assert max((offline[n] - v).abs().max().item() for n, v in expected.items()) < 1e-6
    live = load_file(run / "export_ema/model.safetensors")
    assert live.keys() == offline.keys()
    assert all(torch.equal(live[n], offline[n]) for n in live)
    assert max((live[n] - weights[n]).abs().max().item() for n in expected) > 5e-3
    assert os.path.getsize(run / "export_ema/tokenizer.model") > 0
