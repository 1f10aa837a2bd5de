"""The benchmarks: at sizes that say nothing about speed, but through every path a CPU can take."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model import ModelConfig
from model.counts import flops_per_token

pytest.importorskip("transformers")
BENCH = Path(__file__).parents[1] / "bench"
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 256,
    "moe_intermediate_size": 64,
    "intermediate_size": 128,
}


@pytest.fixture
def measuring(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("measuring")


@pytest.fixture
def compare(measuring) -> Any:
    return importlib.import_module("compare")


def run(script: str, *flags: str) -> tuple[subprocess.CompletedProcess[str], float]:
    command = [sys.executable, str(BENCH / script), *flags, "--sizes", json.dumps(SIZES)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done, time.perf_counter() - start


def test_the_command_prints_the_table(tmp_path):
    out = tmp_path / "new" / "bench.json"
    flags = ["--threads", "1", "--runs", "1", "--batch", "3", "--length", "48", "--new_tokens", "5"]
    done, wall = run("compare.py", *flags, "--dtypes", "fp32", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "the same network: in fp32 the logits differ by" in done.stdout
    report = json.loads(out.read_text())
    assert report["machine"]["torch"] == torch.__version__
    assert report["machine"]["threads"] == 1
    assert report["arguments"]["length"] == 48
    results = {r["task"]: r for r in report["results"]}
    tokens = {"memory": 0, "train": 3 * 48, "prefill": 3 * 48, "decode": 3 * 4}
    assert {task: r["tokens"] for task, r in results.items()} == tokens
    counted = 0.0
    for task, result in results.items():
        measured = result["measured"]
        assert {name: len(runs) for name, runs in measured.items()} == {"ours": 1, "transformers": 1}
        assert all(value > 0 for runs in measured.values() for value in runs)
        (ours,), (theirs,) = measured["ours"], measured["transformers"]
        if task == "memory":
            assert result["ratio"] == pytest.approx(ours / theirs)
            assert ours > 2**20  # gradients alone need more
        else:
            counted += ours + theirs
            assert result["ratio"] == pytest.approx(theirs / ours)
        line = next(x for x in done.stdout.splitlines() if x.startswith("fp32") and f" {task}, " in x)
        assert f" {result['ratio']:.2f}" in line
        assert line.endswith({True: "met", False: "MISSED", None: f"{result['ratio']:.2f}"}[result["met"]])
        missed = result["met"] is False
        assert missed == (result["profiles"] is not None) == (f"\n{task} in fp32, one run" in done.stdout)
        if missed:
            for operations in result["profiles"].values():
                assert operations[0]["own"] >= operations[-1]["own"]
                assert "aten::mm" in [operation["operation"] for operation in operations]
    assert counted < wall


def test_backends_that_do_not_run_show_their_version_and_error(tmp_path, measuring, monkeypatch, capsys):
    out = tmp_path / "gpu.json"
    flags = ["--device", "cpu", "--runs", "1", "--batch", "2", "--length", "16", "--peak_tflops", "0.5"]
    flags += ["--attention", "flash_attn", "--experts", "loop", "--sizes", json.dumps(SIZES)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags, "--out", str(out)])
    importlib.import_module("gpu").main()
    printed = capsys.readouterr().out
    flash, loop = json.loads(out.read_text())["results"]
    config = ModelConfig.from_dict({**json.loads(out.read_text())["machine"]["sizes"]})
    forward_and_backward = 3 * flops_per_token(config, 16) * 2 * 16
    expected = forward_and_backward / loop["seconds"][0] / 0.5e12
    assert loop["mfu"] == pytest.approx(expected)
    assert f"{expected:.1%}" in printed
    assert flash["mfu"] is None
    assert "seconds" not in flash
    assert "flash-attn 2.8.3" in flash["versions"]
    line = next(x for x in printed.splitlines() if x.startswith("flash_attn"))
    assert "flash_attn needs a GPU" in line


def test_the_model_is_timed_on_the_documents_that_training_hands_it(measuring, monkeypatch):
    gpu, given = importlib.import_module("gpu"), list[dict[str, Any]]()

    def forward(model: nn.Module, arguments: Any, more: dict[str, Any]) -> None:
        given.append(more)

    def built(*arguments: Any) -> nn.Module:
        model = measuring.our_model(*arguments)
        model.register_forward_pre_hook(forward, with_kwargs=True)
        return model

    monkeypatch.setattr(gpu, "our_model", built)
    gpu.measure(ModelConfig.from_dict(SIZES), "auto", "auto", "cpu", 2, 16, 1)
    assert len(given) == 3  # a warm-up, a counted run, the one whose memory is measured
    for inputs in given:
        starts = inputs["cu_seqlens"]
        assert starts.shape[0] == 2
        assert inputs["documents"].boundaries.tolist() == sorted(
            {*(starts + 16 * torch.arange(2)[:, None]).flatten().tolist()}
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("compare", ["--device", "cuda"], "needs a GPU"),
        ("compare", ["--dtypes", "fp32,fp8"], "--dtypes=fp8 is unknown"),
        ("compare", ["--tasks", "train,"], "--tasks= is unknown"),
        ("compare", ["--runs", "0"], "--runs=0 must be at least 1"),
        ("compare", ["--new_tokens", "1"], "--new_tokens=1 must be at least 2"),
        ("compare", ["--length", "2047"], "exceed max_position_embeddings=2048"),
        ("compare", ["--sizes", '{"hidden": 8}'], "model.hidden is not a known key"),
        ("gpu", [], "needs a GPU"),
        ("gpu", ["--device", "cpu", "--attention", "none"], "--attention=none is unknown"),
        ("gpu", ["--device", "cpu", "--batch", "0"], "--batch=0 must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(script, flags, message, measuring, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(script).main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("text", ["{", "3", "[]"])
def test_sizes_must_be_an_object(text, compare, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare.py", "--sizes", text])
    with pytest.raises(SystemExit) as stopped:
        compare.main()
    assert stopped.value.code == 2
    assert "error: argument --sizes: " in capsys.readouterr().err


def test_another_network_is_refused(compare, monkeypatch):
    config, build = ModelConfig.from_dict(SIZES), compare.build

    def changed(name: str, *rest: Any) -> nn.Module:
        model = build(name, *rest)
        if name == "ours":
            with torch.no_grad():
                model.model.layers[1].mlp.experts.w2 *= 1.01
        return model

    compare._check_same_network(config)
    monkeypatch.setattr(compare, "build", changed)
    with pytest.raises(ValueError, match="the two models' logits differ by"):
        compare._check_same_network(config)


def test_both_train_on_the_same_loss(compare, measuring):
    """Except for the balance loss, which transformers lacks."""
    config = ModelConfig.from_dict({**SIZES, "balance_loss_weight": 0.0})
    losses = []
    for name in ("ours", "transformers"):
        model = compare.build(name, config, "cpu", "fp32")
        model.register_forward_hook(lambda module, inputs, output: losses.append(output.loss.item()))
        measuring.train_step(model, measuring.random_tokens(config, 3, 17, "cpu"))
        assert all(p.grad is None for p in model.parameters())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_runs_take_turns_after_a_warm_up(measuring):
    order = []

    def function(name: str) -> Any:
        def one() -> dict[str, float]:
            order.append(name)
            return {"x": float(len(order)), "y": 0.5}

        return one

    seconds = measuring.interleaved(2, "test", {"a": function("a"), "b": function("b")})
    assert order == ["a", "b"] * 3
    assert seconds == {"x": {"a": [3.0, 5.0], "b": [4.0, 6.0]}, "y": {"a": [0.5, 0.5], "b": [0.5, 0.5]}}


class Greedy(nn.Module):
    """Holds a known number of bytes for a moment."""

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        self.megabytes, self.weight = megabytes, nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor, labels: Tensor, use_cache: bool) -> SimpleNamespace:
        torch.ones(self.megabytes * 2**18)
        return SimpleNamespace(loss=self.weight.sum())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_freed_memory_counts(measuring):
    torch.ones(400 * 2**18)  # an earlier, higher peak must not count
    for megabytes in (100, 200):
        grown = measuring.memory_growth(Greedy(megabytes), torch.zeros(1, 2, dtype=torch.int64)) / 2**20
        assert megabytes - 2 < grown < megabytes + 30  # the kernel counts pages in batches


def test_verdicts(compare):
    def met(task: str, ours: float, theirs: float) -> bool | None:
        measured = {"ours": [ours], "transformers": [theirs]}
        return compare.Result(task, "fp32", 8, 100, measured).met

    assert met("train", 1.0, 1.31) is True  # seconds
    assert met("train", 1.0, 1.29) is False
    assert met("decode", 1.0, 2.9) is False
    assert met("memory", 59.0, 100.0) is True  # bytes
    assert met("memory", 61.0, 100.0) is False
    assert met("prefill", 1.0, 2.0) is None


@pytest.mark.parametrize(("one_row", "rows"), [(1.0, 8), (5.0, 4), (20.0, 1), (100.0, 1)])
def test_slow_steps_are_timed_on_fewer_rows(one_row, rows, compare, monkeypatch):
    monkeypatch.setattr(compare, "train_step", lambda model, tokens: {"train": one_row * len(tokens)})
    assert compare._affordable_rows(nn.Identity(), torch.zeros(8, 4)) == rows
