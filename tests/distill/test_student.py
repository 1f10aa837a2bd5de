"""The student's losses on packed batches, against one document at a time and against the plain model."""

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from distill.main import NEW
from distill.methods import METHODS, with_method
from distill.student import Student
from model import ModelConfig, ZeroModel, load_pretrained
from model.config.execution import ExecutionConfig
from model.latent_cot.targets import hidden_loss, kv_loss, loss_counts
from model.latent_cot.thoughts import think
from model.losses import loss_terms, total_loss
from pretrain.config import InitConfig
from pretrain.init import find, fit

from .traces import BOS, BOT, EOT, IDS, PREFIX, STEP, TRACE, VOCABULARY, Document, documents, packed

DOCUMENTS = documents(5)
LOOP = {"placement": "block", "ranges": [[1, 1]], "num_steps": 2}
KINDS = {
    "latent attention": {"use_moe": False},
    "grouped queries": {"use_moe": False, "use_mla": False, "num_key_value_heads": 2, "qk_norm": True},
    "block loop": {"use_moe": False, "recurrence": LOOP},
    "experts": {"n_routed_experts": 4, "moe_intermediate_size": 16},
}
LATENTS = {"num_latents": 4}


def model(
    kind: str, method: str, distillation: dict | None = None, latent_cot: dict | None = None
) -> Student:
    """A tiny student in training mode, whose weights do not depend on the method."""
    settings = METHODS[method].latent_cot
    few = {"num_latents": min(settings["num_latents"], 4)} | ({} if latent_cot is None else latent_cot)
    sizes = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2 if kind != "block loop" else 3,
        num_attention_heads=4,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        intermediate_size=48,
        initializer_range=0.15,
        **KINDS[kind],
    )
    values = {
        "method": method,
        **IDS,
        **({"latent_block": 2} if method == "lotus" else {}),
        **(distillation or {}),
    }
    config = ModelConfig.from_dict(with_method({**sizes, "latent_cot": few, "distillation": values}))
    return Student(config, seed=1).to(precision(kind)).train()


def precision(kind: str) -> torch.dtype:
    """fp64, except for experts, whose statistics are always fp32."""
    return torch.float32 if kind == "experts" else torch.float64


def sums(student: Student, rows: list[list[Document]], length: int = 160) -> dict[str, torch.Tensor]:
    found = student(**packed(rows, length)).loss_sums
    assert found is not None
    return found


def ids(*parts: list[int]) -> torch.Tensor:
    return torch.tensor([[token for part in parts for token in part]])


def answered(
    student: Student, document: Document, latents: int, rest: list[int]
) -> tuple[torch.Tensor, list]:
    """CE of one document's student pass, summed, and its states from <eot> on; nothing is padded."""
    question, suffix = ids([BOS], document.question, [BOT]), ids([EOT], rest, document.answer)
    states: list[torch.Tensor] = []
    if latents:
        cache = think(student, question, num_latents=latents, differentiable=True).cache
        logits = ZeroModel.forward(student, suffix[:, :-1], cache=cache, states=states).logits
    else:
        whole = torch.cat((question, suffix), 1)[:, :-1]
        logits = ZeroModel.forward(student, whole, states=states).logits[:, question.shape[1] :]
        states = [state[:, question.shape[1] :] for state in states]
    return F.cross_entropy(logits[0], suffix[0, 1:], reduction="sum"), states


@contextmanager
def outputs(module: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """A module's outputs, call by call."""
    seen: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    yield seen
    handle.remove()


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_loss_does_not_depend_on_the_batch(kind):
    """Whatever the rows, their order, neighbours and padding: the sums equal those of single documents."""
    student, tolerance = model(kind, "kava", {"latent_weight": 0.1}), 1e-5 if kind == "experts" else 1e-9
    together = sums(student, [DOCUMENTS[:2], DOCUMENTS[2:]])
    mixed = sums(student, [[], [DOCUMENTS[4], DOCUMENTS[0], DOCUMENTS[3]], DOCUMENTS[1:3]], 120)
    alone = [sums(student, [[document]], len(document.tokens) + i) for i, document in enumerate(DOCUMENTS)]
    for name in ("cross_entropy", "teacher", "hidden", "kv", "latent"):
        expected = sum(part[name] for part in alone)
        assert expected > 0
        assert together[name].item() == pytest.approx(expected.item(), rel=tolerance), name
        assert mixed[name].item() == pytest.approx(expected.item(), rel=tolerance), name


@pytest.mark.parametrize("kind", ["latent attention", "grouped queries", "block loop"])
def test_passes_equal_those_of_single_documents(kind):
    """CE of teacher and student, and CODI's loss over the states of all runs of all layers."""
    student = model(kind, "codi")
    runs = 4 if kind == "block loop" else 2
    expected = {"cross_entropy": 0.0, "teacher": 0.0, "hidden": 0.0}
    for document in DOCUMENTS:
        states: list[torch.Tensor] = []
        logits = ZeroModel.forward(student, ids(document.tokens), states=states).logits[0]
        first = len(document.question) + 1
        target = torch.tensor(document.tokens[first + 1 :])
        expected["teacher"] += F.cross_entropy(logits[first:-1], target, reduction="sum").item()
        ce, own = answered(student, document, 4, [])
        expected["cross_entropy"] += ce.item()
        place = first + len(document.trace) + 1 + len(PREFIX)
        assert document.tokens[place : place + 2] == [PREFIX[-1], document.value[0]]
        assert len(states) == len(own) == runs
        theirs, ours = [s[:, place] for s in states], [s[:, len(PREFIX)] for s in own]
        expected["hidden"] += hidden_loss(ours, theirs, student.config.distillation).item()
    found = sums(student, [DOCUMENTS[:3], DOCUMENTS[3:]])
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("policy", ["rkv", "uniform"])
def test_keys_and_values_are_taken_before_rotation(policy):
    """Of grouped queries they are what the projections give, which hooks see, of the last iteration and of
    the trace: its every token where there are latents enough, evenly spaced ones otherwise.
    """
    M = 40 if policy == "rkv" else 3
    changes = {"kv_policy": policy, "hidden_weight": 0.0}
    student = model("grouped queries", "kava", changes, {"num_latents": M})
    expected = 0.0
    for document in DOCUMENTS:
        ours, theirs = [], []
        for layer in student.model.layers:
            attention = layer.self_attn
            with outputs(attention.k_norm) as keys, outputs(attention.v_proj) as values:
                think(student, ids([BOS], document.question, [BOT]))
                ours.append((keys[-1], values[-1].unflatten(-1, (2, -1))))
                ZeroModel.forward(student, ids(document.tokens))
                first, C = len(document.question) + 2, len(document.trace)
                kept = [i for i in range(C) if (i + 1) * M // C > i * M // C] if C > M else list(range(C))
                places = [first + i for i in kept]
                theirs.append((keys[-1][:, places], values[-1].unflatten(-1, (2, -1))[:, places]))
        n = len(kept)
        assert (n < M) == (policy == "rkv" or C < M)
        pairs = [(k[:, :n], v[:, :n]) for k, v in ours]
        real = [torch.ones(1, n, dtype=torch.bool)] * len(pairs)
        expected += kv_loss(pairs, theirs, real, student.config.distillation).item()
    assert sums(student, [DOCUMENTS])["kv"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["latent attention", "grouped queries"])
def test_the_teacher_gets_no_gradient_from_distillation(kind):
    """Only the teacher reads the traces' tokens: their embeddings get no gradient."""
    student = model(kind, "kava")
    found = sums(student, [DOCUMENTS])
    (found["hidden"] + found["kv"] + found["cross_entropy"]).backward(retain_graph=True)
    gradient = student.model.embed_tokens.weight.grad
    used = sorted({token for d in DOCUMENTS for token in d.trace} - {STEP})
    assert min(used) >= TRACE
    assert not gradient[used].any()
    assert gradient[sorted({token for d in DOCUMENTS for token in d.question})].all()
    found["teacher"].backward()
    assert student.model.embed_tokens.weight.grad[used].any(1).all()


def test_cot_equals_the_plain_model():
    student = model("experts", "cot")
    batch = packed([DOCUMENTS[:3], DOCUMENTS[3:]], 160)
    plain = ZeroModel(student.config, seed=1).train()
    expected, found = plain(**batch), student(**batch)
    assert found.loss_sums.keys() == expected.loss_sums.keys() | {"cross_entropy", "balance", "router_z"}
    assert found.loss.item() == expected.loss.item()


def test_no_cot_answers_at_once():
    student = model("latent attention", "no_cot")
    expected = sum(answered(student, document, 0, [])[0].item() for document in DOCUMENTS)
    found = sums(student, [DOCUMENTS])
    assert found["cross_entropy"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("step", [0, 3, 7])
def test_coconut_writes_the_rest_of_the_trace(step):
    student = model("latent attention", "coconut", {"stage_steps": 3})
    student.training_step = step
    latents, dropped = {0: (2, 1), 3: (4, 2), 7: (4, 99)}[step]
    expected = 0.0
    for document in DOCUMENTS:
        rest = Document([], document.steps[dropped:], []).trace
        expected += answered(student, document, latents, rest)[0].item()
    batch = packed([DOCUMENTS], 200)
    assert student(**batch).loss_sums["cross_entropy"].item() == pytest.approx(expected, rel=1e-6)
    assert student.starts_stage == (step == 3)
    counts = loss_counts(student.config, step, batch["tokens"], batch["targets"], batch["cu_seqlens"])
    rests = [Document([], d.steps[dropped:], []).trace for d in DOCUMENTS]
    assert counts["targets"] == sum(len(r) + len(d.answer) for r, d in zip(rests, DOCUMENTS, strict=True))


def test_lotus_teaches_every_latent_its_token():
    student = model("latent attention", "lotus")
    expected = 0.0
    for document in DOCUMENTS:
        gold = [(step + [-1, -1])[:2] for step in document.steps]
        gold = [token for step in gold for token in step][:4]
        hidden = think(student, ids([BOS], document.question, [BOT])).hidden[0, : len(gold)]
        loss = F.cross_entropy(
            hidden @ student.lm_head.weight.T, torch.tensor(gold), ignore_index=-1, reduction="mean"
        )
        expected += loss.item()
    assert sums(student, [DOCUMENTS])["latent"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_trains(method):
    """The terms are those of the table, every weight gets a gradient, and so it does from a batch without
    documents; in eval mode the loss of the answers alone is formed.
    """
    student = model("latent attention", method, {"stage_steps": 1} if method == "coconut" else None)
    for rows in ([DOCUMENTS], [[]]):
        student.zero_grad()
        output = student(**packed(rows, 200))
        assert {term.name for term in loss_terms(student.config)} <= output.loss_sums.keys()
        output.loss.backward()
        missing = {name for name, p in student.named_parameters() if p.grad is None}
        assert not missing
    found = sums(student, [DOCUMENTS], 200)["cross_entropy"].item()
    with torch.no_grad():
        assert sums(student.eval(), [DOCUMENTS], 200)["cross_entropy"].item() == pytest.approx(found)


def test_random_eviction_depends_only_on_the_step():
    student = model("grouped queries", "random_eviction")
    first = sums(student, [DOCUMENTS])["kv"].item()
    assert sums(student, [DOCUMENTS])["kv"].item() == first
    student.training_step = 1
    assert sums(student, [DOCUMENTS])["kv"].item() != pytest.approx(first, rel=1e-6)


def test_parts_of_a_batch_add_up_to_its_loss():
    """As for ranks and micro-batches, with the whole batch's counts; gradients too."""
    student = model("latent attention", "kava")
    batch = packed([DOCUMENTS[:2], DOCUMENTS[2:]], 160)
    whole = student(**batch)
    whole.loss.backward()
    gradients = [copy.deepcopy(p.grad) for p in student.parameters()]
    student.zero_grad()
    counts = loss_counts(student.config, 0, batch["tokens"], batch["targets"], batch["cu_seqlens"])
    for row in range(2):
        part = student(**{name: value[row : row + 1] for name, value in batch.items()})
        total_loss(student.config, part.loss_sums, {**counts, "rows": 2}).backward()
    for expected, parameter in zip(gradients, student.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("checkpointing", ["block", "selective", "iteration"])
def test_recomputing_activations_changes_nothing(checkpointing):
    """The student's keys and values pass through the cache, not through a layer's output."""
    gradients = []
    for execution in (ExecutionConfig(), ExecutionConfig(checkpointing=checkpointing)):
        student = Student(model("block loop", "kava").config, seed=1, execution=execution).double().train()
        student(**packed([DOCUMENTS], 160)).loss.backward()
        gradients.append([p.grad for p in student.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-9, atol=1e-12)


def test_given_keys_override_the_published_ones():
    given = {"latent_cot": {"num_latents": 5}, "distillation": {"method": "codi", "published": "llama-1b"}}
    values = with_method(given)
    assert values["latent_cot"] == {"num_latents": 5, "feedback": "sequential", "projection": "mlp"}
    assert values["distillation"]["hidden_weight"] == 20.0
    given["distillation"]["hidden_weight"] = 3.0
    assert with_method(given)["distillation"]["hidden_weight"] == 3.0


def compare(folder: Path, config: ModelConfig) -> None:
    fit(*find(folder, folder), config, InitConfig(), 1, Student, NEW)


def test_the_export_is_a_plain_model(tmp_path):
    """It scores tokens like any model, and only a model of the same sizes can start from it."""
    student = model("latent attention", "kava").float()
    student.save_pretrained(tmp_path)
    batch = packed([DOCUMENTS], 160)
    plain = load_pretrained(tmp_path)(**batch)
    assert plain.loss_sums.keys() == {"cross_entropy"}
    compare(tmp_path, student.config)
    without = model("latent attention", "cot").float()
    without.save_pretrained(tmp_path)
    compare(tmp_path, student.config)  # the new parameters start from their seed
    for config, name in (
        (dataclasses.replace(student.config, intermediate_size=50), "mlp.down_proj.weight"),
        (dataclasses.replace(student.config, num_hidden_layers=1), "model.layers.1"),
    ):
        with pytest.raises(ValueError, match=f"{name}.* leave the model's sizes to --init"):
            compare(tmp_path, config)


@pytest.mark.parametrize(
    ("kind", "method", "changes", "message"),
    [
        ("latent attention", "kava", {"kv_policy": "best"}, "kv_policy='best' is unknown; choose one of rkv"),
        ("latent attention", "no_cot", {"kv_weight": 1.0}, "needs latents; set model.latent_cot.num_latents"),
        ("experts", "no_cot", {}, "use_moe=true without a teacher's pass does not go with"),
        ("latent attention", "cot", {"hidden_weight": 1.0}, "needs a student, but student_pass=false"),
        ("latent attention", "coconut", {"stage_steps": 2, "latents_per_step": 3}, "is not a multiple of"),
        ("latent attention", "lotus", {"latent_block": 3}, "is not a multiple of"),
        ("latent attention", "kava", {"published": "gpt5"}, "choose one of gpt2, llama-1b"),
    ],
)
def test_invalid_combinations_are_refused(kind, method, changes, message):
    with pytest.raises(ValueError, match=message):
        model(kind, method, changes)
