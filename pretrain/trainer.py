"""The training loop: which batch, which depth, which learning rate, at which step."""

import dataclasses
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import error_line
from common.files import replacing, write_file
from data_pipeline.loading.loader import Batch, Loader
from model import ModelConfig
from model.backends.flash import Documents
from model.interface import ModelOutput
from model.latent_cot.targets import loss_counts
from model.loop_trace import loop_sums
from model.losses import loss_terms, total_loss
from pretrain.checkpoint import CheckpointError, TrainingState
from pretrain.config import RunConfig
from pretrain.depths import StepDepths, step_depths
from pretrain.engine import Engine
from pretrain.evaluation import Evaluator
from pretrain.metrics import MetricsLog, say
from pretrain.optim import learning_rate
from pretrain.process_group import (
    all_reduce_sum,
    device,
    on_any_rank,
    rank,
    world_size,
)
from pretrain.saver import Saver
from pretrain.step_lines import Figures, StepLines, finite
from pretrain.stopping import StopRequests


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
        self._validate_again()
        running: Figures | None = None  # of the newest step, which may still run on the device
        with ThreadPoolExecutor(1) as reader:
            batch = reader.submit(self.loader.batch, self.step)
            while self.step < self.config.max_steps and not self.stopped:
                following = reader.submit(self.loader.batch, self.step + 1)
                with self._profiler():
                    figures = self._train_step(batch)
                batch = following
                if running is not None:
                    self._report(running)
                running = figures
                self._poll_evaluator()
                if self.validation is not None and self.step % self.config.eval_every == 0:
                    running.val_loss = self.validation_loss(self.validation)
                last = self.stopped or self.step == self.config.max_steps
                if last or self.step % self.config.save_every == 0:
                    self._report(running)
                    running = None
                    self.save()
        self.saver.wait()
        self._poll_evaluator()

    def _poll_evaluator(self) -> None:
        if self.evaluator is not None:
            self.evaluator.poll(checkpoint_written=self.saver.idle())
            self.saver.in_use = self.evaluator.step

    @property
    def complete(self) -> bool:
        """Whether the run has done all its steps and their validations."""
        return self.step == self.config.max_steps and not self.validation_cut_short

    def _validate_again(self) -> None:
        """Validates the step that the run resumes from, if a stop cut its validation short."""
        if self.validation is None or self.step == 0 or self.step % self.config.eval_every:
            return
        if on_any_rank(self.log is not None and not self.log.has_validation(self.step)):
            loss = self.validation_loss(self.validation)
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

    def _train_step(self, pending: "Future[Batch]") -> Figures:
        """One optimizer step on this rank's rows; reads nothing from the device that DeepSpeed does not."""
        started = time.perf_counter()
        batch = pending.result()
        waited = time.perf_counter() - started
        depths = self._step_depths()
        lr = learning_rate(self.config.optimizer, self.step, self.config.max_steps)
        counts = self._global_counts(batch, depths)
        self.engine.train(self.step)
        sums = torch.zeros(len(self.terms), dtype=torch.float64, device=device())
        loops = torch.zeros(3, depths.deepest, dtype=torch.float64, device=device())
        micro_batches = list(self._micro_batches(batch, depths))
        for number, inputs in enumerate(micro_batches, start=1):
            output = self.engine.forward(**inputs)
            assert output.loss_sums is not None
            sums += torch.stack([output.loss_sums[t.name].detach().double() for t in self.terms])
            loops += _loop_sums(output, loops)
            self.engine.backward(total_loss(self.model_config, output.loss_sums, counts))
            if number < len(micro_batches):
                self.engine.step(lr)
        stop = sums.new_tensor([self.stop_requests.reason() is not None, self.saver.failed()])
        summed = all_reduce_sum(torch.cat((stop, sums, loops.flatten())))  # the step's only exchange of sums
        stop, sums, loops = summed.split([2, len(sums), loops.numel()])
        loss = total_loss(self.model_config, self._named(sums), counts)
        self.engine.step(lr, loss, comparable=counts["targets"] > 0)
        self.step += 1
        return Figures(
            step=self.step,
            depths=depths,
            lr=lr,
            applied=self.engine.step_applied(),
            seconds=time.perf_counter() - started,
            waited=waited,
            stop=stop,
            counts=counts,
            terms=sums,
            loops=loops.view(3, -1),
            loads=update_router_biases(self.engine),
            grad_norm=self.engine.grad_norm(),
            zscores=self.engine.guard.zscores,
        )

    def _named(self, sums: Tensor) -> dict[str, Tensor]:
        """Sums (terms,) by the terms' names."""
        return {term.name: value for term, value in zip(self.terms, sums, strict=True)}

    def _report(self, figures: Figures) -> None:
        """Reads a step's figures from the device, writes its metrics.jsonl line, decides whether to stop."""
        record = self.lines.line(figures)
        if self.save_seconds is not None:  # reported with the next step
            record["save_seconds"], self.save_seconds = self.save_seconds, None
        if self.log is not None:
            self._warn_without_targets(record)
            self.log.write(record)
        stop, failed = figures.stop.tolist()
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

    def _step_depths(self) -> StepDepths:
        rows = self.config.global_batch_size
        return step_depths(self.model_config, self.config.seed, self.step, world_size(), rows)

    def _global_counts(self, batch: Batch, depths: StepDepths) -> dict[str, Tensor]:
        """Sums over all ranks and micro-batches, scalars on the device: every loss term's counted_in,
        `real_tokens`, which excludes padding, `looped_tokens`, the same times their row's loop steps, and
        `damaged_rows`, skipped so far.
        """
        own = {**self._loss_counts(batch), "real_tokens": int(batch.lengths.sum())}
        own["looped_tokens"] = int((torch.from_numpy(batch.lengths) * depths.rows[rank()]).sum())
        own["damaged_rows"] = len(self.loader.damaged)
        totals = all_reduce_sum(torch.tensor(list(own.values()), device=device()))
        rows = totals.new_tensor(self.config.global_batch_size)
        return {**dict(zip(own, totals.unbind(), strict=True)), "rows": rows}

    def _loss_counts(self, batch: Batch) -> dict[str, int]:
        """This rank's counts, see latent_cot.targets.loss_counts."""
        parts = (batch.tokens, batch.targets, batch.cu_seqlens)
        return loss_counts(self.model_config, self.step, *(torch.from_numpy(part) for part in parts))

    def _micro_batches(self, batch: Batch, depths: StepDepths | None = None) -> Iterator[dict[str, Any]]:
        """This rank's rows as arguments of the model; without `depths` at the config's depth."""
        T = batch.tokens.shape[1]
        for start in range(0, len(batch.tokens), self.micro_batch_size):
            rows = slice(start, start + self.micro_batch_size)
            inputs: dict[str, Any] = {
                "tokens": torch.from_numpy(batch.tokens[rows]).to(device()).long(),
                "targets": torch.from_numpy(batch.targets[rows]).to(device()).long(),
                "cu_seqlens": torch.from_numpy(batch.cu_seqlens[rows]).to(device()),
            }
            boundaries, longest = batch.documents(rows)
            inputs["documents"] = Documents(torch.from_numpy(boundaries).to(device()), longest)
            if (batch.lengths[rows] < T).any():  # padding enters no statistic of experts or loop
                lengths = torch.from_numpy(batch.lengths[rows]).to(device())
                inputs["attention_mask"] = torch.arange(T, device=device()) < lengths[:, None]
            if depths is not None:
                inputs["num_steps"] = depths.passes(rows)
                if depths.per_row:
                    inputs["depths"] = depths.rows[rank(), rows].to(device())
            yield inputs

    @torch.no_grad()
    def validation_loss(self, loader: Loader) -> float | None:
        """Mean cross-entropy per target over the first eval_batches batches of the validation split.

        NaN, with a warning, if none of them has a target. None if a rank was asked to stop meanwhile.
        """
        self.engine.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=device())
        asked = [torch.zeros(1, device=device())]
        for step in range(self.config.eval_batches):
            batch = loader.batch(step)
            totals[1] += self._loss_counts(batch)["targets"]
            for inputs in self._micro_batches(batch):
                output = self.engine.forward(**inputs)
                assert output.loss_sums is not None
                totals[0] += output.loss_sums["cross_entropy"].double()
            asked.append(all_reduce_sum(totals.new_tensor([self.stop_requests.reason() is not None])))
            if bool(asked[-2]):  # the batch before: the device computes this one meanwhile
                self.stopped = self.validation_cut_short = True
                return None
        all_reduce_sum(totals)
        if rank() == 0 and not totals[1]:
            print(
                f"warning: none of the {self.config.eval_batches} validation batches has a target, so that "
                f"val_loss of step {self.step} is null; raise eval_batches or build other data",
                flush=True,
            )
        return float(totals[0] / totals[1])


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
