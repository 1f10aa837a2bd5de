"""KaVa's optional maps of keys and values (use_projection): the loss, its gradients, and what is exported."""

import pytest
import torch
import torch.nn.functional as F

import distill.student as student_module
from distill.student import Student
from model import ZeroModel, load_pretrained
from model.export_files import TOKENIZER_NAME, TRAINING_ONLY
from model.latent_cot.modules import orthonormal_rows
from pretrain.export import export_run, write_export
from pretrain.parts import Part

from .test_run import distill, records
from .test_student import DOCUMENTS, KINDS, compare, model, sums
from .traces import STEP, packed

PROJECTED = {"use_projection": True}
FULL = {**PROJECTED, "use_layernorm": True, "prj_dim": 12}
WIDTHS = {"latent attention": (4 * 12, 4 * 8), "grouped queries": (2 * 8, 2 * 8)}


def with_random_maps(student: Student) -> Student:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in student.named_parameters():
        if name.startswith(TRAINING_ONLY):
            drawn = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data.copy_(drawn * 0.3 + ("norm.weight" in name))
    return student


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_maps_start_as_the_identity(kind):
    plain, mapped = (sums(model(kind, "kava", maps), [DOCUMENTS]) for maps in ({}, PROJECTED))
    assert plain.keys() == mapped.keys()
    for name, value in plain.items():
        assert mapped[name].item() == pytest.approx(value.item(), rel=1e-5 if kind == "experts" else 1e-12)


@pytest.mark.parametrize("kind", list(WIDTHS))
@pytest.mark.parametrize("maps", [PROJECTED, FULL, {**PROJECTED, "kv_distance": "mse"}])
def test_the_loss_equals_plain_torch(kind, maps, monkeypatch):
    """The keys and values that KaVa compares without maps, mapped and compared document by document."""
    compared = []
    monkeypatch.setattr(
        student_module, "kv_loss", lambda *given: compared.append(given[:3]) or torch.zeros(1)
    )
    sums(model(kind, "kava"), [DOCUMENTS])
    monkeypatch.undo()
    student = with_random_maps(model(kind, "kava", maps))
    ((ours, theirs, real),) = compared
    width, distance = maps.get("prj_dim"), F.mse_loss if "kv_distance" in maps else F.smooth_l1_loss
    expected = 0.0
    for layer, (own, other, kept) in enumerate(zip(ours, theirs, real, strict=True)):
        for side, name in enumerate(("k_proj", "v_proj")):
            weights = dict(student.kv_projections[layer].get_submodule(name).named_parameters())
            x, y = own[side].flatten(2), other[side].flatten(2)
            assert x.shape[2] == WIDTHS[kind][side]
            if width is not None:
                rows = orthonormal_rows(width, x.shape[2], 2 * layer + side).double()
                mapped, y = x @ rows.T, y @ rows.T
            else:
                mapped = x
            mapped = mapped + F.linear(x, weights["linear.weight"], weights["linear.bias"])
            if "norm.weight" in weights:
                mapped = F.layer_norm(mapped, mapped.shape[2:], weights["norm.weight"], weights["norm.bias"])
            for n, mask in enumerate(kept):
                loss, std = distance(mapped[n][mask], y[n][mask]), y[n][mask].std()
                expected += (loss / (std**2 if "kv_distance" in maps else std) / 2 / len(ours)).item()
    assert sums(student, [DOCUMENTS])["kv"].item() == pytest.approx(expected, rel=1e-6)


def test_fewer_numbers_are_an_orthonormal_part():
    rows = orthonormal_rows(5, 40, 7)
    torch.testing.assert_close(rows @ rows.T, torch.eye(5))
    assert torch.equal(rows, orthonormal_rows(5, 40, 7))
    assert not torch.equal(rows, orthonormal_rows(5, 40, 8))


@pytest.mark.parametrize("maps", [PROJECTED, FULL])
def test_gradients_reach_maps_and_student_but_not_the_teacher(maps):
    student = with_random_maps(model("latent attention", "kava", {**maps, "hidden_weight": 0.0}))
    sums(student, [DOCUMENTS])["kv"].backward()
    gradient = student.model.embed_tokens.weight.grad
    used = sorted({token for d in DOCUMENTS for token in d.trace} - {STEP})
    assert not gradient[used].any()
    assert gradient[sorted({token for d in DOCUMENTS for token in d.question})].all()
    learned = {name: p.grad for name, p in student.named_parameters() if name.startswith(TRAINING_ONLY)}
    assert len(learned) == 2 * 2 * (4 if "use_layernorm" in maps else 2)
    assert all(grad.any() for grad in learned.values())


def test_a_batch_without_documents_gives_every_map_a_gradient():
    student = model("latent attention", "kava", FULL)
    student(**packed([[]], 200)).loss.backward()
    grads = {name: p.grad for name, p in student.named_parameters() if name.startswith(TRAINING_ONLY)}
    assert grads
    assert not any(grad.any() for grad in grads.values())


def test_exports_hold_no_maps_and_start_another_student(tmp_path):
    student = with_random_maps(model("grouped queries", "kava", FULL)).float()
    (tmp_path / TOKENIZER_NAME).write_bytes(b"")
    weights = [Part(*item) for item in student.state_dict().items()]
    write_export(tmp_path / "export", student.config, weights, tmp_path)
    exported = load_pretrained(tmp_path / "export")
    assert exported.config == student.config
    batch = packed([DOCUMENTS], 160)
    expected = ZeroModel.forward(student.eval(), **batch).loss
    assert torch.equal(exported(**batch).loss, expected)
    (tmp_path / "export" / TOKENIZER_NAME).unlink()
    compare(tmp_path / "export", student.config)  # the maps start anew


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_layernorm": True}, "use_layernorm=True belongs to use_projection=true"),
        ({"prj_dim": 4}, "prj_dim=4 belongs to use_projection=true"),
        ({**PROJECTED, "kv_weight": 0.0}, "use_projection=true maps keys and values that kv_weight=0"),
        ({**PROJECTED, "prj_dim": 33}, "prj_dim=33 exceeds the 48 .* keys or the 32 .* set it to 32 or less"),
        ({**PROJECTED, "prj_dim": 0}, "prj_dim=0 "),
    ],
)
def test_maps_without_use_are_refused(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        model("latent attention", "kava", changes)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_resumed_run_continues_exactly(launch, traced_data, tmp_path):
    """Two ranks: 4 steps at once, and 2 steps twice; checkpoints hold the maps, exports do not."""
    maps = [f"model.distillation.{key}={str(value).lower()}" for key, value in FULL.items()]
    common = [*maps, "model.distillation.method=kava", "save_every=2", "eval_every=4"]
    for run, limits in (("whole", ["4"]), ("parts", ["2", "4"])):
        for limit in limits:
            # The schedule must not depend on where the run stops.
            options = [*common, f"max_steps={limit}", "optimizer.schedule=constant"]
            distill(launch, 2, traced_data, tmp_path / run, *options)
    whole, parts = (records(tmp_path / run) for run in ("whole", "parts"))
    assert [record["step"] for record in parts] == [1, 2, 3, 4]
    for ours, theirs in zip(parts, whole, strict=True):
        assert [ours[name] for name in ("loss", "loss_kv", "grad_norm")] == [
            theirs[name] for name in ("loss", "loss_kv", "grad_norm")
        ]
    exports = [load_pretrained(tmp_path / run / "export").state_dict() for run in ("whole", "parts")]
    assert not [name for name in exports[0] if name.startswith(TRAINING_ONLY)]
    assert all(torch.equal(value, exports[1][name]) for name, value in exports[0].items())
    export_run(tmp_path / "parts", None, tmp_path / "again")
    again = load_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in exports[0].items())
