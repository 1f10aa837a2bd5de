"""SIGTERM at every phase of a run: a checkpoint, or a line that says what is safe; nothing else."""

import shutil
import signal
import time
from pathlib import Path

import pytest

from pretrain import checkpoint

from ..pretrain.conftest import finish
from .test_launching import records, until

STEPS = 12
PHASES = {  # what there is when the signal comes
    "start": lambda run: True,
    "join": lambda run: (run / ".lock").exists(),
    "conversion": lambda run: (run / "checkpoints/converting").exists(),
    "step": lambda run: len(records(run)) > 6,
    "save": lambda run: checkpoint.steps(run)[0] > 6,
    "export": lambda run: (run / "export.tmp").exists() or (run / "export").exists(),
}
FAST = ("conversion", "save")


@pytest.mark.parametrize(
    "phase", [phase if phase in FAST else pytest.param(phase, marks=pytest.mark.slow) for phase in PHASES]
)
def test_a_run_stopped_there_continues(phase, begin, six_steps, train, training, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(six_steps, run)
    shutil.rmtree(run / "export")
    (run / "DONE").unlink()
    layout = ("ep_size=1", "micro_batch_size=2") if phase == "conversion" else ()
    ranks = 1 if phase == "conversion" else 2
    options = (f"max_steps={STEPS}", "save_every=1", "eval_every=3", *layout)
    process = begin(ranks, *training(run, *options))
    until(lambda: PHASES[phase](run) or process.poll() is not None, phase)
    asked = time.monotonic()
    for number in range(ranks):
        process.rank(number).send_signal(signal.SIGTERM)
    done = finish(process, check=False)
    assert time.monotonic() - asked < 30
    assert "Traceback" not in done.stderr, done.stderr
    folder, damaged = checkpoint.newest(run)
    assert folder is not None
    said = done.stdout + done.stderr
    if f"stopped after step {folder.name[5:]} by SIGTERM; the same command continues" not in said:
        ended_before = f"stopped before the first step by SIGTERM; {folder} is whole; the same command"
        assert phase == "start" or ended_before in said or (run / "DONE").exists(), said
    assert not damaged
    train(run, *options, ranks=ranks)
    assert [record["step"] for record in records(run) if "loss" in record] == list(range(1, STEPS + 1))
    assert (run / "DONE").exists()
    assert {r["step"] for r in records(run) if "val_loss" in r} >= {9, 12}
    assert not (run / "checkpoints/converting").exists()
    assert Path(run / "export/model.safetensors").exists()
