"""What a looped model does at one depth: right or wrong, how sure, how long, and whether it settles.

Shape legend: B batch, T tokens of the longest row, V vocabulary, D hidden, U loops, N steps run, P labelled
positions of a batch.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.sources.documents import LabelledDocument
from data_pipeline.tokenization.encode import CharacterIds, encode_labelled
from eval.scoring.core import Scorer
from eval.scoring.inference import OVERFLOW, Engine, pad, require_finite, with_halting
from model import ZeroModel
from model.cache import LatentCache
from model.loop_trace import loop_figures, loop_sums
from model.losses import IGNORE_INDEX

ROUNDS = 5  # timed passes of each of the two models, after one that is not


class Row(NamedTuple):
    """One sample as the model reads it; the last labelled position is the answer's."""

    tokens: list[int]  # bos and one token a character
    positions: list[int]  # of the labels, rising
    targets: list[int]  # what to predict there


class Outcome(NamedTuple):
    """All samples at one depth."""

    predictions: list[list[int]]  # most likely token at each labelled position
    losses: list[list[float]]  # cross-entropy there, nats
    answer_steps: list[float]  # steps run at the answer's position, mean over the loops; empty without loops
    figures: dict[str, Any]  # loop_trace.loop_figures and `ponder_cost`, over all tokens; {} without loops


def encode_rows(name: str, documents: Sequence[LabelledDocument], scorer: Scorer) -> list[Row]:
    """The documents as data_pipeline.build writes them, without the eos that nothing follows.

    Raises DataError for a character that is not one token, ValueError for a text that is too long.
    """
    ids, rows = CharacterIds(name, scorer.tokenizer), []
    for document in documents:
        tokens, _, labels = encode_labelled(document, ids)
        assert labels is not None
        positions = [i for i, label in enumerate(labels) if label != IGNORE_INDEX]
        rows.append(Row(list(tokens[:-1]), positions, [labels[i] for i in positions]))
    longest = max(len(row.tokens) for row in rows)
    if longest > scorer.max_length:
        raise ValueError(
            f"task {name}: a text has {longest} tokens, more than the model's max_position_embeddings"
            f" {scorer.max_length}: shorten it by --task_options"
        )
    return rows


class _Batch(NamedTuple):
    """Rows as tensors."""

    tokens: Tensor  # (B, T)
    mask: Tensor  # (B, T), False under padding
    labelled: tuple[Tensor, Tensor]  # row and column of each labelled position, each (P,)
    counts: list[int]  # labelled positions of each row


def _batch(rows: Sequence[Row], device: torch.device) -> _Batch:
    tokens, mask = pad([row.tokens for row in rows], device)
    counts = [len(row.positions) for row in rows]
    lines = [line for line, count in enumerate(counts) for _ in range(count)]
    columns = [position for row in rows for position in row.positions]
    return _Batch(tokens, mask, (torch.tensor(lines), torch.tensor(columns)), counts)


class MeasureJob(NamedTuple):
    """A batch of rows at one depth; its value holds what `Outcome` is made of."""

    rows: list[Row]
    num_steps: int

    def run(self, engine: Engine) -> list[tuple[Any, float | None]]:
        """Raises ValueError if the model gives anything but finite log-probabilities."""
        batch = _batch(self.rows, engine.device)
        out = engine.model(batch.tokens, attention_mask=batch.mask, num_steps=self.num_steps)
        logits = out.logits[batch.labelled].float()  # (P, V)
        targets = torch.tensor([t for row in self.rows for t in row.targets], device=logits.device)
        loss = F.cross_entropy(logits, targets, reduction="none")
        if not loss.isfinite().all():
            raise ValueError(
                f"at {self.num_steps} steps the model gives a cross-entropy of {loss.max().item()}:"
                f" {OVERFLOW}"
            )
        value: dict[str, Any] = {
            "predictions": [chosen.tolist() for chosen in logits.argmax(-1).split(batch.counts)],
            "losses": [nats.tolist() for nats in loss.split(batch.counts)],
        }
        if engine.model.config.recurrence.placement != "none":
            answers = [row.positions[-1] for row in self.rows]
            mean_steps = out.num_iterations.double().mean(0)[range(len(answers)), answers]
            sums = loop_sums(out.num_iterations, out.halt_probs, out.residuals, batch.mask)
            value |= {
                "answer_steps": mean_steps.tolist(),
                "loop_sums": sums.tolist(),  # float64
                "ponder_cost": float(out.ponder_cost[:, batch.mask].double().mean(0).sum()),
                "num_tokens": int(batch.mask.sum()),
            }
        return [(value, None)]


def measure(scorer: Scorer, rows: Sequence[Row], num_steps: int) -> Outcome:
    """Runs all rows at a depth of `num_steps`, at which adaptive halting may stop earlier.

    Raises ValueError if the model gives anything but finite log-probabilities.
    """
    batches = _batches(scorer, rows)
    jobs = [MeasureJob([rows[i] for i in samples], num_steps) for samples in batches]
    values = scorer.compute(jobs, f"{num_steps} steps")
    predictions = _in_order(batches, [value["predictions"] for value in values])
    losses = _in_order(batches, [value["losses"] for value in values])
    if scorer.model.config.recurrence.placement == "none":
        return Outcome(predictions, losses, [], {})
    sums, cost, num_tokens = torch.zeros(3, num_steps, dtype=torch.float64), 0.0, 0
    for value in values:
        # A pass ends early once every token of the batch has halted.
        found = torch.tensor(value["loop_sums"], dtype=torch.float64)
        sums += F.pad(found, (0, num_steps - found.shape[1]))
        cost += value["ponder_cost"]
        num_tokens += value["num_tokens"]
    steps = _in_order(batches, [value["answer_steps"] for value in values])
    return Outcome(predictions, losses, steps, {**loop_figures(sums), "ponder_cost": cost / num_tokens})


def _batches(scorer: Scorer, rows: Sequence[Row]) -> list[list[int]]:
    return scorer.by_length([len(row.tokens) for row in rows])


def _in_order(batches: Sequence[Sequence[int]], values: Sequence[Sequence[Any]]) -> list[Any]:
    """What each batch has for its samples, in the order of the samples."""
    found = {
        i: value
        for batch, own in zip(batches, values, strict=True)
        for i, value in zip(batch, own, strict=True)
    }
    return [found[i] for i in range(len(found))]


class PathIndependence(NamedTuple):
    """What becomes of three starts, per sample and labelled position."""

    agrees: list[list[float]]  # 1 where all three have the same most likely token
    distance: list[list[float]]  # of final hidden states: mean over the pairs of 2 |a - b| / (|a| + |b|)


class PathJob(NamedTuple):
    """A batch of rows for `path_independence`."""

    rows: list[Row]
    num_steps: int
    seed: int

    def run(self, engine: Engine) -> list[tuple[Any, float | None]]:
        batch = _batch(self.rows, engine.device)
        chosen, hidden = [], []
        for start in (None, self.seed, self.seed + 1):
            out = engine.model(
                batch.tokens, attention_mask=batch.mask, num_steps=self.num_steps, noise_seed=start
            )
            logits = out.logits[batch.labelled]
            require_finite(logits)
            chosen.append(logits.argmax(-1))
            hidden.append(out.hidden[batch.labelled].float())  # (P, D)
        same = ((chosen[0] == chosen[1]) & (chosen[0] == chosen[2])).float()
        far = torch.stack([_distance(a, b) for a, b in combinations(hidden, 2)]).mean(0)
        agrees, distance = ([part.tolist() for part in x.split(batch.counts)] for x in (same, far))
        return [({"agrees": agrees, "distance": distance}, None)]


def path_independence(scorer: Scorer, rows: Sequence[Row], num_steps: int, seed: int) -> PathIndependence:
    """Block loops from their input, as always, and from the noise of `seed` and `seed` + 1."""
    batches = _batches(scorer, rows)
    jobs = [PathJob([rows[i] for i in samples], num_steps, seed) for samples in batches]
    values = scorer.compute(jobs, "path independence")
    return PathIndependence(
        *(_in_order(batches, [value[name] for value in values]) for name in PathIndependence._fields)
    )


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """(P, D), (P, D) -> (P,), from 0 for equal to 2 for opposite ones."""
    return 2 * (a - b).norm(dim=-1) / (a.norm(dim=-1) + b.norm(dim=-1)).clamp(min=1e-12)


def fixed_depth(model: ZeroModel) -> ZeroModel:
    """A model that always runs all steps, of the same weights (shared) less those that decide on halting."""
    return with_halting(model, kind="fixed", expectation=None, ponder_weight=None, stability_weight=0.0)


class TimeJob(NamedTuple):
    """Rows for `halting_time`."""

    rows: list[list[int]]
    num_steps: int

    def run(self, engine: Engine) -> list[tuple[Any, float | None]]:
        tokens, mask = pad(self.rows, engine.device)
        single = tokens[:1, : len(self.rows[0])]

        def batch(model: ZeroModel) -> None:
            model(tokens, attention_mask=mask, num_steps=self.num_steps)

        def decode(model: ZeroModel) -> None:
            cache = LatentCache()
            for token in single.split(1, dim=1):
                model(token, num_steps=self.num_steps, cache=cache)

        timed = {
            "batch": {**_compared(engine, batch), "batch_size": len(tokens)},
            "decode": {**_compared(engine, decode), "batch_size": 1},
        }
        return [(timed, None)]


def halting_time(scorer: Scorer, rows: Sequence[Row], num_steps: int) -> dict[str, dict[str, float]]:
    """Median seconds with halting and at the fixed depth `num_steps`, in turns.

    `batch`: one pass over the first batch of rows, which ends early only when all its tokens have halted.
    `decode`: the first row token by token over a cache, where every token ends when it has halted.
    `time_saved` is 1 - seconds_halting / seconds_fixed.
    """
    job = TimeJob([row.tokens for row in rows[: scorer.batch_size]], num_steps)
    (timed,) = scorer.compute([job], "time of halting")
    return dict(timed)


def _compared(engine: Engine, run: Callable[[ZeroModel], None]) -> dict[str, float]:
    models = {"seconds_halting": engine.model, "seconds_fixed": fixed_depth(engine.model)}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(1 + ROUNDS):
        for name, model in models.items():
            _wait(engine.device)
            start = time.perf_counter()
            run(model)
            _wait(engine.device)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    saved = 1 - medians["seconds_halting"] / medians["seconds_fixed"]
    return {**medians, "time_saved": saved, "rounds": ROUNDS}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def unrolled_parameters(model: ZeroModel, num_steps: int) -> int:
    """Parameters of the model if every run of a layer had its own weights; those of the loop count once."""
    runs = (model.config.runs_of_layer(i, num_steps) for i in range(model.config.num_hidden_layers))
    layers: Any = model.model.layers
    repeated = sum(
        (n - 1) * sum(p.numel() for p in layer.parameters()) for n, layer in zip(runs, layers, strict=True)
    )
    return sum(p.numel() for p in model.parameters()) + repeated


def pooled(values: Sequence[Sequence[float]]) -> list[float]:
    """One number per sample, whose mean is the mean over all positions of all samples.

    Positions of one sample depend on each other, so that the standard error must come from samples: these are
    the linearised values of a ratio (Cochran, Sampling Techniques, 3rd edition, section 6.3).
    """
    count = sum(len(row) for row in values)
    mean = sum(sum(row) for row in values) / count
    return [mean + (sum(row) - mean * len(row)) * len(values) / count for row in values]


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Correlation of the ranks, ties at their mean rank; None if one of the two is constant."""
    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]
