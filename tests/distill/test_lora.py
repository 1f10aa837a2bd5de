"""Adapted models against plain torch and against the merged model that is exported."""

import importlib.util
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F

from model import ModelConfig, ZeroModel
from model.cache import LatentCache
from model.config.execution import ExecutionConfig
from model.export_files import save_weights
from model.latent_cot.thoughts import generate_with_thoughts, think
from model.layers import Linear, whole_weight
from pretrain.config import InitConfig, LoraConfig
from pretrain.init import Start, find, fit, save_base
from pretrain.lora import adapt, identity, merged
from pretrain.parts import Part
from pretrain.run_config import load_run_config

from ..model.conftest import SMALL
from ..model.thoughts import EOT, KINDS, C, questions
from .test_student import DOCUMENTS, sums
from .test_student import model as student

Model = TypeVar("Model", bound=ZeroModel)

CONFIG = LoraConfig(r=3, alpha=6, dropout=0.0)


def model(kind: str, config: LoraConfig | None, checkpointing: str = "none") -> ZeroModel:
    """Adapters, if any, have non-zero weights."""
    values = {**SMALL, **KINDS[kind], "latent_cot": {"num_latents": C, "num_iterations": 2}}
    execution = ExecutionConfig(checkpointing=checkpointing)
    built = ZeroModel(ModelConfig.from_dict(values), seed=3, execution=execution)
    return built if config is None else with_adapters(built, config)


def with_adapters(plain: Model, config: LoraConfig) -> Model:
    adapt(plain, config, seed=4, new=thoughts(plain))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return plain


def thoughts(model: torch.nn.Module) -> set[str]:
    """Names of the parameters that are trained in full."""
    return {name for name, _ in model.named_parameters() if name.startswith("latent_thoughts.")}


def started_from(model: ZeroModel, folder: Path) -> Start:
    save_weights(folder / "start", model.config, dict(model.state_dict()))
    return fit(*find(folder / "start", folder), model.config, InitConfig())


def exported(start: ZeroModel, adapted: ZeroModel, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of its export, in fp32."""
    base = started_from(start, folder)
    save_base(folder, base)
    trained = [Part(name, p.detach()) for name, p in adapted.named_parameters() if p.requires_grad]
    adapters = identity(CONFIG, base.source.sha256)
    return {part.name: part.value for part in merged(folder, trained, adapters)}


def outputs(m: ZeroModel) -> dict[str, torch.Tensor]:
    """Outputs of everything that reads weights: a pass, one token by token with a cache, thoughts, R-KV."""
    tokens = questions()
    cache = LatentCache()
    found = {"logits": m(tokens).logits}
    with torch.enable_grad():  # takes other paths through the layers
        found["trained logits"] = m(tokens).logits.detach()
    parts = [m(tokens[:, i : i + 1], cache=cache).logits for i in range(tokens.shape[1])]
    found["decoded"] = torch.cat(parts, 1)
    thoughts = think(m, tokens)
    found["thoughts"] = thoughts.hidden
    found["after thoughts"] = m(torch.full((3, 1), EOT), cache=thoughts.cache).logits
    found["answers"], _ = generate_with_thoughts(m, tokens, EOT, 4)
    if not m.config.recurrence.position_mixing:  # incompatible with R-KV
        found["compressed"] = m.generate(tokens[:, :3], 24, kv_budget=9, kv_buffer=3)
    return found


@pytest.mark.parametrize("kind", ["latent_moe", "plain", "block", "kv", "post_attention"])
@torch.no_grad()
def test_the_adapted_model_equals_the_merged_one(kind, tmp_path):
    adapted, plain = model(kind, CONFIG), model(kind, None)
    merged_weights = exported(plain, adapted, tmp_path)
    before = outputs(plain.double().eval())
    plain.load_state_dict(merged_weights)  # the names are a plain model's
    ours, theirs = outputs(adapted.double().eval()), outputs(plain.double().eval())
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5, msg=name)
    assert (ours["logits"] - before["logits"]).abs().max() > 1e-2
    assert (ours["thoughts"] - before["thoughts"]).abs().max() > 1e-2


@pytest.mark.parametrize("method", ["kava", "codi", "lotus"])
@pytest.mark.parametrize("kind", ["latent attention", "grouped queries"])
def test_the_adapted_student_learns_as_the_merged_one(kind, method, tmp_path):
    """Every loss, including the keys and values read outside the layers."""
    start, plain = student(kind, method).float(), student(kind, method)
    adapted = with_adapters(student(kind, method).float(), CONFIG)
    plain.load_state_dict(exported(start, adapted, tmp_path))
    rows = [DOCUMENTS[:2], DOCUMENTS[2:]]
    ours, theirs, before = (sums(m.double(), rows) for m in (adapted, plain, start))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5, msg=name)
    changed = [name for name in ours if abs(ours[name] - before[name]) > 1e-3]
    assert len(changed) == {"kava": 4, "codi": 3, "lotus": 2}[method]


def test_an_adapted_layer_follows_the_formula():
    torch.manual_seed(0)
    holder = torch.nn.Sequential(Linear(6, 5))
    weight, bias = holder[0].weight.clone(), holder[0].bias.clone().normal_()
    holder[0].bias.data.copy_(bias)
    adapt(holder, LoraConfig(r=2, alpha=5, dropout=0.5), seed=1, new=())
    layer = holder[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (A.shape, B.shape) == ((2, 6), (5, 2))
    assert not B.any()
    assert A.abs().max() <= 6**-0.5
    B.data.normal_()
    x = torch.randn(4, 6)
    torch.manual_seed(7)
    ours = holder.train()(x)
    torch.manual_seed(7)
    theirs = x @ weight.T + bias + 2.5 * F.dropout(x, 0.5) @ A.T @ B.T
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(whole_weight(layer), weight + 2.5 * B @ A)
    assert not torch.equal(ours, holder.eval()(x))


def test_what_is_trained():
    """Adapters of all linears but router and routed experts, and latent thoughts; the rest is as before."""
    adapted, plain = model("latent_moe", CONFIG), model("latent_moe", None)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    inner = {name for name, m in plain.named_modules() if isinstance(m, torch.nn.Linear)}
    inner = {name for name in inner if not name.startswith("latent_thoughts")}
    expected = {f"{name}.lora_{ab}.default.weight" for name in inner for ab in "AB"}
    expected |= {name for name, _ in plain.named_parameters() if name.startswith("latent_thoughts")}
    assert trained == expected
    assert not any(word in name for name in trained for word in (".gate.", ".experts.", "embed_", "lm_head"))
    assert any("shared_experts" in name for name in trained)
    start = dict(plain.named_parameters())
    for name, parameter in adapted.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, start[name.replace("base_layer.", "")]), name
    again = dict(model("latent_moe", CONFIG).named_parameters())
    assert all(torch.equal(p, again[name]) for name, p in adapted.named_parameters())


@pytest.mark.parametrize("policy", ["block", "selective"])
def test_recomputation_repeats_the_dropout(policy):
    gradients = []
    for kept in ("none", policy):
        m = model("plain", LoraConfig(r=3, alpha=6, dropout=0.5), kept).train()
        torch.manual_seed(0)
        tokens = questions()
        m(tokens, targets=tokens).loss.backward()
        gradients.append({name: p.grad for name, p in m.named_parameters() if p.requires_grad})
    for name in gradients[0]:
        if not name.startswith("latent_thoughts"):
            torch.testing.assert_close(gradients[0][name], gradients[1][name], msg=name)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.r=0"], "lora.r=0 must be at least 1"),
        (["lora.alpha=0"], "lora.alpha=0 must be at least 1"),
        (["lora.dropout=1"], "lora.dropout=1 must be at least 0 and below 1"),
        (["lora.rank=4"], "lora.rank is not a known key"),
        (["lora={}", "ep_size=2"], "set ep_size=1"),
        (["lora={}", "optimizer.kind=muon", "optimizer.clip=0"], "set it to adamw"),
    ],
)
def test_a_mistaken_config_is_one_line(overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        load_run_config("distill/configs/small.yaml", overrides)
    assert "\n" not in str(error.value)


def test_defaults_are_the_published_ones():
    config = load_run_config("distill/configs/small.yaml", ["lora={}"]).lora
    assert config == LoraConfig(r=128, alpha=32, dropout=0.1)
    assert load_run_config("distill/configs/small.yaml", []).lora is None


def test_lora_needs_weights_and_peft(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="with --init, or leave lora out"):
        identity(CONFIG, None)
    with pytest.raises(FileNotFoundError, match="copy --init's model.safetensors there"):
        list(merged(tmp_path, [], {"r": 4, "alpha": 4, "base": ""}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '.\[lora\]'"):
        identity(CONFIG, "0" * 64)


def test_the_base_is_a_copy_and_a_damaged_one_is_refused(tmp_path):
    start = model("plain", None)
    given, run = started_from(start, tmp_path), tmp_path / "run"
    run.mkdir()
    save_base(run, given)
    assert [path.name for path in run.iterdir()] == ["base.safetensors"]
    base = run / "base.safetensors"
    assert given.weights is not None
    assert base.read_bytes() == given.weights.read_bytes()
    adapters = identity(CONFIG, given.source.sha256)
    whole = {part.name: part.value for part in merged(run, [], adapters)}
    assert all(torch.equal(value, whole[name]) for name, value in start.state_dict().items())
    damaged = bytearray(base.read_bytes())
    damaged[-1] ^= 64  # a bit of a weight, which no header shows
    base.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"base\.safetensors is damaged: .* copy --init's model"):
        list(merged(run, [], adapters))
