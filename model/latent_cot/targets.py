"""What latent chain of thought learns from: the parts of traced documents, and the distances to the teacher.

A traced document is `[bos] question <bot> trace <eot> answer [eos]`. Every distance is one number per
document, formed from that document alone, so it does not depend on the batch, its order or its padding.

Shapes: b rows, T columns of a row, N documents, W width of a gathered part, D hidden, M latents, G key-value
heads.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config.distillation import DistillationConfig
from model.config.model import ModelConfig
from model.layers import at_least_fp32
from model.losses import IGNORE_INDEX


class Traces(NamedTuple):
    """Where the N traced documents of a packed batch are; all (N,) int64."""

    row: Tensor
    start: Tensor  # of the first token
    bot: Tensor
    eot: Tensor
    end: Tensor  # after the last token


def find_traces(tokens: Tensor, cu_seqlens: Tensor, config: DistillationConfig) -> Traces:
    """The traced documents of tokens (b, T) with segments cu_seqlens (b, n), see ZeroModel.forward.

    Segments without <bot> and <eot> (ordinary text, padding) are not traced documents.

    Raises:
        ValueError: a document has only one of the two, because it was cut at the edge of a row.
    """
    row, bot = (tokens == config.bot_id).nonzero(as_tuple=True)
    eot_row, eot = (tokens == config.eot_id).nonzero(as_tuple=True)
    bounds = cu_seqlens.long().contiguous()
    segment, eot_segment = (
        torch.searchsorted(bounds[rows], columns[:, None], right=True)
        for rows, columns in ((row, bot), (eot_row, eot))
    )
    whole = row.shape == eot_row.shape and bool(
        ((row == eot_row) & (segment == eot_segment)[:, 0] & (bot < eot)).all()
    )
    if not whole:
        raise ValueError(
            f"a row holds {len(row)} <bot> and {len(eot)} <eot> that are not one of each in a document: "
            "documents must not be cut; set data.packing=best_fit and raise data.sequence_length"
        )
    padded = F.pad(bounds, (0, 1), value=tokens.shape[1])[row]
    start, end = padded.gather(1, segment - 1)[:, 0], padded.gather(1, segment)[:, 0]
    return Traces(row, start, bot, eot, end)


def gathered(
    values: Tensor, row: Tensor, first: Tensor, stop: Tensor, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Parts first..stop-1 of rows of values (b, T, ...) -> (N, W, ...), and (N, W) True where one is.

    W is the length of the longest part; the others are padded on the right, or with `left` on the left, by
    neighbouring values.
    """
    length = stop - first
    width = int(length.max()) if len(row) else 0
    offset = torch.arange(width, device=values.device)
    columns = first[:, None] + offset - (width - length[:, None] if left else 0)
    real = (columns >= first[:, None]) & (columns < stop[:, None])
    return values[row[:, None], columns.clamp(0, values.shape[1] - 1)], real


def stage(config: DistillationConfig, num_latents: int, step: int) -> tuple[int, int | None]:
    """Numbers of latents and of trace steps that they replace in optimizer step `step` (from 0); None: all.

    Coconut (arXiv 2412.06769, 3 and its released configs): stage s = 1, 2, ... replaces s steps by
    latents_per_step latents each; once all latents are in use, the rest of the trace is dropped too.
    """
    if not config.stage_steps:
        return num_latents, None
    number, last = 1 + step // config.stage_steps, num_latents // config.latents_per_step
    return min(number, last) * config.latents_per_step, number if number <= last else None


def rest_start(tokens: Tensor, traces: Traces, config: DistillationConfig, steps: int | None) -> Tensor:
    """(N,) column of what follows the first `steps` steps of each trace; None: all of them.

    One config.step_id separates two steps. After the last step this is the column of <eot>.
    """
    if steps is None:
        return traces.eot
    trace, real = gathered(tokens, traces.row, traces.bot + 1, traces.eot)
    passed = ((trace == config.step_id) & real).cumsum(1) < steps
    return torch.minimum(traces.bot + 2 + (passed & real).sum(1), traces.eot)


def student_targets(tokens: Tensor, traces: Traces, config: DistillationConfig, steps: int | None) -> Tensor:
    """How many tokens the student predicts: the rest of the traces, and the answers with their [eos]."""
    rest = rest_start(tokens, traces, config, steps)
    return (traces.end - 1 - rest).sum()


def loss_counts(
    config: ModelConfig, step: int, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor
) -> dict[str, int]:
    """The counts that divide the loss terms, see losses.LossTerm.counted_in; all except "rows".

    Args:
        step: the optimizer step, from 0.
        tokens, targets, cu_seqlens: a batch, see ZeroModel.forward.
    """
    total = int((targets != IGNORE_INDEX).sum())
    distillation = config.distillation
    if distillation is None:
        return {"targets": total}
    traces = find_traces(tokens, cu_seqlens, distillation)
    student = total
    if distillation.student_pass:
        _, steps = stage(distillation, config.latent_cot.num_latents, step)
        student = int(student_targets(tokens, traces, distillation, steps))
    return {"targets": student, "trace_targets": total, "documents": len(traces.row)}


def distance(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """Element by element: l1 | smooth_l1 (its corner at 1) | mse."""
    functions = {"l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss, "mse": F.mse_loss}
    return functions[kind](at_least_fp32(student), at_least_fp32(teacher), reduction="none")


def spread(teacher: Tensor, real: Tensor, kind: str) -> Tensor:
    """(N,) divisors of a distance: the standard deviation within each document's teacher (N, W, ...).

    Taken over all numbers where real (N, W). CODI takes it over the whole micro-batch, so its loss depends on
    the batch; with one document per batch the two agree. As in CODI, a squared distance is divided by the
    variance.
    """
    values = at_least_fp32(teacher).flatten(2)
    weights = real[..., None].expand_as(values)
    count = weights.flatten(1).sum(1)
    mean = (values * weights).sum((1, 2)) / count.clamp(min=1)
    squares = ((values - mean[:, None, None]).square() * weights).sum((1, 2))
    std = (squares / (count - 1).clamp(min=1)).sqrt().clamp(min=1e-6)
    return std.square() if kind == "mse" else std


def hidden_loss(student: list[Tensor], teacher: list[Tensor], config: DistillationConfig) -> Tensor:
    """CODI, eq. 4: states (N, D) at one position by every run of a layer -> (N,), mean over features and runs

    The teacher's are detached.
    """
    total = []
    for ours, theirs in zip(student, teacher, strict=True):
        theirs = theirs.detach()
        loss = distance(ours, theirs, config.hidden_distance).mean(-1)
        if config.hidden_std:
            real = torch.ones_like(theirs[:, :1], dtype=torch.bool)
            loss = loss / spread(theirs[:, None], real, config.hidden_distance)
        total.append(loss)
    return torch.stack(total).mean(0)


def kv_distance(student: Tensor, teacher: Tensor, real: Tensor, config: DistillationConfig) -> Tensor:
    """Keys, or values, of one layer (N, M, G, W) -> (N,), mean over the M latents, the heads and their width.

    KaVa's sum of |.|_p^p over a head's width is divided by that width, so that the weight means the same for
    every width, also where keys and values differ in width. The teacher's are detached.

    Args:
        real: (N, M), False where the trace has no token left for a latent.
    """
    teacher = teacher.detach()
    loss = distance(student, teacher, config.kv_distance).mean((2, 3))
    loss = (loss * real).sum(1) / real.sum(1).clamp(min=1)
    return loss / spread(teacher, real, config.kv_distance) if config.kv_std else loss


def kv_loss(
    student: list[tuple[Tensor, Tensor]],
    teacher: list[tuple[Tensor, Tensor]],
    real: list[Tensor],
    config: DistillationConfig,
) -> Tensor:
    """KaVa, eq. 5: 1/(2M) (|K_t - K_s|_p^p + |V_t - V_s|_p^p) -> (N,), mean over the layers' runs.

    Args:
        student: keys before rotation and values (N, M, G, W) of the latents, layer by layer.
        teacher: the kept ones of the trace, in temporal order.
    """
    parts = [
        (kv_distance(keys, t_keys, kept, config) + kv_distance(values, t_values, kept, config)) / 2
        for (keys, values), (t_keys, t_values), kept in zip(student, teacher, real, strict=True)
    ]
    return torch.stack(parts).mean(0)


def latent_targets(tokens: Tensor, traces: Traces, config: DistillationConfig, num_latents: int) -> Tensor:
    """(N, M) the token of the trace that each latent should predict, or IGNORE_INDEX.

    LOTUS gives each step of the trace a block of latents, filled from the left; tokens beyond a step's block,
    and steps beyond the last block, are left out. With latent_block=0 the tokens follow one another,
    including those between steps.
    """
    trace, real = gathered(tokens, traces.row, traces.bot + 1, traces.eot)
    latent = torch.arange(trace.shape[1], device=tokens.device).expand_as(trace)
    if config.latent_block:
        between = trace == config.step_id
        step = between.long().cumsum(1)
        within = latent - torch.where(between, latent + 1, 0).cummax(1).values
        real = real & ~between & (within < config.latent_block)
        latent = step * config.latent_block + within
    real = real & (latent < num_latents)
    out = torch.full((len(trace), num_latents + 1), IGNORE_INDEX, device=tokens.device)
    out.scatter_(1, torch.where(real, latent, num_latents), torch.where(real, trace, IGNORE_INDEX))
    return out[:, :num_latents]
