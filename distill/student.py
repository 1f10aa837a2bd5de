"""The model that learns latent chain of thought from its own explicit chain of thought.

On a packed batch of traced documents (see model/latent_cot/targets.py) one forward pass runs

    teacher  [bos] Q <bot> C <eot> A [eos]       an ordinary causal pass over the packed rows
    student  [bos] Q <bot> z_1..z_c <eot> A [eos]  one row per document, see model/latent_cot/thoughts.py

and returns the terms of the loss as sums. Gradients of the student's targets do not reach the teacher's pass,
which learns only from its own cross-entropy.

Shapes: b packed rows, T tokens of a row, N documents, D hidden, M latents, C trace tokens, G key-value heads.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import ModelConfig, ModelOutput, ZeroModel
from model.backends.flash import Documents
from model.cache import LatentCache, Slot
from model.config.distillation import DistillationConfig
from model.latent_cot import rkv
from model.latent_cot.modules import ProjectedKV
from model.latent_cot.targets import (
    Traces,
    find_traces,
    gathered,
    hidden_loss,
    kv_loss,
    latent_targets,
    loss_counts,
    rest_start,
    stage,
)
from model.latent_cot.thoughts import Thoughts, think
from model.losses import IGNORE_INDEX, total_loss

Held = list[tuple[Tensor, Tensor]]  # keys before rotation and values of each slot


class _Answered(NamedTuple):
    """The student's pass."""

    cross_entropy: Tensor  # summed over what it predicts
    states: list[Tensor]  # (N, W, D) of every run of a layer, from <eot> on
    thoughts: Thoughts | None


class Student(ZeroModel):
    """A ZeroModel with the loss of config.distillation; without targets it is the plain model.

    A curriculum and random eviction depend on `training_step`. The arguments are ZeroModel's; with
    `use_projection` it has parameters that the plain model lacks (export_files.TRAINING_ONLY).
    """

    def __init__(self, config: ModelConfig, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        d = config.distillation
        if d is not None and d.use_projection:
            self.kv_projections = nn.ModuleList(
                ProjectedKV(config.kv_widths, d.prj_dim, d.use_layernorm, layer)
                for layer in range(config.num_hidden_layers)
            )

    @property
    def _distillation(self) -> DistillationConfig:
        assert self.config.distillation is not None
        return self.config.distillation

    @property
    def starts_stage(self) -> bool:
        steps = (max(0, self.training_step - 1), self.training_step)
        before, now = (stage(self._distillation, self.config.latent_cot.num_latents, step) for step in steps)
        return before != now or super().starts_stage

    def forward(self, *inputs: Any, **options: Any) -> ModelOutput:
        """ZeroModel.forward; with targets, pass tokens and cu_seqlens by name.

        Raises:
            ValueError: a document is cut, see find_traces.
        """
        if options.get("targets") is None:
            return super().forward(*inputs, **options)
        return self._learn(**options)

    def _learn(
        self,
        tokens: Tensor,
        targets: Tensor,
        cu_seqlens: Tensor,
        attention_mask: Tensor | None = None,
        num_steps: int | None = None,
        documents: Documents | None = None,
    ) -> ModelOutput:
        """The losses of a packed batch; in eval mode only the student's cross-entropy."""
        d = self._distillation
        traces = find_traces(tokens, cu_seqlens, d)
        taught = d.needs_teacher or not d.student_pass
        states: list[Tensor] | None = [] if d.hidden_weight else None
        cache = LatentCache(differentiable=True) if d.kv_weight else None
        if cache is not None:
            cache.queries = {}
        sums, report = {}, ModelOutput()
        if taught and (self.training or not d.student_pass):
            report = super().forward(
                tokens,
                attention_mask,
                cu_seqlens=cu_seqlens,
                documents=documents,
                targets=targets,
                num_steps=num_steps,
                cache=cache,
                states=states,
            )
            assert report.loss_sums is not None
            sums = dict(report.loss_sums)
        if d.student_pass:
            sums["teacher"] = sums.get("cross_entropy", torch.zeros((), device=tokens.device))
            answered = self._answer(tokens, traces, num_steps)
            sums["cross_entropy"] = answered.cross_entropy
            if self.training:
                sums |= self._distances(tokens, traces, answered, states, cache)
        if not self.training:
            return report._replace(loss=None, loss_sums=sums)
        counts = loss_counts(self.config, self.training_step, tokens, targets, cu_seqlens)
        loss = total_loss(self.config, sums, {**counts, "rows": len(tokens)})
        return report._replace(loss=loss, loss_sums=sums)

    def _answer(self, tokens: Tensor, traces: Traces, num_steps: int | None) -> _Answered:
        """The student's pass: questions, thoughts, then <eot>, the rest of the trace, and the answers."""
        latents, steps = stage(self._distillation, self.config.latent_cot.num_latents, self.training_step)
        question, real = gathered(tokens, traces.row, traces.start, traces.bot + 1, left=True)
        suffix, targets = self._suffix(tokens, traces, steps)
        if not len(question):  # a row without targets, so that every rank gives every weight a gradient
            question, suffix = (tokens.new_full((1, 1), i) for i in (self._distillation.bot_id, 0))
            real, targets = torch.ones_like(question).bool(), torch.full_like(suffix, IGNORE_INDEX)
        suffix_real = targets != IGNORE_INDEX
        states: list[Tensor] = []
        if latents:
            thoughts = think(
                self, question, real, num_latents=latents, num_steps=num_steps, differentiable=True
            )
            mask = torch.cat((F.pad(real, (0, latents), value=True), suffix_real), 1)
            out, _ = self.read(suffix, mask, num_steps=num_steps, cache=thoughts.cache, states=states)
            return _Answered(self.lm_head(out.hidden, targets), states, thoughts)
        whole, mask = torch.cat((question, suffix), 1), torch.cat((real, suffix_real), 1)
        out, _ = self.read(whole, mask, num_steps=num_steps, states=states)
        hidden, first = out.hidden[:, question.shape[1] :], question.shape[1]
        return _Answered(self.lm_head(hidden, targets), [state[:, first:] for state in states], None)

    def _suffix(self, tokens: Tensor, traces: Traces, steps: int | None) -> tuple[Tensor, Tensor]:
        """Tokens read after the thoughts (N, W), padded on the right, and the targets there.

        <eot>, the trace after its first `steps` steps, then the answer, whose last token is only predicted.
        """
        left = traces.eot - rest_start(tokens, traces, self._distillation, steps)
        length = left + traces.end - traces.eot
        offset = torch.arange(int(length.amax()) if len(length) else 1, device=tokens.device)
        before_answer = (offset > 0) & (offset <= left[:, None])
        position = traces.eot[:, None] - left[:, None] + offset - before_answer.long()
        position = torch.where(offset > 0, position, traces.eot[:, None])
        real = offset < length[:, None]
        read = tokens[traces.row[:, None], position.clamp(max=tokens.shape[1] - 1)]
        return read[:, :-1], torch.where(real, read, IGNORE_INDEX)[:, 1:]

    def _distances(
        self,
        tokens: Tensor,
        traces: Traces,
        answered: _Answered,
        teacher_states: list[Tensor] | None,
        teacher_cache: LatentCache | None,
    ) -> dict[str, Tensor]:
        """The terms that compare the student's pass with the trace, summed over documents."""
        d, sums = self._distillation, dict[str, Tensor]()
        if not len(traces.row):
            zero = torch.zeros((), device=tokens.device)
            return {"hidden": zero, "kv": self._no_kv(zero), "latent": zero}
        if teacher_states is not None:
            position = traces.eot + d.prefix_length
            ours = [state[:, d.prefix_length] for state in answered.states]
            theirs = [state[traces.row, position] for state in teacher_states]
            sums["hidden"] = hidden_loss(ours, theirs, d).sum()
        if teacher_cache is not None:
            sums["kv"] = self._kv(traces, answered.thoughts, teacher_cache)
        if d.latent_weight:
            sums["latent"] = self._predicted(tokens, traces, answered.thoughts)
        return sums

    def _predicted(self, tokens: Tensor, traces: Traces, thoughts: Thoughts | None) -> Tensor:
        """LOTUS: mean cross-entropy over a document's latents that have a token to predict."""
        assert thoughts is not None, "DistillationConfig.check"
        gold = latent_targets(tokens, traces, self._distillation, thoughts.hidden.shape[1])
        share = (gold != IGNORE_INDEX).sum(1, keepdim=True).clamp(min=1).float().reciprocal()
        return self.lm_head(thoughts.hidden, gold, share.expand(gold.shape))

    def _kv(self, traces: Traces, thoughts: Thoughts | None, teacher: LatentCache) -> Tensor:
        """KaVa: the latents' keys and values against those kept from the teacher's trace."""
        assert thoughts is not None, "DistillationConfig.check"
        if (traces.eot == traces.bot + 1).all():  # no trace has a token that could be kept
            return self._no_kv(torch.zeros((), device=traces.eot.device))
        M = thoughts.hidden.shape[1]
        assert thoughts.attention_mask is not None
        positions = thoughts.attention_mask.long().cumsum(1)[:, -M:] - 1
        ours, theirs, real = Held(), Held(), list[Tensor]()
        assert teacher.queries is not None
        for slot in teacher.queries:
            held = thoughts.cache.held(slot)[:, : thoughts.attention_mask.shape[1]][:, -M:]
            ours.append(rkv.expanded_keys(self, int(slot[0]), held, positions))
            with torch.no_grad():
                keys, values, kept = self._kept(traces, teacher, slot, M)
            theirs.append((keys, values))
            real.append(kept)
            if self._distillation.use_projection:
                projection: Any = self.kv_projections[int(slot[0])]
                ours[-1], theirs[-1] = projection.student(*ours[-1]), projection.teacher(*theirs[-1])
        return kv_loss(ours, theirs, real, self._distillation).sum()

    def _no_kv(self, zero: Tensor) -> Tensor:
        """`zero` that gives the projections a gradient of 0: every rank gives every weight one."""
        if not self._distillation.use_projection:
            return zero
        return zero + 0 * sum(parameter.sum() for parameter in self.kv_projections.parameters())

    def _kept(
        self, traces: Traces, teacher: LatentCache, slot: Slot, budget: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a slot keeps of each trace, in temporal order.

        Importance is the attention of the answer's tokens, from <eot> to the last one read, to the trace's
        tokens alone, as R-KV takes the softmax over the candidates. If several loop steps read a slot, the
        last one counts.

        Returns:
            Keys before rotation and values, (N, M, G, W) each, and (N, M) False where a trace is too short.
        """
        d, layer = self._distillation, int(slot[0])
        assert teacher.queries is not None
        held, mask = gathered(teacher.held(slot), traces.row, traces.bot + 1, traces.eot)
        query, query_mask = gathered(teacher.queries[slot][-1], traces.row, traces.eot, traces.end - 1)
        attention: Any = self.model.layers[layer].self_attn
        rotated, _ = rkv.cached_keys(self, layer, held)
        first = traces.bot + 1 - traces.start
        positions = first[:, None] + torch.arange(held.shape[1], device=held.device)
        keys, values = rkv.expanded_keys(self, layer, held, positions)
        importance = rkv.importance(query, rotated, mask, query_mask, attention.scale, pool=1)
        chosen = rkv.select(
            importance, rotated, mask, budget, d.kv_lambda, d.kv_policy, seed=self.training_step
        )
        kept = torch.arange(budget, device=mask.device) < mask.sum(1, keepdim=True)
        return _at(keys, chosen, budget), _at(values, chosen, budget), kept


def _at(values: Tensor, chosen: Tensor, budget: int) -> Tensor:
    """(N, C, G, W), chosen (N, G, n) positions per head -> (N, budget, G, W), zeros after the n-th."""
    index = chosen.transpose(1, 2)[..., None].expand(-1, -1, -1, values.shape[-1])
    return F.pad(values.gather(1, index), (0, 0, 0, 0, 0, budget - index.shape[1]))
