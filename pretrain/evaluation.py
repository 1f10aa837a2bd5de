"""Task scores during training, from a separate process that reads a checkpoint.

The process, evaluate_checkpoint.py, reads the checkpoint's files, so that no rank gathers weights for it. If
it fails, hangs or dies, that is a line in the log and `eval_failed` in metrics.jsonl, nothing more.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.result_files import results_files
from common.schema import as_type
from pretrain.config import EvaluationConfig

PROCESS = Path(__file__).with_name("evaluate_checkpoint.py")
# Set by launchers for a rank: a process that inherited them would wait for ranks that are never started.
LAUNCHER_VARIABLE = re.compile(r"(.*_)?(RANK|WORLD_SIZE)|(MASTER|TORCHELASTIC)_.*")
PROGRESS_SECONDS = 60.0  # between two progress lines while a run's end waits


class Evaluator:
    """Rank 0's view of the process that scores checkpoints, one at a time. No method raises or waits for it.

    Args:
        run: the run's folder; an evaluation leaves its results and its log in eval/step-N/ there.
        write: takes a record for metrics.jsonl: the weights' `step`, and either `eval`, task -> metric ->
            value without subtasks, or `eval_failed`, the reason in one line.
    """

    def __init__(self, config: EvaluationConfig, run: Path, write: Callable[[dict[str, Any]], None]) -> None:
        self.config, self.run, self.write = config, run, write
        self.step: int | None = None  # whose checkpoint is awaited or being scored
        self.process: subprocess.Popen[bytes] | None = None
        self.killed, self.deadline = False, 0.0

    def request(self, step: int) -> None:
        """Requests scores of a checkpoint that is being written, if the step is due."""
        if not self._due(step):
            return
        if self.step is None:
            self.step = step
        else:
            self._fail(step, f"skipped, the evaluation of step {self.step} is still running")

    def resume(self, step: int) -> None:
        """Requests the scores of the checkpoint that a run resumes from, if it ended before they arrived.

        Scores that arrived when the run no longer recorded them are recorded now.
        """
        if not self._due(step) or not (self.run / "checkpoints" / f"step-{step}").is_dir():
            return
        if not self._results(step):
            self.request(step)
        elif not self._recorded(step):
            self._record(step)

    def _due(self, step: int) -> bool:
        return self.config.every_steps > 0 and step > 0 and step % self.config.every_steps == 0

    def _recorded(self, step: int) -> bool:
        path = self.run / "metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        return any(line.startswith(b'{"step": %d, "eval' % step) for line in lines)

    def poll(self, checkpoint_written: bool) -> None:
        """Starts, collects or kills the process when due; called once per step."""
        if self.step is None:
            return
        if self.process is None:
            if checkpoint_written:
                self._start(self.step)
        elif self.process.poll() is not None:
            self._collect(self.step, self.process.returncode)
        elif time.monotonic() > self.deadline and not self.killed:
            limit = f"evaluation.timeout_seconds={self.config.timeout_seconds:g}"
            self._kill(f"killed after {limit}; raise it or lower evaluation.limit")

    def finish(self, stop_reason: Callable[[], str | None]) -> None:
        """Waits for the last evaluation until its time-out or a reason to stop."""
        told = -PROGRESS_SECONDS
        while self.step is not None:
            self.poll(checkpoint_written=True)
            if self.process is None:
                continue
            now, reason = time.monotonic(), stop_reason()
            if reason is not None and not self.killed:
                self._kill(f"ended with the run ({reason}); the same command evaluates it again")
            if self.killed and now > self.deadline:
                return  # even SIGKILL does not end a process that waits for a dead disk
            if now - told >= PROGRESS_SECONDS and not self.killed:
                left = max(0.0, self.deadline - now)
                print(f"waiting for the scores of step {self.step}, at most {left:.0f} s more", flush=True)
                told = now
            try:
                self.process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                continue

    def _start(self, step: int) -> None:
        folder = self._folder(step)
        try:
            shutil.rmtree(folder, ignore_errors=True)  # left by an attempt that did not finish
            folder.mkdir(parents=True)
            with (folder / "log.txt").open("wb") as log:
                self.process = subprocess.Popen(
                    self._command(step, folder),
                    env=self._environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # its own process group, to be killed with all its children
                )
        except OSError as error:
            self._close(step)
            self._fail(step, f"it could not be started: {error}")
            return
        self.killed, self.deadline = False, time.monotonic() + self.config.timeout_seconds

    def _command(self, step: int, folder: Path) -> list[str]:
        c = self.config
        own = ["--run", str(self.run), "--step", str(step), "--folder", str(folder)]
        own += ["--trainer", str(os.getpid())]
        flags = ["--tasks", c.tasks, "--limit", str(c.limit)]
        flags += [] if c.num_fewshot is None else ["--num_fewshot", str(c.num_fewshot)]
        flags += [] if c.data is None else ["--data", c.data]
        return [sys.executable, str(PROCESS), *own, "--", *flags]

    def _environment(self) -> dict[str, str]:
        kept = {name: v for name, v in os.environ.items() if not LAUNCHER_VARIABLE.fullmatch(name)}
        kept.setdefault("OMP_NUM_THREADS", "1")
        return kept | ({"CUDA_VISIBLE_DEVICES": ""} if self.config.device == "cpu" else {})

    def _collect(self, step: int, code: int) -> None:
        folder, told = self._folder(step), self.killed
        self._close(step)
        if told:
            return
        if code:
            ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            self._fail(step, f"{ended}: {_last_words(folder / 'log.txt')}")
            return
        self._record(step)

    def _record(self, step: int) -> None:
        results = self._results(step)
        if not results:
            self._fail(step, "it ended without results")
            return
        try:
            scores = _scores(results[-1])
        except (OSError, ValueError, RecursionError) as error:
            self._fail(step, f"its results cannot be read: {error}")
            return
        self.write({"step": step, "eval": scores})

    def _kill(self, reason: str) -> None:
        assert self.process is not None
        assert self.step is not None
        os.killpg(self.process.pid, signal.SIGKILL)  # not reaped yet, so the id is still its own
        self.killed, self.deadline = True, time.monotonic() + 5.0
        self._fail(self.step, reason)

    def _close(self, step: int) -> None:
        """Makes room for the next evaluation and deletes the export, which is as large as the model."""
        shutil.rmtree(self._folder(step) / "work", ignore_errors=True)
        self.step, self.process = None, None

    def _fail(self, step: int, reason: str) -> None:
        self.write({"step": step, "eval_failed": reason})

    def _folder(self, step: int) -> Path:
        return self.run / "eval" / f"step-{step}"

    def _results(self, step: int) -> list[Path]:
        return results_files(self._folder(step))


def _scores(path: Path) -> dict[str, dict[str, float]]:
    """Task -> scores and standard errors, without subtasks and what a single sample cannot have.

    Raises:
        OSError, ValueError, RecursionError: the file is damaged.
    """
    report = as_type(dict[str, Any], json.loads(path.read_text(encoding="utf-8")), path.name)
    results = as_type(dict[str, dict[str, Any]], report.get("results"), f"results of {path.name}")
    groups = as_type(dict[str, list[str]], report.get("group_subtasks"), f"group_subtasks of {path.name}")
    parts = {part for of_task in groups.values() for part in of_task}
    return {
        task: {
            key: as_type(float, value, f"{task}.{key} in {path.name}")
            for key, value in entry.items()
            if "," in key and not isinstance(value, str)
        }
        for task, entry in results.items()
        if task not in parts
    }


def _last_words(log: Path) -> str:
    """The last `error: ` line, else the last line; splits at the carriage returns of progress bars too."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError as error:
        return str(error)
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1][:500]
