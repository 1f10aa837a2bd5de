"""metrics.jsonl, the progress lines and W&B: nothing is lost, and none of them ends a run."""

import io
import json
import os
import resource
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from pretrain import metrics
from pretrain.config import RunConfig
from pretrain.metrics import DROPPED, METRICS, MetricsLog, set_aside

STEP = {
    "loss": 1.0, "target_tokens": 8, "grad_norm": 1.0, "lr": 0.1,
    "tokens_per_second": 1.0, "data_wait_fraction": 0.0,
    "memory_bytes": 1, "recurrence_depth": 1, "expert_load_max": None, "mfu": None,
}  # fmt: skip


def log_of(run: Path, step: int = 0, **more: Any) -> MetricsLog:
    return MetricsLog(RunConfig(output_dir=str(run), max_steps=100, **more), run, step)


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.fixture
def full():
    """`full(n)`: files cannot grow beyond n bytes, as on a full disk; `full(None)`: they can again."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits if size is None else (size, limits[1]))

    yield set_limit
    set_limit(None)


def test_lines_of_later_steps_are_set_aside_as_they_are(tmp_path, capsys):
    path, aside = tmp_path / METRICS, tmp_path / DROPPED
    first = '{"step": 1}\n{"step": 2,  "x": 1}\n{"step": 3}\n'
    path.write_text(first + '{"step": 4, "lo')
    log_of(tmp_path, 2).close()
    assert path.read_text() == first[: first.index('{"step": 3')]
    assert aside.read_text() == '{"step": 3}\n{"step": 4, "lo\n'
    told = f"{path}: 1 lines of steps after 2, which run again, moved to {aside}\n"
    assert capsys.readouterr().out == told  # a torn end is normal
    path.write_text(first)
    log_of(tmp_path, 0).close()
    assert path.read_text() == ""
    assert aside.read_text() == '{"step": 3}\n{"step": 4, "lo\n' + first
    log_of(tmp_path, 0).close()
    assert aside.read_text().count("\n") == 5


def test_damaged_lines_are_named_and_the_rest_used(tmp_path):
    path = tmp_path / METRICS
    lines = [
        '{"step": 1}',
        "[1]",
        '{"step": true}',
        '{"steps": 2}',
        '{"step": "2"}',
        "\x00" * 9,
        '{"step": 2}',
    ]
    path.write_text("\n".join(lines))  # the last line is whole, only its end is missing
    last, told = set_aside(path, 5)
    assert last == 2
    assert told == [
        f"warning: {path} is damaged in line 2, 3, 4, 5, 6: moved to {tmp_path / DROPPED}, and not used"
    ]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (tmp_path / DROPPED).read_text() == "\n".join(lines[1:-1]) + "\n"
    path.write_text("x\n" * 30)
    assert "line 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 20 more: moved" in set_aside(path, 5)[1][0]


def test_lines_wait_in_memory_while_the_disk_is_full(tmp_path, full, capsys):
    log = log_of(tmp_path)
    log.note({"step": 1, "eval_failed": "x"})
    log.sync()
    size = (tmp_path / METRICS).stat().st_size
    full(size + 7)
    for step in (2, 3):
        log.note({"step": step, "eval_failed": "x"})
    assert (tmp_path / METRICS).stat().st_size == size + 7
    with pytest.raises(
        OSError, match=r"File too large \(.* bytes free\); a checkpoint needs the metrics up to"
    ):
        log.sync()
    full(None)
    said = capsys.readouterr().out
    assert said.count(f"warning: {tmp_path / METRICS}: File too large (") == 1
    assert "its lines wait in memory, and no checkpoint is saved without them" in said
    log.note({"step": 4, "eval_failed": "x"})
    log.sync()
    log.close()
    assert steps_in(tmp_path / METRICS) == [1, 2, 3, 4]


def test_lines_that_never_fit_are_named_at_the_end(tmp_path, full, capsys):
    log = log_of(tmp_path)
    full(0)
    log.note({"step": 1, "eval_failed": "x"})
    log.close()
    full(None)
    assert (
        f"warning: the last 1 lines of {tmp_path / METRICS} could not be written" in capsys.readouterr().out
    )


def test_a_full_disk_under_the_output_does_not_end_the_run(tmp_path, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    log = log_of(tmp_path)
    log.write({"step": 1, **STEP})
    log.close()
    assert steps_in(tmp_path / METRICS) == [1]


def test_a_machine_without_git_can_train(monkeypatch):
    assert "git_commit" in metrics.environment()
    monkeypatch.setenv("PATH", "")
    assert metrics.environment()["git_commit"] is None


def test_a_folder_in_place_of_metrics_is_one_line(tmp_path):
    (tmp_path / METRICS).mkdir()
    with pytest.raises(IsADirectoryError):
        log_of(tmp_path)


class Wandb(types.ModuleType):
    """Records what is sent, and ignores steps that go back, as wandb does."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.runs: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        self.died = False

    def init(self, **settings: Any) -> Any:
        if "/" in settings["project"]:
            raise self.Error("Invalid project name\nmore")
        self.inits.append(settings)
        rows = self.runs.setdefault(settings["id"], [])

        def log(values: dict[str, Any], step: int) -> None:
            if self.died:
                raise ConnectionResetError("Connection lost")
            assert step >= (rows[-1][0] if rows else 0)
            rows.append((step, values))

        known = rows[-1][0] + 1 if rows and settings["mode"] == "online" else 0
        return types.SimpleNamespace(
            step=known, log=log, finish=lambda: log({}, 10**9) if self.died else None
        )


@pytest.fixture
def wandb(monkeypatch) -> Wandb:
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def online(mode: str = "online", project: str = "p") -> dict[str, Any]:
    return {"wandb": metrics.RunConfig().wandb.__class__(mode=mode, project=project)}


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_every_start_continues_one_wandb_run_with_steps_that_never_go_back(tmp_path, wandb, mode):
    for start, end in ((0, 4), (2, 6), (6, 8), (0, 9)):
        log = log_of(tmp_path, start, **online(mode))
        log.note({"step": start, "eval": {"task": {"acc": 0.5}}})  # scores of the resumed checkpoint
        for step in range(start + 1, end + 1):
            log.write({"step": step, **STEP})
            log.note({"step": 1, "eval_failed": "x"})
            log.note({"step": 1, "eval_failed": "x"})
        log.close()
    ((name, rows),) = wandb.runs.items()
    assert (tmp_path / "wandb_id").read_text() == f"{name}\n"
    assert {settings["resume"] for settings in wandb.inits} == {"allow"}
    losses = [step for step, values in rows if "loss" in values]
    assert losses == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert [values["eval/step"] for _, values in rows if "eval/task/acc" in values] == [0, 2, 6, 0]


def test_another_folder_is_another_wandb_run(tmp_path, wandb):
    for name in ("a", "b", "a"):
        (tmp_path / name).mkdir(exist_ok=True)
        log_of(tmp_path / name, **online()).close()
    assert len(wandb.runs) == 2
    (tmp_path / "a/wandb_id").write_bytes(b"\xff../..")
    log_of(tmp_path / "a", **online()).close()
    assert len(wandb.runs) == 3


def test_wandb_that_dies_does_not_end_the_run(tmp_path, wandb, capsys):
    log = log_of(tmp_path, **online())
    log.write({"step": 1, **STEP})
    wandb.died = True
    for step in (2, 3):
        log.write({"step": step, **STEP})
    log.close()
    assert steps_in(tmp_path / METRICS) == [1, 2, 3]
    said = capsys.readouterr().out
    assert said.count("warning: wandb has failed (Connection lost); this start sends it nothing more") == 1


def test_wandb_that_cannot_start_is_one_line(tmp_path, wandb, monkeypatch):
    message = "wandb.project='a/b', wandb.mode=online cannot be started: Invalid project name; correct them"
    with pytest.raises(ValueError, match=message):
        log_of(tmp_path, **online(project="a/b"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="needs wandb, which is not installed: pip install wandb"):
        log_of(tmp_path, **online())


def test_the_real_wandb_takes_the_settings(tmp_path):
    pytest.importorskip("wandb")
    for start in (0, 1):
        log = log_of(tmp_path, start, **online("offline"))
        log.write({"step": start + 1, **STEP})
        log.close()
    name = (tmp_path / "wandb_id").read_text().strip()
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{name}"))  # one folder if both began in one second
    with pytest.raises(ValueError, match="cannot be started: Invalid project name"):
        log_of(tmp_path, 2, **online("offline", "a/b"))
    assert os.path.exists(tmp_path / METRICS)
