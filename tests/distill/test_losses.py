"""The parts of traced documents and every distance, against slow references written from the formulas."""

import pytest
import torch

from model import ModelConfig
from model.config.distillation import DistillationConfig
from model.latent_cot.targets import (
    find_traces,
    gathered,
    hidden_loss,
    kv_loss,
    latent_targets,
    loss_counts,
    rest_start,
    stage,
)
from model.losses import IGNORE_INDEX

from .traces import EOT, IDS, STEP, documents, packed

DOCUMENTS = documents(7)
ROWS = [DOCUMENTS[:3], DOCUMENTS[3:4], [], DOCUMENTS[4:]]
BATCH = packed(ROWS, 96)
CONFIG = DistillationConfig(**IDS)


def traces_of(batch=BATCH):
    return find_traces(batch["tokens"], batch["cu_seqlens"], CONFIG)


def test_the_parts_of_every_document_are_found():
    traces = traces_of()
    tokens = BATCH["tokens"]
    assert len(traces.row) == len(DOCUMENTS)
    for i, document in enumerate(DOCUMENTS):
        row, start, bot, eot, end = (int(part[i]) for part in traces)
        assert tokens[row, start:end].tolist() == document.tokens
        assert tokens[row, bot + 1 : eot].tolist() == document.trace
        assert tokens[row, eot + 1 : end].tolist() == document.answer
    for left in (True, False):
        parts, real = gathered(tokens, traces.row, traces.start, traces.bot, left)
        for part, mask, document in zip(parts, real, DOCUMENTS, strict=True):
            assert part[mask].tolist() == document.tokens[: len(document.question) + 1]
            assert mask[-1 if left else 0]


@pytest.mark.parametrize("cut", ["first", "last", "between"])
def test_a_cut_document_is_refused(cut):
    tokens, bounds = BATCH["tokens"].clone(), BATCH["cu_seqlens"].clone()
    traces = traces_of()
    if cut == "first":
        tokens[0, traces.bot[0]] = 9
    elif cut == "last":
        tokens[0, traces.eot[2]] = 9
    else:  # a segment begins in the middle of a trace
        bounds[0] = torch.tensor([0, int(traces.bot[0]) + 1, *bounds[0, 1:-1]])
    with pytest.raises(ValueError, match="must not be cut; set data.packing=best_fit"):
        find_traces(tokens, bounds, CONFIG)


def test_every_stage_of_a_curriculum_replaces_one_more_step():
    config = DistillationConfig(**IDS, stage_steps=10, latents_per_step=2)
    seen = [stage(config, 4, step) for step in (0, 9, 10, 19, 20, 99)]
    assert seen == [(2, 1), (2, 1), (4, 2), (4, 2), (4, None), (4, None)]
    assert stage(CONFIG, 4, 99) == (4, None)
    traces = traces_of()
    for steps in (1, 2, 3, None):
        places = rest_start(BATCH["tokens"], traces, config, steps).tolist()
        for i, document in enumerate(DOCUMENTS):
            row, eot = int(traces.row[i]), int(traces.eot[i])
            rest = BATCH["tokens"][row, places[i] : eot].tolist()
            kept = [] if steps is None else document.steps[steps:]
            assert [token for token in rest if token != STEP] == [t for step in kept for t in step]
            assert rest.count(STEP) == max(len(kept) - 1, 0)


def test_counts_match_the_documents():
    inputs = (BATCH["tokens"], BATCH["targets"], BATCH["cu_seqlens"])
    answers = sum(len(document.answer) for document in DOCUMENTS)
    trace_targets = sum(len(d.trace) + 1 + len(d.answer) for d in DOCUMENTS)
    assert loss_counts(ModelConfig(), 0, *inputs) == {"targets": trace_targets}
    student = ModelConfig(distillation=CONFIG)
    expected = {"targets": answers, "trace_targets": trace_targets, "documents": len(DOCUMENTS)}
    assert loss_counts(student, 0, *inputs) == expected
    written = ModelConfig(distillation=DistillationConfig(**IDS, teacher_weight=0, student_pass=False))
    assert loss_counts(written, 0, *inputs) == {**expected, "targets": trace_targets}


def element(student: float, teacher: float, kind: str) -> float:
    """One number's distance, from the definitions."""
    error = abs(student - teacher)
    if kind == "l1":
        return error
    if kind == "mse":
        return error**2
    return 0.5 * error**2 if error < 1 else error - 0.5


def deviation(values: list[float], kind: str) -> float:
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return variance if kind == "mse" else variance**0.5


@pytest.mark.parametrize("kind", ["l1", "smooth_l1", "mse"])
@pytest.mark.parametrize("std", [True, False])
def test_hidden_loss_is_codis(kind, std):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 5, dtype=torch.float64) * 2  # 3 layers, 4 documents, 5 features
    config = DistillationConfig(**IDS, hidden_distance=kind, hidden_std=std)
    found = hidden_loss(list(student), list(teacher), config)
    for n in range(4):
        layers = []
        for ours, theirs in zip(student[:, n].tolist(), teacher[:, n].tolist(), strict=True):
            loss = sum(element(s, t, kind) for s, t in zip(ours, theirs, strict=True)) / 5
            layers.append(loss / deviation(theirs, kind) if std else loss)
        assert found[n].item() == pytest.approx(sum(layers) / 3, rel=1e-9)


def test_one_document_reproduces_codis_number():
    """CODI's code takes the standard deviation over all numbers of the batch at a layer."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 1, 8)
    expected = torch.stack(
        [torch.nn.functional.smooth_l1_loss(s, t) / t.std() for s, t in zip(student, teacher, strict=True)]
    ).mean()
    assert hidden_loss(list(student), list(teacher), CONFIG).item() == pytest.approx(
        expected.item(), rel=1e-6
    )


@pytest.mark.parametrize("kind", ["l1", "smooth_l1", "mse"])
@pytest.mark.parametrize("std", [True, False])
def test_kv_loss_is_kavas(kind, std):
    """1/(2M) (|K~_t - K_s|_p^p + |V~_t - V_s|_p^p), mean over layers, heads and a head's width."""
    torch.manual_seed(0)
    L, N, M, G, widths = 2, 3, 4, 2, (3, 5)
    student, teacher = (
        [tuple(torch.randn(N, M, G, W, dtype=torch.float64) * 2 for W in widths) for _ in range(L)]
        for _ in range(2)
    )
    kept = [4, 2, 1]
    real = torch.arange(M) < torch.tensor(kept)[:, None]
    config = DistillationConfig(**IDS, kv_distance=kind, kv_std=std)
    found = kv_loss(student, teacher, [real] * L, config)
    for n in range(N):
        total = 0.0
        for ours, theirs in zip(student, teacher, strict=True):
            for s, t in zip(ours, theirs, strict=True):
                s_n, t_n = s[n, : kept[n]], t[n, : kept[n]]
                part = 0.0
                for m in range(kept[n]):
                    for g in range(G):
                        pairs = zip(s_n[m, g].tolist(), t_n[m, g].tolist(), strict=True)
                        part += sum(element(a, b, kind) for a, b in pairs) / s.shape[-1] / G
                part /= 2 * kept[n]
                total += part / deviation(t_n.flatten().tolist(), kind) if std else part
        assert found[n].item() == pytest.approx(total / L, rel=1e-9)


def test_the_students_targets_get_no_gradient():
    teacher = torch.randn(2, 3, 4, 5, requires_grad=True)
    student = torch.randn(2, 3, 4, 5, requires_grad=True)
    real = torch.ones(2, 3, dtype=torch.bool)
    loss = kv_loss([(student, student)], [(teacher, teacher)], [real], CONFIG).sum()
    (loss + hidden_loss([student[:, 0, 0]], [teacher[:, 0, 0]], CONFIG).sum()).backward()
    assert teacher.grad is None
    assert (student.grad != 0).all()


@pytest.mark.parametrize("block", [0, 3])
def test_each_latent_predicts_its_token_of_the_trace(block):
    config, M = DistillationConfig(**IDS, latent_block=block), 9
    found = latent_targets(BATCH["tokens"], traces_of(), config, M).tolist()
    for row, document in zip(found, DOCUMENTS, strict=True):
        if block:
            padded = [(step + [IGNORE_INDEX] * block)[:block] for step in document.steps]
            expected = [token for step in padded for token in step]
        else:
            expected = document.trace
        assert row == (expected + [IGNORE_INDEX] * M)[:M]
    assert EOT not in {token for row in found for token in row}
