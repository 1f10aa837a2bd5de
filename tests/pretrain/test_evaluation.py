"""Task scores during training: correct ones, from a process that training never waits for."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain import checkpoint
from pretrain.config import EvaluationConfig
from pretrain.evaluate_checkpoint import main
from pretrain.evaluation import Evaluator
from pretrain.export import export_run
from pretrain.run_config import load_run_config
from pretrain.saver import rotate

from ..conftest import ROOT
from .conftest import finish

DEADLINE = 120.0  # seconds, for what takes about ten
SHORT = ["evaluation.tasks=causal_loop", "evaluation.limit=1"]


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, what
        threading.Event().wait(0.02)  # leave the core to the awaited process


def evaluators(run: Path, script: str) -> list[int]:
    """Live processes that run this script and name this run in their command."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_text().split("\0")
            alive = path.with_name("stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:  # it has ended in the meantime
            continue
        if (
            alive
            and any(part.endswith(script) for part in command)
            and any(str(run) in part for part in command)
        ):
            found.append(int(path.parent.name))
    return found


def stop_when_seen(run: Path, script: str) -> int:
    """Stops the process for good, like one that waits for a dead disk."""
    until(lambda: bool(evaluators(run, script)), f"{script} was never started")
    (pid,) = evaluators(run, script)
    os.kill(pid, signal.SIGSTOP)
    return pid


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_scores_during_a_run_equal_the_checkpoints_and_cost_no_step(train, tmp_path, monkeypatch):
    """Evaluations of steps 4 and 6 find step 2's running; its checkpoint stays although keep_last is 1."""
    run = tmp_path / "run"
    options = ["max_steps=6", "save_every=2", "keep_last=1", "eval_every=0", "ep_size=1"]
    done = train(run, *options, *SHORT, "evaluation.every_steps=2", ranks=1)
    records = lines(run)
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert (run / "DONE").is_file()
    others = [r for r in records if "loss" not in r]
    assert [(r["step"], r["eval_failed"]) for r in others[:2]] == [
        (step, "skipped, the evaluation of step 2 is still running") for step in (4, 6)
    ]
    (scored,) = others[2:]
    assert (scored["step"], scored["tokens"]) == (2, 2 * 8 * 64)
    assert done.stdout.count("evaluation of step 2: causal_loop ") == 1
    assert re.search(r"waiting for the scores of step 2, at most 1\d{3} s more", done.stdout)
    assert not (run / "eval/step-2/work").exists()
    export_run(run, 2, tmp_path / "export")
    command = ["run.py", "--checkpoint", tmp_path / "export", "--tasks", "causal_loop", "--limit", 1]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--output_path", str(tmp_path / "scores")])
    runpy.run_path(str(ROOT / "eval/run.py"), run_name="__main__")
    (path,) = (tmp_path / "scores").glob("results_*.json")
    expected = json.loads(path.read_text())["results"]
    assert set(scored["eval"]) == {"causal_loop"}  # its levels are in the results file
    assert (run / "eval/step-2").joinpath("log.txt").is_file()
    for task, values in scored["eval"].items():
        assert values == {k: v for k, v in expected[task].items() if k in values}
        assert "exact_match,trace" in values


def test_a_hanging_evaluation_is_killed_and_two_ranks_finish(begin, training, tmp_path):
    run = tmp_path / "run"
    options = ["max_steps=3", "save_every=2", "eval_every=0", *SHORT, "evaluation.every_steps=2"]
    process = begin(2, *training(run, *options, "evaluation.timeout_seconds=5"))
    stop_when_seen(run, "pretrain/evaluate_checkpoint.py")
    done = finish(process)
    assert (run / "DONE").is_file()
    assert [r["step"] for r in lines(run) if "loss" in r] == [1, 2, 3]
    (failed,) = [r for r in lines(run) if "loss" not in r]
    expected = "killed after evaluation.timeout_seconds=5; raise it or lower evaluation.limit"
    assert failed == {"step": 2, "eval_failed": expected, "tokens": 2 * 8 * 64}
    assert f"evaluation of step 2: eval_failed, {expected}" in done.stdout
    assert not evaluators(run, "pretrain/evaluate_checkpoint.py")
    assert not (run / "eval/step-2/work").exists()


def test_training_never_waits_for_a_hanging_process(six_steps, tmp_path):
    run, records = copy(six_steps, tmp_path), []
    evaluator = Evaluator(EvaluationConfig(every_steps=2), run, records.append)
    evaluator.request(2)
    evaluator.poll(checkpoint_written=False)
    assert evaluator.process is None
    evaluator.poll(checkpoint_written=True)
    stop_when_seen(run, "pretrain/evaluate_checkpoint.py")
    evaluator.poll(checkpoint_written=True)
    assert records == []
    evaluator.deadline = time.monotonic()  # time is up
    evaluator.poll(checkpoint_written=True)
    assert [r["eval_failed"].split(";")[0] for r in records] == [
        "killed after evaluation.timeout_seconds=1800"
    ]
    evaluator.finish(lambda: None)
    assert not evaluators(run, "pretrain/evaluate_checkpoint.py")
    assert (evaluator.step, evaluator.process, len(records)) == (None, None, 1)


def test_a_killed_trainer_leaves_no_process_and_its_successor_requests_again(six_steps, tmp_path):
    """Stopped after it became eval/run.py: what ends it with its trainer must survive execv."""
    run = copy(six_steps, tmp_path)
    trainer = (
        "from pathlib import Path; from pretrain.evaluation import *\n"
        f"e = Evaluator(EvaluationConfig(every_steps=2, tasks='causal_loop'), Path({str(run)!r}), print)\n"
        "e.request(4); e.finish(lambda: None)"
    )
    process = subprocess.Popen([sys.executable, "-c", trainer], cwd=ROOT, stdout=subprocess.PIPE)
    stop_when_seen(run, "eval/run.py")
    process.kill()
    process.communicate()
    until(lambda: not evaluators(run, "eval/run.py"), "the process outlived its trainer")
    records: list[dict] = []
    successor = Evaluator(EvaluationConfig(every_steps=2, tasks="causal_lop"), run, records.append)
    successor.resume(3)
    assert successor.step is None
    successor.resume(4)
    successor.finish(lambda: None)
    assert [r["step"] for r in records] == [4]
    message = "exit code 2: error: there is no task 'causal_lop': did you mean 'causal_loop'?"
    assert records[0]["eval_failed"].startswith(message)


def test_what_cannot_be_started_or_read_does_not_raise(six_steps, tmp_path):
    run, records = copy(six_steps, tmp_path), []
    evaluator = Evaluator(EvaluationConfig(every_steps=2), run, records.append)
    (run / "eval").write_text("a file where a folder must be")
    evaluator.request(2)
    evaluator.finish(lambda: None)
    assert records[0]["eval_failed"].startswith("it could not be started: ")
    (run / "eval").unlink()
    evaluator.request(6)
    evaluator.poll(checkpoint_written=True)
    evaluator.finish(lambda: "SIGTERM")
    assert records[1] == {
        "step": 6,
        "eval_failed": "ended with the run (SIGTERM); the same command evaluates it again",
    }
    assert all("\n" not in r["eval_failed"] for r in records)


def test_the_process_inherits_no_rank_and_sees_no_gpu_unless_asked(monkeypatch, tmp_path):
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    for name in launched:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for device, visible in (("cpu", ""), ("cuda", "3")):
        given = Evaluator(EvaluationConfig(device=device), tmp_path, print)._environment()
        assert not set(launched) & set(given)
        assert (given["CUDA_VISIBLE_DEVICES"], given["OMP_NUM_THREADS"]) == (visible, "1")
        assert given["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.every_steps=150", "evaluation.every_steps=150 is not a multiple of save_every=100"),
        ("evaluation.every_steps=-1", "evaluation.every_steps=-1 must be at least 0"),
        ("evaluation.limit=0", "evaluation.limit=0 must be at least 1"),
        ("evaluation.timeout_seconds=0", "evaluation.timeout_seconds=0 must be above 0"),
        ("evaluation.device=gpu", "evaluation.device='gpu' must be cpu or cuda"),
        ("evaluation.task=arc", "evaluation.task is not a known key; did you mean 'tasks'"),
    ],
)
def test_wrong_values(tmp_path, override, message):
    path = tmp_path / "run.yaml"
    path.write_text("save_every: 100\ndata: {path: somewhere}\n")
    with pytest.raises(ValueError, match=message):
        load_run_config(str(path), [override])


def test_a_checkpoint_in_use_outlives_the_rotation(tmp_path):
    for step in (2, 4, 6):
        folder = tmp_path / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        checkpoint.seal(folder, {})
    rotate(tmp_path, step=6, keep_last=1, keep_every=0, in_use=2)
    assert checkpoint.steps(tmp_path) == [6, 2]
    rotate(tmp_path, step=6, keep_last=1, keep_every=0)
    assert checkpoint.steps(tmp_path) == [6]


def test_a_missing_checkpoint_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "nice", lambda increment: 0)  # would affect the test process
    monkeypatch.setattr("ctypes.CDLL", lambda name: type("libc", (), {"prctl": lambda *_: 0})())
    folders = ["--run", str(tmp_path), "--step", "2", "--folder", str(tmp_path / "eval")]
    folders += ["--trainer", str(os.getppid())]
    monkeypatch.setattr(sys, "argv", ["evaluate_checkpoint.py", *folders])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} has no checkpoint of step 2; it has none")


def copy(run: Path, folder: Path) -> Path:
    """A writable copy of a run; its checkpoints are linked."""
    shutil.copytree(run, folder / "run", copy_function=os.link)
    return folder / "run"
