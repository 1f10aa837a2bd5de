"""The training loop: which batch, which depth, which learning rate, at which step."""

import dataclasses
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import error_line
from common.files import replacing, write_file
from data_pipeline.loading.loader import Loader
from model import ModelConfig
from model.interface import ModelOutput
from model.loop_trace import loop_sums
from model.losses import loss_terms, total_loss
from pretrain import heartbeat
from pretrain.checkpoint import CheckpointError, TrainingState
from pretrain.config import RunConfig
from pretrain.depths import step_depths
from pretrain.engine import Engine
from pretrain.evaluation import Evaluator
from pretrain.metrics import MetricsLog, say
from pretrain.optim import learning_rate
from pretrain.process_group import all_reduce_sum, device, on_any_rank, rank, use_device, world_size
from pretrain.saver import Saver
from pretrain.step_inputs import StepInputs, one_ahead, read_step
from pretrain.step_lines import Figures, StepLines, finite
from pretrain.stopping import StopRequests
from pretrain.transfer import Fetched, pinned, to_device


class TrainingError(ValueError):
    """Training cannot continue: one line that says where it failed and what to do."""


class Trainer:
    """Runs optimizer steps start_step..max_steps; everything a step sees is a function of (config, step)."""

    def __init__(
        self,
        config: RunConfig,
        model_config: ModelConfig,
        engine: Engine,
        loader: Loader,
        validation: Loader | None,
        micro_batch_size: int,
        initial_state: TrainingState,
        stop_requests: StopRequests,
    ) -> None:
        self.config, self.model_config, self.engine = config, model_config, engine
        self.loader, self.validation, self.micro_batch_size = loader, validation, micro_batch_size
        self.run, self.initial_state, self.step = Path(config.output_dir), initial_state, 0
        self.stop_requests, self.stopped, self.skipped = stop_requests, False, 0
        self.validation_cut_short = False
        self.saver = Saver(engine, self.run, config.keep_last, config.keep_every, rank(), warn=say)
        self.log: MetricsLog | None = None
        self.evaluator: Evaluator | None = None
        self.terms = loss_terms(model_config)
        self.lines = StepLines(config, model_config, loader, micro_batch_size)
        self.without_targets = False  # whether a step without any target was met
        self.save_seconds: float | None = None  # for which the last checkpoint paused training

    def save(self) -> None:
        """Copies the state; the checkpoint is written while training continues."""
        started = time.perf_counter()
        heartbeat.note("save")
        state = dataclasses.replace(self.initial_state, step=self.step)
        self.saver.save(state, before=self.log.sync if self.log is not None else lambda: None)
        self.save_seconds = time.perf_counter() - started
        if self.evaluator is not None:
            self.evaluator.request(self.step)
            self.saver.in_use = self.evaluator.step

    def open(self) -> None:
        """Opens rank 0's reports, the last that may refuse a run, and takes away the mark of an earlier end.

        Raises:
            OSError, ValueError: one line; see MetricsLog.
        """
        self.log = MetricsLog(self.config, self.run, self.step)
        self.evaluator = Evaluator(self.config.evaluation, self.run, self.log.note)
        self.evaluator.resume(self.step)
        if self.step > 0:
            self.saver.rotate(self.step)
        if self.step < self.config.max_steps:
            (self.run / "DONE").unlink(missing_ok=True)

    def train(self) -> None:
        """Runs to max_steps, or until a rank is asked to stop, and saves a checkpoint of the last step.

        Raises:
            TrainingError: too many consecutive steps were skipped.
            CheckpointError: a checkpoint could not be written; noticed at the next step.
        """
        with ThreadPoolExecutor(1, initializer=use_device) as reader:
            self._validate_again(reader)
            self._train(reader)
        self.saver.wait()
        self._poll_evaluator()

    def _train(self, reader: Executor) -> None:
        running: Figures | None = None  # of the newest step, which may still run on the device
        try:
            inputs = reader.submit(self._read, self.step)
            while self.step < self.config.max_steps and not self.stopped:
                following = reader.submit(self._read, self.step + 1)
                with self._profiler():
                    figures = self._train_step(inputs)
                inputs = following
                previous, running = running, figures
                if previous is not None:
                    self._report(previous)
                self._poll_evaluator()
                validates = self.validation is not None and self.step % self.config.eval_every == 0
                if validates:
                    running.val_loss = self.validation_loss(reader)
                if validates or self._save_is_due():
                    running = None
                    self._report(figures)
                if self._save_is_due():
                    self.save()
        except BaseException:
            if running is not None:
                with suppress(RuntimeError):  # of a device that has failed, which is already being raised
                    self._write(running)
            raise

    def _save_is_due(self) -> bool:
        return self.stopped or self.step == self.config.max_steps or self.step % self.config.save_every == 0

    def _poll_evaluator(self) -> None:
        if self.evaluator is not None:
            self.evaluator.poll(checkpoint_written=self.saver.idle())
            self.saver.in_use = self.evaluator.step

    @property
    def complete(self) -> bool:
        """Whether the run has done all its steps and their validations."""
        return self.step == self.config.max_steps and not self.validation_cut_short

    def _validate_again(self, reader: Executor) -> None:
        """Validates the step that the run resumes from, if a stop cut its validation short."""
        if self.validation is None or self.step == 0 or self.step % self.config.eval_every:
            return
        if on_any_rank(self.log is not None and not self.log.has_validation(self.step)):
            loss = self.validation_loss(reader)
            if self.log is not None and loss is not None:
                self.log.validated(self.step, finite(loss))

    def close(self) -> None:
        """Waits for the last checkpoint's scores if the run is complete, and closes the log.

        Called after everything that ranks do together, so that the others need not wait for an evaluation.
        """
        if self.evaluator is not None:
            self.evaluator.finish(
                self.stop_requests.reason if self.complete else lambda: "it has not reached its last step"
            )
        if self.log is not None:
            self.log.close()

    @contextmanager
    def _profiler(self) -> Iterator[None]:
        """Records rank 0's operations in step profile_step."""
        if self.step + 1 != self.config.profile_step or rank() > 0:
            yield
            return
        with torch.profiler.profile(profile_memory=True) as profile:
            yield
        path = self.run / "profile" / f"step-{self.step}.json"
        by_time = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)
        try:
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as temporary:
                profile.export_chrome_trace(str(temporary))
            write_file(path.with_suffix(".txt"), f"{by_time}\n".encode())
        except (OSError, RuntimeError) as error:
            say(f"warning: no profile: {error_line(error)}")

    def _read(self, step: int) -> StepInputs:
        """This rank's part of a step; in the reader's thread."""
        rows = self.config.global_batch_size
        depths = step_depths(self.model_config, self.config.seed, step, world_size(), rows)
        return read_step(self.loader, step, self.model_config, self.micro_batch_size, depths)

    def _train_step(self, pending: "Future[StepInputs]") -> Figures:
        """One optimizer step on this rank's rows.

        The host reads nothing from the device, with one exception: whether DeepSpeed applies the update, by
        its own check of the gradients' norm, which `SpikeGuard` makes infinite for a refused step. Deciding
        that later would let a bad step reach the weights.
        """
        started = time.perf_counter()
        heartbeat.note("wait for data", self.step + 1)
        inputs = pending.result()
        waited, depths = time.perf_counter() - started, inputs.depths
        assert depths is not None
        lr = learning_rate(self.config.optimizer, self.step, self.config.max_steps)
        heartbeat.note("sum of counts")
        totals = all_reduce_sum(to_device(inputs.pinned_counts))
        counts = dict(zip(inputs.counts, totals.unbind(), strict=True))
        counts["rows"] = totals.new_full((), self.config.global_batch_size)
        self.engine.train(self.step)
        sums = torch.zeros(len(self.terms), dtype=torch.float64, device=device())
        loops = torch.zeros(3, depths.deepest, dtype=torch.float64, device=device())
        for number, micro_batch in enumerate(inputs.micro_batches, start=1):
            heartbeat.note(f"forward {number}/{len(inputs.micro_batches)}")
            output = self.engine.forward(**micro_batch.on_device())
            assert output.loss_sums is not None
            sums += torch.stack([output.loss_sums[t.name].detach().double() for t in self.terms])
            loops += _loop_sums(output, loops)
            heartbeat.note(f"backward {number}/{len(inputs.micro_batches)}")
            self.engine.backward(total_loss(self.model_config, output.loss_sums, counts))
            if number < len(inputs.micro_batches):
                self.engine.step(lr)
        heartbeat.note("sum of losses")
        stop = _flags(self.stop_requests.reason() is not None, self.saver.failed())
        summed = all_reduce_sum(torch.cat((stop, sums, loops.flatten())))  # the step's only exchange of sums
        stop, sums, loops = summed.split([2, len(sums), loops.numel()])
        loss = total_loss(self.model_config, self._named(sums), counts)
        heartbeat.note("optimizer step")
        self.engine.step(lr, loss, comparable=counts["targets"] > 0)
        seconds = time.perf_counter() - started
        loads = update_router_biases(self.engine)
        results = {
            "stop": stop,
            "counts": totals,
            "terms": sums,
            "loops": loops.view(3, -1),
            "grad_norm": self.engine.grad_norm(),
            "zscores": self.engine.guard.zscores,
        }
        self.step += 1
        return Figures(
            step=self.step,
            depths=depths,
            lr=lr,
            applied=self.engine.step_applied(),
            seconds=seconds,
            waited=waited,
            counted=list(inputs.counts),
            results=Fetched(results if loads is None else {**results, "loads": loads}),
        )

    def _named(self, sums: Tensor) -> dict[str, Tensor]:
        """Sums (terms,) by the terms' names."""
        return {term.name: value for term, value in zip(self.terms, sums, strict=True)}

    def _write(self, figures: Figures) -> dict[str, Any]:
        """Writes a step's line of metrics.jsonl, and returns it."""
        record = self.lines.line(figures)
        if self.save_seconds is not None:  # reported with the next step
            record["save_seconds"], self.save_seconds = self.save_seconds, None
        if self.log is not None:
            self._warn_without_targets(record)
            self.log.write(record)
        return record

    def _report(self, figures: Figures) -> None:
        """Writes a step's line once the step's figures are in host memory, and decides whether to stop."""
        record = self._write(figures)
        stop, failed = figures.results.read()["stop"].tolist()
        if failed:  # some ranks may still wait for the others' part of the news
            self.saver.wait()
            raise CheckpointError("the last checkpoint could not be written by another rank")
        self.stopped |= bool(stop)
        self.skipped = 0 if figures.applied else self.skipped + 1
        if self.skipped >= self.config.stability.max_skipped:
            raise TrainingError(
                f"step {figures.step} was skipped, the last of {self.skipped} in a row "
                f"({record['skipped']}); "
                "metrics.jsonl names their samples: lower optimizer.lr or fix the data, then resume"
            )

    def _warn_without_targets(self, record: dict[str, Any]) -> None:
        """Once per run: the other steps are to be found in metrics.jsonl."""
        if record["target_tokens"] == 0 and not self.without_targets:
            self.without_targets = True
            print(
                f"warning: no token of step {record['step']} is a target, so that its loss is null and it "
                "teaches nothing; metrics.jsonl shows how often (target_tokens 0): if often, raise "
                "global_batch_size or look at the data with show_step.py",
                flush=True,
            )

    @torch.no_grad()
    def validation_loss(self, reader: Executor) -> float | None:
        """Mean cross-entropy per target over the first eval_batches batches of the validation split.

        NaN, with a warning, if none of them has a target. None if a rank was asked to stop meanwhile.
        """
        assert self.validation is not None
        heartbeat.note("validation")
        self.engine.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=device())
        asked: list[Fetched] = []
        options = (self.validation, self.model_config, self.micro_batch_size, self.step)
        for inputs in one_ahead(reader, partial(_read_validation, *options), self.config.eval_batches):
            totals[1] += inputs.counts["targets"]
            for micro_batch in inputs.micro_batches:
                output = self.engine.forward(**micro_batch.on_device())
                assert output.loss_sums is not None
                totals[0] += output.loss_sums["cross_entropy"].double()
            flag = all_reduce_sum(_flags(self.stop_requests.reason() is not None))
            asked.append(Fetched({"stop": flag}))
            if len(asked) > 1 and bool(asked[-2].read()["stop"]):  # of the batch before, which is done
                self.stopped = self.validation_cut_short = True
                return None
        all_reduce_sum(totals)
        loss, targets = Fetched({"totals": totals}).read()["totals"]  # the one wait of a validation
        if rank() == 0 and not targets:
            print(
                f"warning: none of the {self.config.eval_batches} validation batches has a target, so that "
                f"val_loss of step {self.step} is null; raise eval_batches or build other data",
                flush=True,
            )
        return float(loss / targets)


def _read_validation(
    loader: Loader, model_config: ModelConfig, micro_batch_size: int, training_step: int, number: int
) -> StepInputs:
    return read_step(loader, number, model_config, micro_batch_size, training_step=training_step)


def _flags(*values: bool) -> Tensor:
    """(values,) fp64 on the device."""
    return to_device(pinned(torch.tensor(values, dtype=torch.float64)))


@torch.no_grad()
def _loop_sums(output: ModelOutput, like: Tensor) -> Tensor:
    """See loop_trace.loop_sums; padded to the shape of `like`; zeros for a model without recurrence."""
    if output.num_iterations is None or output.halt_probs is None or output.residuals is None:
        return torch.zeros_like(like)
    sums = loop_sums(output.num_iterations, output.halt_probs, output.residuals)
    return F.pad(sums, (0, like.shape[1] - sums.shape[1]))


def update_router_biases(engine: Engine) -> Tensor | None:
    """Updates every router's bias once per optimizer step, from the loads of all ranks and micro-batches.

    A step that the engine skipped changes no bias either.

    Returns:
        (MoE layers, E) tokens per expert, over the whole global batch and all loop steps; None: no experts.
    """
    layers = engine.model.moe_layers()
    if not layers:
        return None
    loads = all_reduce_sum(torch.stack([layer.load for layer in layers]))
    for layer, load in zip(layers, loads, strict=True):
        if engine.step_applied():
            layer.update_bias(load)
        layer.load.zero_()
    return loads
