"""Crashes and full disks: a run resumes from a whole checkpoint, and no file is ever executed."""

import copyreg
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pretrain import checkpoint, elastic, universal
from pretrain.export import export_run

from .conftest import finish, seal, unlink_buffer
from .test_resume import metrics
from .test_stopping import wait_for_step


def wait_for_save(run: Path, step: int, launcher) -> None:
    """Returns while the checkpoint of that step, or of a later one, is being written."""
    deadline = time.monotonic() + 400  # on a busy machine
    while checkpoint.steps(run)[:1] < [step]:
        assert launcher.poll() is None, finish(launcher)
        assert time.monotonic() < deadline
        time.sleep(0.002)  # a write takes longer than this


def kill_at_random(begin, training, run: Path, kills: int, max_steps: int) -> list[str]:
    """Restarts a run repeatedly and kills one rank or both; returns what each start printed."""
    generator, said = random.Random(0), []
    for _ in range(kills):
        done = metrics(run)[-1]["step"] if (run / "metrics.jsonl").exists() else 0
        launcher = begin(2, *training(run, f"max_steps={max_steps}", "save_every=1"))
        step = done + generator.randint(2, 5)
        generator.choice((wait_for_step, wait_for_save))(run, step, launcher)
        ranks = [launcher.rank(number) for number in (0, 1)]
        for process in generator.choice((ranks, ranks[:1], ranks[1:])):
            process.send_signal(signal.SIGKILL)
        said.append(finish(launcher, check=False).stdout)
        unlink_buffer(launcher)
    return said


def killed_and_undisturbed(begin, train, training, folder: Path, kills: int, max_steps: int) -> None:
    whole, run = folder / "whole", folder / "run"
    train(whole, f"max_steps={max_steps}", "save_every=1")
    said = kill_at_random(begin, training, run, kills, max_steps)
    said.append(train(run, f"max_steps={max_steps}", "save_every=1").stdout)
    assert all("resuming from" in text for text in said[1:])
    for key in ("step", "loss", "grad_norm", "lr", "expert_load", "target_tokens"):
        assert [r[key] for r in metrics(run)] == [r[key] for r in metrics(whole)], key
    exported = [load_file(path / "export/model.safetensors") for path in (whole, run)]
    assert all(torch.equal(exported[0][name], exported[1][name]) for name in exported[0])


def test_a_run_killed_twice_ends_like_an_undisturbed_one(begin, train, training, tmp_path):
    killed_and_undisturbed(begin, train, training, tmp_path, kills=2, max_steps=16)


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_like_an_undisturbed_one(begin, train, training, tmp_path):
    killed_and_undisturbed(begin, train, training, tmp_path, kills=20, max_steps=130)


@pytest.mark.slow  # tests/attacks/test_run_faults.py fills the disk too
def test_a_full_disk_ends_the_run_with_one_line_and_spares_the_older_checkpoint(begin, training, tmp_path):
    """One rank cannot write any more: the other one, which can, reports it, long before the next save."""
    run = tmp_path / "run"
    launcher = begin(2, *training(run, "max_steps=100000", "save_every=40"))
    wait_for_step(run, 42, launcher)
    launcher.rank(1).rlimit(psutil.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    done = finish(launcher, check=False)
    assert done.returncode
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "Traceback" not in done.stderr
    line = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    step = int(line.split()[5])
    assert line.startswith(
        f"error: the checkpoint of step {step} could not be written: {run}/checkpoints/step-"
    )
    assert re.search(
        r": File too large \([\d,]+ bytes free\); the file needs [\d,]+ bytes; older ones are", line
    )
    folder, skipped = checkpoint.newest(run)
    assert folder == run / f"checkpoints/step-{step - 40}"
    assert skipped == {}  # the failed one left nothing behind
    assert step <= metrics(run)[-1]["step"] < step + 35
    assert (run / "checkpoints/latest").read_text() == f"{folder.name}\n"


def test_a_folder_that_cannot_be_written(train, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to("/sys")  # not even root can create a folder there
    done = train(run, "max_steps=2", "save_every=1", "ep_size=1", ranks=1, check=False)
    assert done.returncode
    assert "error: the checkpoint of step 1 could not be written: /" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not (run / "DONE").exists()


def test_a_lost_or_changed_file_invalidates_a_checkpoint(six_steps, tmp_path):
    files = sorted((six_steps / "checkpoints/step-6").iterdir())
    assert len(files) == 7  # two of each rank, biases, state, manifest
    for number, file in enumerate(files):
        run = tmp_path / str(number)
        shutil.copytree(six_steps / "checkpoints", run / "checkpoints")
        victim = run / "checkpoints/step-6" / file.name
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        for changed in (bytes(content), content[:-1], None):
            victim.unlink() if changed is None else victim.write_bytes(changed)
            folder, skipped = checkpoint.newest(run)
            assert folder == run / "checkpoints/step-4", (file, skipped)
            (problem,) = skipped.values()
            if file.name != checkpoint.MANIFEST:
                assert problem.startswith(f"{file.name} ")


def test_a_flipped_bit_in_the_newest_checkpoint_costs_only_its_steps(six_steps, train, tmp_path):
    """Found although every rank reads only part of the files; a named checkpoint is not replaced."""
    run = tmp_path / "run"
    shutil.copytree(six_steps, run)
    victim = max((run / "checkpoints/step-6").glob("*_optim_states.pt"))
    content = bytearray(victim.read_bytes())
    content[-len(content) // 3] ^= 4
    victim.write_bytes(content)
    named = train(run, "max_steps=6", f"resume={run}/checkpoints/step-6", check=False)
    assert f"step-6 is not a whole checkpoint: {victim.name} does not match its checksum" in named.stderr
    done = train(run, "max_steps=6", "save_every=2")
    assert f"step-6 is not whole ({victim.name} does not match its checksum); trying an older" in done.stdout
    ours, theirs = (load_file(folder / "export/model.safetensors") for folder in (run, six_steps))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_malicious_checkpoint_is_not_executed(six_steps, train, tmp_path):
    """Even if its manifest matches: under its own layout, under another, and in the export."""
    mark = tmp_path / "executed"

    class Malice:
        def __reduce__(self):
            return (Path.touch, (mark,))

    for pattern in ("*_model_states.pt", "*_optim_states.pt"):
        run = tmp_path / pattern[2:]
        shutil.copytree(six_steps, run)
        folder = run / "checkpoints/step-6"
        torch.save(Malice(), max(folder.glob(pattern)))
        seal(folder)
        layout = {"ranks": 2} if "model" in pattern else {"ranks": 1}
        done = train(run, "max_steps=6", f"ep_size={layout['ranks']}", **layout, check=False)
        assert done.returncode
        assert "holds pickled code, which is never run; delete" in done.stderr
        assert "Traceback" not in done.stderr
        with pytest.raises(ValueError, match="holds pickled code"):
            export_run(run, 6, tmp_path / "export")
    assert not mark.exists()


def test_checkpoints_are_pickled_without_calls():
    """On every Python: 3.11.2 would write getattr(ZeroStageEnum, "weights")."""
    stage = universal.ZeroStageEnum
    assert copyreg.dispatch_table[stage](stage.weights) == (stage, (3,))


def test_only_damaged_checkpoints_refuse_the_start_and_touch_nothing(six_steps, train, tmp_path):
    """Sizes are compared first, by each rank; checksums later, by all together."""
    for number, damage in enumerate((b"", b"X")):
        run = tmp_path / str(number)
        shutil.copytree(six_steps, run)
        for folder in (run / "checkpoints").glob("step-*"):
            victim = max(folder.glob("*_optim_states.pt"))
            victim.write_bytes(damage + victim.read_bytes()[1:])
        before = contents(run)
        done = train(run, "max_steps=8", "save_every=2", check=False)
        assert done.returncode == 1  # of the launcher
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: no checkpoint in {run}/checkpoints is whole: step-6 (")
        assert ", step-4 (" in line
        assert ", step-2 (" in line
        assert line.endswith(f"start over on purpose: give another output_dir, or delete {run}")
        assert "Traceback" not in done.stderr
        assert contents(run) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_killed_before_or_in_its_first_save_starts_over_and_keeps_its_metrics(train, tmp_path):
    run = tmp_path / "run"
    options = ("max_steps=2", "save_every=2", "ep_size=1")
    train(run, *options, ranks=1)
    written = (run / "metrics.jsonl").read_text()
    for unfinished in (False, True):
        shutil.rmtree(run / "checkpoints")
        if unfinished:
            (run / "checkpoints/step-2").mkdir(parents=True)
        said = train(run, *options, ranks=1).stdout
        assert f"metrics.jsonl: 2 lines of steps after 0, which run again, moved to {run}" in said
        assert ("no checkpoint was ever finished here; starting at the first step" in said) == unfinished
        assert (run / "metrics.dropped.jsonl").read_text().startswith(written)
        assert [record["step"] for record in metrics(run)] == [1, 2]
        assert (run / "DONE").is_file()


def test_a_start_that_fails_late_leaves_an_ended_run_as_it_was(six_steps, train, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(six_steps, run)
    (run / "wandb_id").mkdir()
    more = ("max_steps=8", "save_every=2", "wandb.mode=offline")
    done = train(run, *more, check=False)
    assert done.returncode
    assert done.stderr.count("error: ") == 1, done.stderr
    assert f"error: {run}/wandb_id: Is a directory" in done.stderr
    assert "Traceback" not in done.stderr
    assert (run / "DONE").read_text() == "6\n"
    assert len(metrics(run)) == 6
    (run / "wandb_id").rmdir()
    assert "done: 8 steps" in train(run, "max_steps=8", "save_every=2").stdout


def test_a_disk_too_full_to_convert_a_checkpoint_is_one_line(tmp_path, monkeypatch):
    folder, scratch = tmp_path / "step-2", tmp_path / "converting"

    def convert(checkpoint: Path, into: Path) -> Path:
        (into / "part").write_bytes(b"half")
        raise OSError(28, "No space left on device", str(into / "part"))

    monkeypatch.setattr(elastic, "convert_to_universal", convert)
    with pytest.raises(
        ValueError, match=r"part: No space left on device \([\d,]+ bytes free\); the checkpoint is"
    ) as e:
        elastic._convert(None, folder, scratch)  # type: ignore[arg-type]
    assert str(e.value).startswith(
        f"{folder} could not be converted to another layout in {scratch}: {scratch}/"
    )
    assert not scratch.exists()
