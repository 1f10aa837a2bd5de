"""eval/reasoning.py and eval/thoughts.py killed and started again, and in two processes: nothing differs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.tokenization.tokenizer import Tokenizer, train_tokenizer
from eval.scoring.inference import Engine
from model import ModelConfig, ZeroModel

from .conftest import EVAL
from .thinkers import SMALL, write_random_model

COMMANDS = {
    "reasoning.py": "--task p_hop --num_samples 24 --task_options hops=2,length=16 --batch_size 2",
    "thoughts.py": "--task causal_loop_v2 --num_samples 16 --batch_size 2 --max_new_tokens 30 --samples 2"
    " --task_options max_depth=3,variables=3,statements=4",
}
KILLED_AT = 8  # lines of the journal


@pytest.fixture
def export(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """What the script evaluates: a loop that halts, or a model that writes chains of thought."""
    folder = tmp_path / "export"
    if request.param == "thoughts.py":
        return write_random_model(folder, "teacher")
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(train_tokenizer(["abcd"] * 20, vocab_size=280, model_type="bpe"))
    recurrence = {"placement": "block", "ranges": [[1, 1]], "num_steps": 3, "halting": {"kind": "act"}}
    vocab_size = Tokenizer(folder / "tokenizer.model").vocab_size
    config = ModelConfig.from_dict({**SMALL, "vocab_size": vocab_size, "recurrence": recurrence})
    ZeroModel(config, seed=3).save_pretrained(folder)
    return folder


def without_clocks(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    clocks = ("seconds", "latency", "time", "written")
    return {k: without_clocks(v) for k, v in value.items() if not any(clock in k for clock in clocks)}


def written(folder: Path) -> tuple[dict, list[str]]:
    (results,), (samples,) = folder.glob("results_*.json"), folder.glob("samples_*.jsonl")
    report = without_clocks(json.loads(results.read_text()))
    report["config"].pop("output_path")
    return report, samples.read_text().splitlines()


each_script = pytest.mark.parametrize(
    ("script", "export"), [(script, script) for script in COMMANDS], indirect=["export"], ids=list(COMMANDS)
)


@each_script
def test_a_killed_evaluation_resumes_bit_exactly(script, export, tmp_path, monkeypatch, run_script, capsys):
    jobs = []
    run = Engine.run
    monkeypatch.setattr(Engine, "run", lambda engine, job: jobs.append(job) or run(engine, job))
    flags = ["--checkpoint", str(export), *COMMANDS[script].split(), "--log_samples", "--output_path"]
    run_script(script, *flags, tmp_path / "whole")
    num_jobs, folder = len(jobs), tmp_path / "killed"

    environment = {**os.environ, "PYTHONPATH": str(EVAL.parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, EVAL / script, *flags, folder], env=environment)
    deadline = time.monotonic() + 300
    while sum(path.read_bytes().count(b"\n") for path in folder.glob("unfinished_*")) < KILLED_AT:
        assert process.poll() is None
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.wait()
    (journal,) = folder.glob("unfinished_*.jsonl")
    num_done = journal.read_bytes().count(b"\n") - 1
    assert KILLED_AT <= num_done + 1 < num_jobs
    with journal.open("ab") as file:
        file.write(b'{"torn":[[')  # as the kill may have left it

    jobs.clear()
    capsys.readouterr()
    run_script(script, *flags, folder)
    assert f"{journal}: {num_done} answers of an interrupted evaluation are reused" in capsys.readouterr().out
    assert len(jobs) == num_jobs - num_done
    assert written(folder) == written(tmp_path / "whole")
    assert not list(folder.glob("unfinished_*"))


@each_script
def test_two_processes_give_the_results_of_one(script, export, tmp_path, run_script):
    flags = [*COMMANDS[script].split(), "--log_samples", "--num_samples", 6]
    found = []
    for num_processes in (1, 2):
        out = tmp_path / str(num_processes)
        run_script(
            script, "--checkpoint", export, *flags, "--num_processes", num_processes, "--output_path", out
        )
        report, samples = written(out)
        assert report["config"].pop("num_processes") == num_processes
        found.append((report, samples))
    assert found[0] == found[1]
