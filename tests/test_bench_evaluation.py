"""bench/evaluation.py as a user runs it, at sizes that say nothing about speed; it must see differences."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
BENCH = Path(__file__).parents[1] / "bench"
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "moe_intermediate_size": 64}
installed = find_spec("lm_eval") is not None and find_spec("accelerate") is not None


def run(data: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "evaluation.py"), "--data", str(data), *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(not installed, reason="lm-eval and accelerate are not installed")
def test_the_command_prints_the_table(data_root, tmp_path):
    out = tmp_path / "new" / "evaluation.json"
    done = run(data_root, "--limit", 1, "--runs", 2, "--sizes", json.dumps(SIZES), "--out", out)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["machine"]["lm_eval"] == "0.4.13"
    names = ["arc_challenge", "logiqa", "gsm8k_cot", "gsm8k_cot_ending"]
    assert [line["task"] for line in report["results"]] == names
    table = done.stdout.splitlines()
    for line in report["results"]:
        assert line["documents"] == 1
        assert len(line["ours"]) == len(line["theirs"]) == 2
        assert line["differences"] == []
        assert line["met"] == (line["ratio"] >= line["target"])
        (shown,) = [row for row in table if row.startswith(line["task"] + "  ")]
        assert f"  {line['ratio']:.1f}  " in shown
        assert ("  met  " if line["met"] else "  MISSED  ") in shown
        assert "the same" in shown


@pytest.fixture
def bench(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("evaluation")


def test_differences_are_found(bench):
    def result(resps: list[Any], correct: list[float]) -> Any:
        samples = [{"resps": resp} for resp in resps]
        return bench.TaskResult("t", {"acc,none": correct}, len(resps), {}, samples)

    same = result([[-1.0, -2.0], "a"], [1.0, 0.0])
    assert bench.differences(same, result([[-1.0005, -2.0], "a"], [1.0, 0.0])) == []
    assert len(bench.differences(same, result([[-1.002, -2.0], "a"], [1.0, 0.0]))) == 1
    assert len(bench.differences(same, result([[-1.0, -2.0], "b"], [1.0, 0.0]))) == 1
    assert len(bench.differences(same, result([[-1.0, -2.0], "a"], [0.0, 0.0]))) == 1


def test_a_slow_or_different_evaluation_misses_its_target(bench):
    line = bench.Line("t", 1, [0.5, 9.0, 1.0], [4.0, 3.0, 2.9], 3.0, {}, [], "")
    assert line.ratio == pytest.approx(3.0)
    assert line.met
    assert not dataclasses.replace(line, target=3.1).met
    assert not dataclasses.replace(line, differences=["document 0"]).met


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "arc"], "--tasks=arc is unknown; choose from arc_challenge,logiqa,gsm8k_cot"),
        (["--tasks", "logiqa"], "no data file"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, flags, message):
    done = run(tmp_path, *flags)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(installed, reason="for where lm-eval is missing")
def test_without_lm_eval_it_says_what_to_install(data_root):
    done = run(data_root, "--tasks", "logiqa", "--limit", 1, "--runs", 1, "--sizes", json.dumps(SIZES))
    assert done.returncode == 0, done.stderr
    assert "is not installed: pip install -e '.[lmeval]'" in done.stdout.splitlines()[-1]
