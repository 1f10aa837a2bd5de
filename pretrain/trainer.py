"""The training loop: which batch, which depth, which learning rate, at which step."""

import dataclasses
import math
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.loader import Batch, Loader
from model import ModelConfig
from model.counts import training_flops_per_token
from model.latent_terms import loop_figures, loop_sums
from model.losses import IGNORE_INDEX, loss_terms, total_loss
from model.recurrence import sample_depth
from model.transformer import ModelOutput
from pretrain.checkpoint import Saver, TrainingState
from pretrain.config import RunConfig
from pretrain.engine import Engine, all_reduce_sum, device, peak_memory_bytes, rank, world_size
from pretrain.metrics import MetricsLog, peak_tflops
from pretrain.optim import learning_rate
from pretrain.stopping import StopRequests


class TrainingError(ValueError):
    """The training itself went wrong: one line that says where and what to do."""


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
        self.stop_requests, self.stopped = stop_requests, False
        self.saver = Saver(engine, self.run, config.keep_last, config.keep_every, rank())
        self.peak, self.terms = peak_tflops(config), loss_terms(model_config)

    def save(self) -> None:
        """Copies the state; the checkpoint is written while training goes on."""
        self.saver.save(dataclasses.replace(self.initial_state, step=self.step))

    def train(self) -> None:
        """Runs to max_steps, or until a rank is asked to stop, and leaves a checkpoint of the last step."""
        log = MetricsLog(self.config, self.run, self.step) if rank() == 0 else None
        with ThreadPoolExecutor(1) as reader:
            batch = reader.submit(self.loader.batch, self.step)
            while self.step < self.config.max_steps and not self.stopped:
                following = reader.submit(self.loader.batch, self.step + 1)
                record = self._train_step(batch)
                batch = following
                if self.validation is not None and self.step % self.config.eval_every == 0:
                    record["val_loss"] = self.validation_loss(self.validation)
                if log is not None:
                    log.write(record)
                last = self.stopped or self.step == self.config.max_steps
                if last or self.step % self.config.save_every == 0:
                    self.save()
        self.saver.wait()
        if log is not None:
            log.close()

    def _train_step(self, pending: "Future[Batch]") -> dict[str, Any]:
        """One optimizer step on this rank's rows; returns its line of metrics.jsonl."""
        started = time.perf_counter()
        batch = pending.result()
        waited = time.perf_counter() - started
        depth = sample_depth(self.model_config, self.config.seed, self.step)
        lr = learning_rate(self.config.optimizer, self.step, self.config.max_steps)
        counts = self._global_counts(batch)
        self.engine.train()
        sums = torch.zeros(len(self.terms), dtype=torch.float64, device=device())
        loops = torch.zeros(3, depth, dtype=torch.float64, device=device())
        for inputs in self._micro_batches(batch):
            output = self.engine.forward(**inputs, num_steps=depth)
            assert output.loss_sums is not None
            sums += torch.stack([output.loss_sums[t.name].detach().double() for t in self.terms])
            loops += _loop_sums(output, loops)
            self.engine.backward(total_loss(self.model_config, output.loss_sums, counts))
            self.engine.step(lr)
        loads = update_router_biases(self.engine)
        stop = sums.new_tensor([self.stop_requests.reason() is not None])
        totals = all_reduce_sum(torch.cat((stop, sums, loops.flatten())))  # one exchange a step
        stop, sums, loops = totals.split([1, len(sums), loops.numel()])
        self.stopped, loops = bool(stop), loops.view(3, depth)
        self.step += 1
        seconds = time.perf_counter() - started
        tokens = self.config.global_batch_size * self.config.data.sequence_length
        terms = {
            term.name: float(value) / max(counts[term.counted_in], 1)
            for term, value in zip(self.terms, sums, strict=True)
        }
        shares = [[n / max(sum(load), 1) for n in load] for load in loads]
        norm = self.engine.grad_norm()
        if not (math.isfinite(terms["cross_entropy"]) and math.isfinite(norm)):
            raise TrainingError(
                f"the loss of step {self.step} is {terms['cross_entropy']} and its grad_norm {norm}; "
                "nothing of it was saved: lower optimizer.lr and resume from the last checkpoint"
            )
        return {
            "step": self.step,
            "loss": terms["cross_entropy"],
            **{f"loss_{name}": value for name, value in terms.items() if name != "cross_entropy"},
            "grad_norm": norm,
            "lr": lr,
            "tokens": self.step * tokens,
            "target_tokens": counts["targets"],
            "tokens_per_second": tokens / seconds,
            "mfu": self._mfu(tokens / seconds, depth),
            "recurrence_depth": depth,
            **(loop_figures(loops) if self.model_config.recurrence.placement != "none" else {}),
            "seconds": seconds,
            "data_wait_fraction": waited / seconds,
            "memory_bytes": peak_memory_bytes(),
            "expert_load_max": max((max(x) * len(x) for x in shares), default=None),
            "expert_load_entropy": min((normalised_entropy(x) for x in shares), default=None),
            "dropped_tokens": self._routed_tokens(depth) - sum(map(sum, loads)),
            "expert_load": shares,
        }

    def _global_counts(self, batch: Batch) -> dict[str, int]:
        """What the loss terms are divided by: targets and rows of all ranks and micro-batches."""
        targets = torch.tensor(int((batch.targets != IGNORE_INDEX).sum()), device=device())
        return {"targets": int(all_reduce_sum(targets)), "rows": self.config.global_batch_size}

    def _micro_batches(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(batch.tokens), self.micro_batch_size):
            rows = slice(start, start + self.micro_batch_size)
            yield {
                "tokens": torch.from_numpy(batch.tokens[rows]).to(device()).long(),
                "targets": torch.from_numpy(batch.targets[rows]).to(device()).long(),
                "cu_seqlens": torch.from_numpy(batch.cu_seqlens[rows]).to(device()),
            }

    def _routed_tokens(self, depth: int) -> int:
        """Choices of an expert that a step makes, over all MoE layers: what the loads must add up to."""
        c = self.model_config
        layers = range(c.num_hidden_layers + c.num_nextn_predict_layers)
        runs = sum(c.runs_of_layer(i, depth, training=True) for i in layers if c.is_moe_layer(i))
        tokens = self.config.global_batch_size * self.config.data.sequence_length
        return tokens * c.places_per_token * c.num_experts_per_tok * runs

    @torch.no_grad()
    def validation_loss(self, loader: Loader) -> float:
        """Mean cross-entropy per target over the first eval_batches of the validation split."""
        self.engine.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=device())
        for step in range(self.config.eval_batches):
            batch = loader.batch(step)
            totals[1] += int((batch.targets != IGNORE_INDEX).sum())
            for inputs in self._micro_batches(batch):
                output = self.engine.forward(**inputs)
                assert output.loss_sums is not None
                totals[0] += output.loss_sums["cross_entropy"].double()
        all_reduce_sum(totals)
        return float(totals[0] / totals[1].clamp(min=1))

    def _mfu(self, tokens_per_second: float, depth: int) -> float | None:
        """Model FLOPs utilisation against the devices' peak, without recomputation; None: peak unknown."""
        if self.peak is None:
            return None
        flops = training_flops_per_token(self.model_config, self.config.data.sequence_length, depth)
        return tokens_per_second * flops / (world_size() * self.peak * 1e12)


@torch.no_grad()
def _loop_sums(output: ModelOutput, like: Tensor) -> Tensor:
    """See latent_terms.loop_sums; zeros for a model without recurrence."""
    if output.num_iterations is None or output.halt_probs is None or output.residuals is None:
        return torch.zeros_like(like)
    return loop_sums(output.num_iterations, output.halt_probs, output.residuals)


def update_router_biases(engine: Engine) -> list[list[int]]:
    """Once per optimizer step: loads of all ranks and micro-batches move every router's bias.

    A step that the engine skipped moves no bias either.

    Returns:
        Tokens per expert of each MoE layer, over the whole global batch and all loop steps.
    """
    layers = engine.model.moe_layers()
    if not layers:
        return []
    loads = all_reduce_sum(torch.stack([layer.load for layer in layers]))
    for layer, load in zip(layers, loads, strict=True):
        if engine.step_applied():
            layer.update_bias(load)
        layer.load.zero_()
    return loads.tolist()


def normalised_entropy(shares: list[float]) -> float:
    """Entropy of the experts' shares over its maximum: 1 is an even load, 0 all tokens on one expert."""
    entropy = -sum(p * math.log(p) for p in shares if p > 0)
    return entropy / math.log(len(shares)) if len(shares) > 1 else 1.0
