"""A run's files under attack: kills and full disks at every change of a save, and damaged bytes."""

import json
import resource
import shutil
from collections import Counter
from pathlib import Path

import pytest

from model import ModelConfig
from pretrain import checkpoint
from pretrain.checkpoint import CheckpointError, check_compatible
from pretrain.config import RunConfig
from pretrain.metrics import DROPPED, METRICS, MetricsLog
from pretrain.saver import _Digesting

from ..pretrain.conftest import seal
from ..pretrain.one_rank import STATE, save_step, saver, step_held
from .faults import Faults, in_child
from .mutations import byte_mutations, config_mutations


def many(few: int, lots: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("count", [few, pytest.param(lots, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run with the checkpoints of steps 1 and 2."""
    run = tmp_path_factory.mktemp("saved") / "run"
    writer = saver(run)
    for step in (1, 2):
        save_step(writer, step)
    return run


def save_third(run: Path, faults: Faults) -> str:
    """In a child: saves step 3, which also deletes step 1. Returns the error's line, or how many changes."""
    warnings: list[str] = []
    faults.in_writes_of(_Digesting)
    faults.install()
    try:
        save_step(saver(run, warn=warnings.append), 3)
    except CheckpointError as error:
        return f"error: {error}"
    return "\n".join(warnings) or f"{faults.count} changes"


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["kill", "fail", "full"])
def test_a_fault_at_any_change_of_a_save_leaves_a_whole_checkpoint(saved, tmp_path, kind, every):
    shutil.copytree(saved, tmp_path / "0")
    _, counted = in_child(lambda: save_third(tmp_path / "0", Faults(tmp_path / "0", kind, at=0)))
    points = int(counted.split()[0])
    assert points > 40, counted
    ends = Counter()
    for at in range(1, points + 1, every):
        run = tmp_path / str(at)
        shutil.copytree(saved, run)
        code, said = in_child(lambda at=at, run=run: save_third(run, Faults(run, kind, at)))
        assert code == (-9 if kind == "kill" else 0)
        folder, damaged = checkpoint.newest(run)
        held = step_held(folder)
        if said.startswith("error: "):
            assert said.startswith("error: the checkpoint of step 3 could not be written: ")
            assert "No space left on device" in said
            assert str(run) in said
            assert "bytes free" in said
            assert "\n" not in said
            assert held == 2
            assert damaged == {}  # nothing half is left
        elif kind != "kill":
            assert held == 3
            assert said.startswith((f"warning: {run}", f"{points} changes")), said
        ends[said.split(":")[0] if said else "killed", held] += 1
        writer = saver(run)
        for step in (3, 4):
            save_step(writer, step)
        assert checkpoint.steps(run) == [4, 3]
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-3", "step-4"]
    assert {held for _, held in ends} == {2, 3}, ends


def test_a_disk_that_fills_up_in_the_middle_of_a_file(saved, tmp_path):
    """A limit of the files' size fails after some bytes of a file have been written."""
    sizes = sorted({f.stat().st_size for f in (saved / "checkpoints/step-2").rglob("*") if f.is_file()})
    for limit in [0, *(size - 1 for size in sizes), *(size // 2 for size in sizes)]:
        run = tmp_path / str(limit)
        shutil.copytree(saved, run)

        def save(run: Path = run, limit: int = limit) -> str:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            with pytest.raises(CheckpointError) as error:
                save_step(saver(run), 3)
            return str(error.value)

        code, said = in_child(save)
        assert code == 0
        assert ": File too large (" in said
        assert checkpoint.newest(run) == (run / "checkpoints/step-2", {})


@many(20, 1000)
def test_damaged_bytes_of_any_file_are_noticed(saved, tmp_path, count):
    shutil.copytree(saved, tmp_path / "run")
    folder = tmp_path / "run/checkpoints/step-2"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 5
    for path in files:
        data = path.read_bytes()
        for what, damaged in byte_mutations(data, count, seed=0):
            path.write_bytes(damaged)
            if checkpoint.damage(folder) is None:  # such as another space between two keys
                assert path.name == checkpoint.MANIFEST, what
                assert json.loads(damaged) == json.loads(data), what
            assert checkpoint.newest(tmp_path / "run")[0] is not None
        path.write_bytes(data)
    assert step_held(folder) == 2


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"{}", b"[]", b'{"a": 1}', b"{", b""])
def test_no_manifest_is_too_strange_to_be_refused(saved, tmp_path, content):
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run/checkpoints/step-2" / checkpoint.MANIFEST).write_bytes(content)
    folder, damaged = checkpoint.newest(tmp_path / "run")
    assert step_held(folder) == 1
    assert len(damaged) == 1


@many(100, 3000)
def test_a_state_of_wrong_types_is_one_line(saved, tmp_path, count):
    """Sealed, as another version of the code might have written it."""
    folder = tmp_path / "step-2"
    shutil.copytree(saved / "checkpoints/step-2", folder)
    path, refused = folder / checkpoint.STATE, 0
    state = json.loads(path.read_bytes())
    model = state.pop("model")  # whose own keys are attacked in the model's tests
    for what, values in config_mutations(state, count, seed=0):
        path.write_text(json.dumps({"model": model, **values}))
        seal(folder)
        assert checkpoint.damage(folder) is None
        problem = refusal(folder)
        assert problem is None or "\n" not in problem, what
        refused += problem is not None
    assert refused > count / 2


def refusal(folder: Path) -> str | None:
    try:
        found, _ = checkpoint.read(folder)
        check_compatible(folder, found, STATE)
    except ValueError as error:
        return str(error)
    return None


def lines(run: Path, name: str = METRICS) -> list[bytes]:
    path = run / name
    return path.read_bytes().splitlines() if path.exists() else []


def logged(run: Path) -> list[bytes]:
    """metrics.jsonl of eight steps, the last line torn."""
    run.mkdir()
    written = [json.dumps({"step": step, "loss": step / 7}).encode() for step in range(1, 9)]
    (run / METRICS).write_bytes(b"\n".join(written)[:-3])
    return written[:-1]


def open_log(run: Path, step: int) -> MetricsLog:
    config = RunConfig(output_dir=str(run), max_steps=10)
    return MetricsLog(config, run, step)


@many(150, 5000)
def test_damaged_metrics_never_block_a_resume_nor_get_lost(tmp_path, capsys, count):
    whole = logged(tmp_path / "run")
    data = (tmp_path / "run" / METRICS).read_bytes()
    for number, (what, damaged) in enumerate(byte_mutations(data, count, seed=0)):
        run = tmp_path / str(number)
        run.mkdir()
        (run / METRICS).write_bytes(damaged)
        open_log(run, 5).close()
        kept, dropped = lines(run), lines(run, DROPPED)
        assert all(json.loads(line)["step"] <= 5 for line in kept), what
        assert Counter(kept + dropped) == Counter(damaged.splitlines()) or b"\r" in damaged, what
        assert set(whole[:5]) & set(damaged.split(b"\n")) <= set(kept), what
        if wrong := [line for line in damaged.split(b"\n")[:-1] if line not in whole]:
            assert "is damaged in line" in capsys.readouterr().out or all(map(_a_step, wrong)), what
        shutil.rmtree(run)


def _a_step(line: bytes) -> bool:
    """Whether a damaged line happens to be a record."""
    try:
        return isinstance(json.loads(line)["step"], int)
    except (ValueError, TypeError, LookupError):
        return False


@pytest.mark.parametrize("kind", ["kill", "fail", "full"])
def test_a_fault_at_any_change_of_a_start_loses_no_metrics(tmp_path, kind):
    def start(run: Path, faults: Faults) -> str:
        faults.install()
        try:
            log = open_log(run, 5)
        except OSError as error:
            return f"error: {error.filename}: {error.strerror}"
        log.close()
        return str(faults.count)

    whole = logged(tmp_path / "0")
    points = int(in_child(lambda: start(tmp_path / "0", Faults(tmp_path / "0", kind, at=0)))[1])
    assert points >= 7
    for at in range(1, points + 1):
        run = tmp_path / str(at)
        logged(run)
        _, said = in_child(lambda at=at, run=run: start(run, Faults(run, kind, at)))
        assert "No space left on device" in said or kind == "kill", said
        assert set(whole) <= {*lines(run), *lines(run, DROPPED)}
        open_log(run, 5).close()
        assert lines(run) == whole[:5]
        assert set(whole[5:]) <= set(lines(run, DROPPED))
        assert not list(run.glob("*.tmp"))


def test_states_of_older_versions_are_compatible(saved):
    """A key newer than the checkpoint has its default there."""
    found, _ = checkpoint.read(saved / "checkpoints/step-2")
    assert found.model == ModelConfig.from_dict(found.model).to_dict()
    check_compatible(saved, found, STATE)
