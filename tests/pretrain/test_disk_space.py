"""Room is compared with what keep_last needs before the first step."""

from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model import ModelConfig
from model.counts import num_parameters
from pretrain import disk_space
from pretrain.config import RunConfig
from pretrain.disk_space import checkpoint_bytes, require_room

from .one_rank import save_step, saver

Usage = namedtuple("Usage", "total used free")
MODEL = ModelConfig(vocab_size=97, hidden_size=48)
N = num_parameters(MODEL)


def run_of(folder: Path, stage: int = 3, half: bool = False, **config: Any) -> Any:
    return SimpleNamespace(
        config=RunConfig(output_dir=str(folder), **{"max_steps": 100, "save_every": 10, **config}),
        model_config=MODEL,
        folder=folder,
        ds_config={"bf16": {"enabled": half}},
        state=SimpleNamespace(zero_stage=stage),
        start=None,
    )


def needed(monkeypatch, run: Any, step: int = 0) -> int:
    """The least room with which the run may start."""

    def fits(free: int) -> bool:
        monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda _: Usage(10**12, 0, free))
        try:
            require_room(run, N, step)
        except ValueError:
            return False
        return True

    low, high = -1, 100 * N
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def test_the_first_start_needs_one_checkpoint_more_than_it_keeps(tmp_path, monkeypatch):
    each = 12 * N
    assert needed(monkeypatch, run_of(tmp_path)) == 3 * each
    assert needed(monkeypatch, run_of(tmp_path, keep_last=5)) == 6 * each
    assert needed(monkeypatch, run_of(tmp_path, max_steps=20)) == 2 * each + 4 * N  # and the export
    assert needed(monkeypatch, run_of(tmp_path, max_steps=11), step=10) == each + 4 * N
    assert needed(monkeypatch, run_of(tmp_path, stage=1)) == 3 * 16 * N
    assert needed(monkeypatch, run_of(tmp_path, stage=2, half=True)) == 3 * 14 * N
    run = run_of(tmp_path)
    run.config.optimizer.ema_decay = 0.9
    assert checkpoint_bytes(run, N) == 16 * N
    run.config.optimizer.kind = "muon"
    assert checkpoint_bytes(run, N) == 12 * N


def test_a_resumed_run_needs_less_by_what_is_there(tmp_path, monkeypatch):
    writer = saver(tmp_path)
    for step in (10, 20):
        save_step(writer, step)
    files = [path for path in (tmp_path / "checkpoints/step-20").rglob("*") if path.is_file()]
    each = sum(path.stat().st_size for path in files if path.name != "manifest.json")
    (tmp_path / "export").mkdir()
    (tmp_path / "export/model.safetensors").touch()
    assert needed(monkeypatch, run_of(tmp_path), step=20) == each
    assert needed(monkeypatch, run_of(tmp_path, keep_last=4), step=20) == 3 * each
    assert needed(monkeypatch, run_of(tmp_path), step=100) == 0
    (tmp_path / "checkpoints/step-10/manifest.json").unlink()
    assert needed(monkeypatch, run_of(tmp_path), step=20) == 2 * each


def test_checkpoints_that_are_linked_to_another_disk_need_their_room_there(tmp_path, monkeypatch):
    elsewhere = Path("/dev/shm")
    if elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("one file system")
    (tmp_path / "checkpoints").symlink_to(elsewhere)
    free = {tmp_path / "checkpoints": 36 * N, tmp_path: 4 * N}
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda folder: Usage(10**12, 0, free[folder]))
    require_room(run_of(tmp_path), N, 0)
    for folder in free:
        free[folder] -= 1
        with pytest.raises(ValueError, match=f"^{folder} has {free[folder]:,} bytes free"):
            require_room(run_of(tmp_path), N, 0)
        free[folder] += 1


def test_a_file_system_that_does_not_know_its_size_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda _: Usage(0, 0, 0))
    require_room(run_of(tmp_path), N, 0)


def test_the_line_has_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda _: Usage(10**12, 0, 1000))
    with pytest.raises(
        ValueError, match=f"has 1,000 bytes free, but the run needs {36 * N:,} more: checkpoints"
    ) as e:
        require_room(run_of(tmp_path), N, 0)
    assert f"of {12 * N:,} bytes, of which keep_last=2 and the one being written exist at once" in str(
        e.value
    )
