"""An evaluation that is killed resumes bit-exactly."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from eval import run as evaluation
from eval.scoring.cli import fingerprint
from eval.scoring.inference import Answer
from eval.scoring.journal import Journal, checkpoint_fingerprint, request_key
from eval.scoring.scorer import Scorer
from model import ZeroModel

REQUESTS = [(f"Where is Mary {i}?\nAnswer:", choice) for i in range(40) for choice in (" bathroom", " hall")]
PROMPTS = [f"Where is John {i}?" for i in range(6)]
# Reports how far it is after each line of the journal.
SCRIPT = """
import sys
from pathlib import Path
from eval.scoring.journal import Journal, checkpoint_fingerprint
from eval.scoring.scorer import Scorer
from tests.eval.test_journal import PROMPTS, REQUESTS

checkpoint, folder = map(Path, sys.argv[1:])
scorer = Scorer.from_checkpoint(checkpoint, batch_size=2)
scorer.journal = Journal.open(folder, checkpoint_fingerprint(checkpoint))
scorer.loglikelihood(REQUESTS)
scorer.generate(PROMPTS, 40)
"""


def evaluate(scorer: Scorer) -> tuple:
    scores = scorer.loglikelihood(REQUESTS)
    texts = scorer.generate(PROMPTS, 40) + scorer.generate(PROMPTS, 5, temperature=1.0, seed=3)
    return scores, texts, scorer.take_steps()


def open_journal(folder: Path, checkpoint: Path) -> Journal:
    return Journal.open(folder, checkpoint_fingerprint(checkpoint))


def test_a_killed_evaluation_computes_nothing_twice(checkpoint, tmp_path, monkeypatch, capsys):
    expected = evaluate(Scorer.from_checkpoint(checkpoint, batch_size=2))
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, checkpoint, tmp_path], env=environment)
    deadline = time.monotonic() + 300
    while sum(path.read_bytes().count(b"\n") for path in tmp_path.glob("unfinished_*")) < 8:
        assert process.poll() is None
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.wait()
    (path,) = tmp_path.glob("unfinished_*.jsonl")
    lines = path.read_bytes().split(b"\n")[:-1]
    done = [key for line in lines[1:] for key in json.loads(line)["answers"]]
    assert 12 <= len(done) < len(REQUESTS) + len(PROMPTS)
    with path.open("ab") as file:
        file.write(b'{"torn":[[-1.0')  # as the kill may have left it

    jobs = []
    scorer = Scorer.from_checkpoint(checkpoint, batch_size=2)
    run = scorer.engine.run
    monkeypatch.setattr(scorer.engine, "run", lambda job: jobs.append(job) or run(job))
    scorer.journal = open_journal(tmp_path, checkpoint)
    assert capsys.readouterr().out == f"{path}: {len(done)} answers of an interrupted evaluation are reused\n"
    assert evaluate(scorer) == expected  # bit for bit
    assert scorer.take_seconds() > 0
    written = [key for line in path.read_bytes().split(b"\n")[1:-1] for key in json.loads(line)["answers"]]
    assert len(set(written)) == len(written) == len(REQUESTS) + 2 * len(PROMPTS)
    assert written[: len(done)] == done

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(ZeroModel, "forward", refuse)
    assert evaluate(scorer) == expected
    scorer.journal.close(finished=True)
    assert list(tmp_path.iterdir()) == []


def test_another_fingerprint_and_another_process_are_kept_out(checkpoint, tmp_path, capsys):
    first = Journal.open(tmp_path / "new", {"model.safetensors": "a"})
    first.put({"key": Answer([-1.5, True], 2.0, 0.25)})
    with pytest.raises(ValueError, match="is in use by an evaluation of the same settings"):
        Journal.open(tmp_path / "new", {"model.safetensors": "a"})
    assert capsys.readouterr().out == ""
    second = Journal.open(tmp_path / "new", {"model.safetensors": "b"})
    assert second.get("key") is None
    assert capsys.readouterr().out.startswith(f"{first.path} belongs to another checkpoint or command")
    second.close(finished=True)
    first.close(finished=False)
    again = Journal.open(tmp_path / "new", {"model.safetensors": "a"})
    assert again.get("key") == Answer([-1.5, True], 2.0, 0.25)
    again.close(finished=False)


@pytest.mark.parametrize(("other", "refused"), [("p_hop", False), ("causal_loop", True)])
def test_commands_share_a_folder_unless_their_tasks_are_the_same(
    checkpoint, tmp_path, monkeypatch, capsys, other, refused
):
    flags = f"--checkpoint {checkpoint} --tasks causal_loop --limit 1 --output_path {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["eval/run.py", *flags.split()])
    given = Namespace(checkpoint=checkpoint, batch_size=16)
    held = Journal.open(
        tmp_path, fingerprint([evaluation.TASKS[other]], given, Scorer.from_checkpoint(checkpoint))
    )
    if refused:
        with pytest.raises(SystemExit):
            evaluation.main()
        assert "is in use by an evaluation" in capsys.readouterr().err
    else:
        evaluation.main()
    assert len(list(tmp_path.glob("results_*.json"))) == (not refused)
    held.close(finished=True)


def test_a_torn_first_line_is_a_new_file(tmp_path):
    journal = Journal.open(tmp_path, {"a": 1})
    journal.close(finished=False)
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole[:-3])
    Journal.open(tmp_path, {"a": 1}).close(finished=False)
    assert journal.path.read_bytes() == whole


def test_every_part_of_a_request_is_in_its_key():
    request = ("generate", [2, 5], 40, ("\n",), 0.0, 0, 0, None)
    others = [("loglikelihood", *request[1:])]
    changes = {1: [2, 6], 2: 41, 3: ("\n", "Q"), 4: 0.5, 5: 1, 6: 1, 7: 4}
    others += [(*request[:i], value, *request[i + 1 :]) for i, value in changes.items()]
    keys = {request_key(*parts) for parts in [request, *others, (*request[:7], "adaptive")]}
    assert len(keys) == 10
    assert request_key(*request) == request_key(*request)
