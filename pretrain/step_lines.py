"""A step's results, and its line in metrics.jsonl."""

import math
import statistics
from dataclasses import dataclass
from typing import Any

from data_pipeline.loading.loader import Loader
from model import ModelConfig
from model.counts import recomputed_flops_per_token, training_flops_per_token
from model.loop_trace import loop_figures
from model.losses import loss_terms
from pretrain.config import RunConfig
from pretrain.depths import StepDepths, trained_at
from pretrain.metrics import peak_tflops
from pretrain.process_group import peak_memory_bytes, world_size
from pretrain.transfer import Fetched


@dataclass
class Figures:
    """A step's results. Those on the device are read while the next step runs, so that it never waits."""

    step: int  # optimizer steps done, this one included
    depths: StepDepths
    lr: float
    applied: bool  # whether it changed the weights
    seconds: float
    waited: float  # seconds spent waiting for data
    counted: list[str]  # what `counts` are of, see step_inputs.read_step
    # stop (2,) numbers of ranks that request a stop, and that know of a failed save; counts (counted,) and
    # terms (terms,) sums over all ranks; loops (3, deepest), see loop_trace.loop_sums; loads (MoE layers, E)
    # tokens, if there are experts; grad_norm scalar; zscores (2,) of loss and grad_norm
    results: Fetched
    val_loss: float | None = None  # NaN: nothing was scored, or the model's outputs are not finite


class StepLines:
    """Turns the results of a run's steps into lines of metrics.jsonl."""

    def __init__(
        self, config: RunConfig, model_config: ModelConfig, loader: Loader, micro_batch_size: int
    ) -> None:
        self.config, self.model_config, self.loader = config, model_config, loader
        self.micro_batch_size, self.old_lr_scale = micro_batch_size, config.init.old_lr_scale
        self.peak, self.terms = peak_tflops(config, model_config), loss_terms(model_config)

    def line(self, f: Figures) -> dict[str, Any]:
        """A step's line in metrics.jsonl."""
        results = f.results.read()
        counts = dict(zip(f.counted, results["counts"].tolist(), strict=True))
        counts["rows"] = self.config.global_batch_size
        terms = {  # None where there was nothing to average over
            term.name: float(value) / counts[term.counted_in] if counts[term.counted_in] else None
            for term, value in zip(self.terms, results["terms"], strict=True)
        }
        tokens = self.config.tokens_per_step
        loads = results["loads"].tolist() if "loads" in results else []
        shares = [[n / max(sum(load), 1) for n in load] for load in loads]
        losses = {
            "loss" if name == "cross_entropy" else f"loss_{name}": value for name, value in terms.items()
        }
        measured: dict[str, float | None] = {**losses, "grad_norm": float(results["grad_norm"])}
        return {
            "step": f.step,
            **{name: finite(value) for name, value in measured.items()},
            "lr": f.lr,
            **({} if self.old_lr_scale == 1 else {"lr_old": f.lr * self.old_lr_scale}),
            "tokens": f.step * tokens,
            "target_tokens": counts["targets"],
            "padded_tokens": tokens - counts["real_tokens"],
            "damaged_rows": counts["damaged_rows"],
            "tokens_per_second": tokens / f.seconds,
            **self._utilisation(tokens / f.seconds, f),
            "recurrence_depth": f.depths.mean,
            **(loop_figures(results["loops"]) if self.model_config.recurrence.placement != "none" else {}),
            "seconds": f.seconds,
            "data_wait_fraction": f.waited / f.seconds,
            "memory_bytes": peak_memory_bytes(),
            "expert_load_max": max((max(x) * len(x) for x in shares), default=None),
            "expert_load_entropy": min((normalised_entropy(x) for x in shares), default=None),
            "dropped_tokens": self._routed_tokens(counts) - sum(map(sum, loads)),
            "expert_load": shares,
            **({} if f.val_loss is None else {"val_loss": finite(f.val_loss)}),
            **({} if f.applied else self._skipped(f, measured)),
        }

    def _skipped(self, f: Figures, measured: dict[str, float | None]) -> dict[str, Any]:
        """Why a step was skipped, and which rows of which sources it consisted of."""
        wrong = [f"{name} is {v}" for name, v in measured.items() if v is not None and not math.isfinite(v)]
        zscores = zip(("loss", "grad_norm"), f.results.read()["zscores"].tolist(), strict=True)
        high = [f"z-score of {name} is {z:.1f}" for name, z in zscores]
        return {
            "skipped": ", ".join(wrong or high),
            "sample_ids": self.loader.sample_ids(f.step - 1),
        }

    def _routed_tokens(self, counts: dict[str, int]) -> int:
        """Expert choices of a step over all MoE layers: what the loads must add up to."""
        c = self.model_config
        layers = [i for i in range(c.num_hidden_layers + c.num_nextn_predict_layers) if c.is_moe_layer(i)]
        once, deeper = (sum(c.runs_of_layer(i, n, training=True) for i in layers) for n in (1, 2))
        looped = deeper - once
        runs = counts["real_tokens"] * (once - looped) + counts["looped_tokens"] * looped
        return runs * c.positions_per_token * c.num_experts_per_tok

    def _utilisation(self, tokens_per_second: float, f: Figures) -> dict[str, float | None]:
        """FLOPs relative to the devices' peak: `mfu` the model's, `hfu` with those recomputed and those of
        passes that a row only waits through.

        None without a peak, see metrics.peak_tflops.
        """
        if self.peak is None:
            return {"mfu": None, "hfu": None}
        length, checkpointing = self.config.data.sequence_length, self.config.execution.checkpointing
        config = trained_at(self.model_config, f.step - 1)

        def computed(depth: int) -> float:
            twice = recomputed_flops_per_token(config, checkpointing, length, depth)
            return training_flops_per_token(config, length, depth) + twice

        model = f.depths.mean_of(lambda depth: training_flops_per_token(config, length, depth))
        done = statistics.mean(map(computed, f.depths.all_passes(self.micro_batch_size)))
        share = tokens_per_second / (world_size() * self.peak * 1e12)
        return {"mfu": share * model, "hfu": share * done}


def finite(value: float | None) -> float | None:
    """The value, or None where JSON has no number for it."""
    return None if value is None or not math.isfinite(value) else value


def normalised_entropy(shares: list[float]) -> float:
    """Entropy of the experts' shares over its maximum: 1 is an even load, 0 is all tokens on one expert."""
    entropy = -sum(p * math.log(p) for p in shares if p > 0)
    return entropy / math.log(len(shares)) if len(shares) > 1 else 1.0
