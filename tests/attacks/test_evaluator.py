"""Attacks on the process that scores checkpoints during training, and on what it leaves."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from pretrain.config import EvaluationConfig
from pretrain.evaluation import Evaluator

from ..conftest import ROOT
from ..pretrain.test_evaluation import copy, evaluators, stop_when_seen
from .mutations import byte_mutations

CONFIG = EvaluationConfig(every_steps=2, tasks="causal_loop", limit=1)
REPORT = {
    "results": {
        "babi": {"alias": "babi", "exact_match,none": 0.25, "exact_match_stderr,none": 0.04},
        "babi_1": {"alias": "babi_1", "exact_match,none": 0, "exact_match_stderr,none": "N/A"},
    },
    "group_subtasks": {"babi": ["babi_1"], "babi_1": []},
}


def collected(run: Path, data: bytes) -> list[dict[str, Any]]:
    """What a resumed run records of these results of step 4."""
    folder = run / "eval/step-4"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results_2026.json").write_bytes(data)
    (run / "checkpoints/step-4").mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    Evaluator(CONFIG, run, records.append).resume(4)
    return records


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_damaged_results_are_one_line(count, tmp_path):
    """Never an exception, and never a number that JSON cannot hold."""
    whole = json.dumps(REPORT).encode()
    assert collected(tmp_path, whole) == [
        {"step": 4, "eval": {"babi": {"exact_match,none": 0.25, "exact_match_stderr,none": 0.04}}}
    ]
    failed = 0
    for what, damaged in byte_mutations(whole, count, seed=0):
        (record,) = collected(tmp_path, damaged)
        line = json.dumps(record, allow_nan=False)
        assert "\n" not in record.get("eval_failed", ""), what
        failed += "eval_failed" in line
    assert failed > count / 2


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        '{"results": []}',
        '{"results": {"a": 3}, "group_subtasks": {}}',
        '{"results": {}, "group_subtasks": {"a": 3}}',
        '{"results": {"a": {"acc,none": NaN}}, "group_subtasks": {}}',
        '{"results": {"a": {"acc,none": true}}, "group_subtasks": {}}',
        '{"results": {"a": {"acc,none": [1]}}, "group_subtasks": {}}',
        "[" * 100_000,
    ],
    ids=lambda text: text[:30],
)
def test_results_of_wrong_types_are_one_line(text, tmp_path):
    ((record),) = collected(tmp_path, text.encode())
    assert record["eval_failed"].startswith("its results cannot be read: ")


def test_scores_are_recorded_once(tmp_path):
    """Also if the run was killed between their arrival and the line in metrics.jsonl."""
    data = json.dumps(REPORT).encode()
    (record,) = collected(tmp_path, data)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert collected(tmp_path, data) == []


@pytest.mark.parametrize("attack", ["kill", "disk"])
def test_a_failing_process_is_one_line_and_leaves_nothing(attack, six_steps, tmp_path):
    run, records = copy(six_steps, tmp_path), list[dict[str, Any]]()
    evaluator = Evaluator(CONFIG, run, records.append)
    evaluator.request(4)
    evaluator.poll(checkpoint_written=True)
    pid = stop_when_seen(run, "pretrain/evaluate_checkpoint.py")
    if attack == "kill":
        os.kill(pid, signal.SIGKILL)
    else:
        psutil.Process(pid).rlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        os.kill(pid, signal.SIGCONT)
    evaluator.finish(lambda: None)
    (record,) = records
    assert record["step"] == 4
    expected = "signal SIGKILL: " if attack == "kill" else "exit code 2: error: "
    assert record["eval_failed"].startswith(expected), record
    assert "\n" not in record["eval_failed"]
    assert not (run / "eval/step-4/work").exists()
    assert not list((run / "eval/step-4").glob("results_*"))
    assert not evaluators(run, "pretrain/evaluate_checkpoint.py")


def test_a_process_whose_trainer_was_killed_first_does_nothing(six_steps, tmp_path):
    command = ["pretrain/evaluate_checkpoint.py", "--run", six_steps, "--step", "4", "--folder", tmp_path]
    done = subprocess.run(
        [sys.executable, *map(str, command), "--trainer", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode
    assert done.stderr == "error: the run that asked for this evaluation has ended\n"
    assert not list(tmp_path.iterdir())
