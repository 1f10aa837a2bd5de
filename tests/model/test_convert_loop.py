"""Loops and units in trained networks: the original at the start, and the loop that they say they are."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model import ModelConfig, ZeroModel, load_pretrained
from model.cache import LatentCache
from model.convert.__main__ import main
from model.convert.loop import block_loop, keep_layers, kept_layers, looped
from model.convert.unit import with_units
from model.counts import num_parameters
from model.hf.deepseek import import_folder

from .conftest import SMALL, VARIANTS
from .hf_folders import gpt2_folder, llama_folder
from .loops import CACHES

KINDS = ("deepseek", "gpt2", "llama", "qwen2", "converted", "multi_token")
LOOPS = [(injection, update) for injection in ("none", "concat", "gate") for update in ("retrofit", "simple")]
KNOWN = 300  # tokens in every imported vocabulary; some of those after them are replaced
HALTING = ("fixed", "act", "ponder", "entropy", "threshold")


@pytest.fixture(scope="module", params=KINDS)
def original(request) -> ZeroModel:
    """With four layers, so that prelude and coda differ from the core."""
    sizes = {**SMALL, **VARIANTS[request.param], "num_hidden_layers": 4}
    return ZeroModel(ModelConfig.from_dict(sizes)).eval()


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory) -> Callable[..., tuple[nn.Module, Path]]:
    """transformers' model of four layers, and our import of it."""
    made: dict[str, tuple[nn.Module, Path]] = {}

    def make(kind: str) -> tuple[nn.Module, Path]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            layers = {"n_layer": 4} if kind == "gpt2" else {"num_hidden_layers": 4}
            theirs = (gpt2_folder if kind == "gpt2" else llama_folder)(folder / "hf", **layers)
            import_folder(folder / "hf", folder / "import")
            made[kind] = theirs, folder / "import"
        return made[kind]

    return make


def built(config: ModelConfig, state: dict[str, Tensor]) -> ZeroModel:
    model = ZeroModel(config)
    model.load_state_dict(state)
    return model.eval()


def with_loop(original: ZeroModel, *loop: Any) -> ZeroModel:
    return built(*looped(original.config, original.state_dict(), block_loop(*loop)))


def padded(tokens: Tensor) -> Tensor:
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    return mask


def in_two_passes(model: ZeroModel, tokens: Tensor, mask: Tensor, **options: Any) -> Tensor:
    """Logits of a prefill and of two decoding steps."""
    cache, found = LatentCache(), []
    for first, last in ((0, 15), (15, 16), (16, 17)):
        out = model(tokens[:, first:last], mask[:, :last], cache=cache, **options)
        found.append(out.logits)
    return torch.cat(found, 1)


def small_error(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item()))


@torch.no_grad()
def test_one_step_is_the_original(original, tokens):
    """With padding, whole rows and decoding; more steps are not. Bit for bit, where nothing is injected: what
    is has the same values, but another layout in memory, in which later sums are rounded otherwise.
    """
    mask = padded(tokens)
    whole, decoded = original(tokens, mask).logits, in_two_passes(original, tokens, mask)
    kinds = [("none", "retrofit", halting) for halting in HALTING]
    kinds += [(*loop, HALTING[number % 5]) for number, loop in enumerate(LOOPS)]
    for injection, update, halting in kinds:
        model = with_loop(original, [[1, 2]], 3, injection, update, halting)
        equal = torch.equal if injection == "none" else small_error
        assert equal(model(tokens, mask, num_steps=1).logits, whole)
        assert equal(in_two_passes(model, tokens, mask, num_steps=1), decoded)
        assert halting == "threshold" or not small_error(model(tokens, mask).logits, whole)


@torch.no_grad()
def test_one_step_is_the_original_with_every_cache(original, tokens):
    mask = padded(tokens)
    whole, decoded = original(tokens, mask).logits, in_two_passes(original, tokens, mask)
    for cache in CACHES:
        loop = block_loop([[0, 0], [2, 3]], 3, "none", "retrofit", "fixed")
        loop = dataclasses.replace(loop, cache=cache)
        model = built(*looped(original.config, original.state_dict(), loop))
        assert small_error(model(tokens, mask, num_steps=1).logits, whole)
        assert small_error(in_two_passes(model, tokens, mask, num_steps=1), decoded)


def layers_of(
    theirs: Any, kind: str
) -> tuple[list[Callable[[Tensor], Tensor]], Tensor, Callable[..., Tensor]]:
    """transformers' layers as functions of the state, embedded tokens' function and head."""
    if kind == "gpt2":
        body = theirs.transformer
        layers = [lambda x, block=block: block(x) for block in body.h]
        return layers, lambda t: body.wte(t) + body.wpe(torch.arange(t.shape[1])), lambda x: body.ln_f(x)
    body = theirs.model

    def run(layer: Any) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            places = torch.arange(x.shape[1])[None]
            return layer(x, position_embeddings=body.rotary_emb(x, places))

        return call

    return [run(layer) for layer in body.layers], body.embed_tokens, body.norm


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("injection", "update"), LOOPS)
def test_more_steps_equal_unrolled_layers_of_transformers(hugging_face, kind, injection, update):
    """With weights of gate and injection that are not the initial ones, so that each of them matters."""
    theirs, folder = hugging_face(kind)
    model = with_loop(load_pretrained(folder), [[1, 2]], 3, injection, update, "fixed")
    generator = torch.Generator().manual_seed(3)
    for parameter in model.model.recurrence.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    unit = model.model.recurrence[0]
    tokens = torch.randint(KNOWN, (2, 19), generator=generator)
    layers, embed, norm = layers_of(theirs, kind)
    start = layers[0](embed(tokens))
    state = start
    for step in range(3):
        both = torch.cat((state, start), -1)
        if injection == "none":
            x = state
        elif injection == "concat":
            x = both @ unit.injection.weight.T
        else:
            share = torch.sigmoid(both @ unit.injection.weight.T + unit.injection.bias)
            x = share * start + (1 - share) * state
        new = layers[2](layers[1](x))
        if update == "retrofit" and step:
            opening = torch.cat((state, new), -1) @ unit.gate.weight.T + unit.gate.bias
            new = state + torch.sigmoid(opening) * (new - state)
        state = new
    expected = theirs.lm_head(norm(layers[3](state)))
    assert small_error(model(tokens).logits[..., :KNOWN], expected[..., :KNOWN])


@torch.no_grad()
def test_dropped_layers(hugging_face):
    theirs, folder = hugging_face("llama")
    original = load_pretrained(folder)
    kept = kept_layers(4, [[1, 1]], 1, 1)
    assert kept == [0, 1, 3]
    config, state = keep_layers(original.config, original.state_dict(), kept)
    model = built(*looped(config, state, block_loop([[1, 1]], 2, "none", "retrofit", "fixed")))
    layers, embed, norm = layers_of(theirs, "llama")
    tokens = torch.arange(20, 40)[None]
    expected = theirs.lm_head(norm(layers[3](layers[1](layers[0](embed(tokens))))))
    assert small_error(model(tokens, num_steps=1).logits[..., :KNOWN], expected[..., :KNOWN])


@pytest.mark.parametrize(("first_k", "kept", "dense"), [(2, [0, 2, 3], 1), (1, [0, 2, 3], 1), (9, [1, 2], 7)])
def test_dropped_layers_keep_their_kind(first_k, kept, dense):
    """first_k_dense_replace=9 also makes the module of multi-token prediction dense."""
    sizes = {**SMALL, "num_hidden_layers": 4, "first_k_dense_replace": first_k, "num_nextn_predict_layers": 1}
    model = ZeroModel(ModelConfig.from_dict(sizes))
    config, state = keep_layers(model.config, model.state_dict(), kept)
    assert config.first_k_dense_replace == dense
    built(config, state)


@pytest.fixture(scope="module")
def units() -> Callable[..., tuple[ZeroModel, ZeroModel]]:
    def make(variant: str, placement: str, halting: str) -> tuple[ZeroModel, ZeroModel]:
        original = ZeroModel(ModelConfig.from_dict({**SMALL, **VARIANTS[variant]})).eval()
        config, state = with_units(original.config, original.state_dict(), placement, [[0, 1]], 3, halting)
        return original, built(config, state)

    return make


UNITS = [(kind, "post_attention") for kind in KINDS] + [("deepseek", "kv"), ("converted", "kv")]


@torch.no_grad()
@pytest.mark.parametrize(("variant", "placement"), UNITS)
def test_units_start_as_the_identity(units, variant, placement, tokens):
    mask = padded(tokens)
    for halting in HALTING:
        original, model = units(variant, placement, halting)
        whole, decoded = original(tokens, mask).logits, in_two_passes(original, tokens, mask)
        for steps in (1, 4):
            assert small_error(model(tokens, mask, num_steps=steps).logits, whole)
            assert small_error(in_two_passes(model, tokens, mask, num_steps=steps), decoded)


def with_gradient(parameters: dict[str, nn.Parameter]) -> set[str]:
    return {name for name, p in parameters.items() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("halting", ["fixed", "ponder"])
@pytest.mark.parametrize(("variant", "placement"), [("converted", "kv"), ("llama", "post_attention")])
def test_every_new_weight_of_a_unit_learns(units, variant, placement, halting, tokens):
    """At first the core's last projection, which is 0; from the second step on everything behind it."""
    original, model = units(variant, placement, halting)
    fresh = {name: p for name, p in model.train().named_parameters() if name not in original.state_dict()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    moved = []
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens[:, :-1], targets=tokens[:, 1:]).loss.backward()
        moved.append(with_gradient(fresh))
        optimizer.step()
    heads = {name for name in fresh if ".halting." in name}
    assert moved[0] >= {name for name in fresh if ".down_proj." in name} | heads
    assert not any(".gate_proj." in name or ".norm." in name for name in moved[0])
    assert moved[1] == set(fresh)


@pytest.mark.parametrize("injection", ["none", "concat", "gate"])
def test_every_new_weight_of_a_loop_learns(injection, tokens):
    """At once: the gate and the injection of later steps read states that differ."""
    original = ZeroModel(ModelConfig.from_dict({**SMALL, **VARIANTS["llama"]}))
    model = with_loop(original, [[1, 1]], 3, injection, "retrofit", "ponder").train()
    model(tokens[:, :-1], targets=tokens[:, 1:]).loss.backward()
    fresh = dict(model.model.recurrence.named_parameters())
    assert with_gradient(fresh) == set(fresh)


def test_new_weights_are_those_of_a_model_built_from_the_config(original):
    """So that a loop added by pretrain's init.missing=allow starts as one added by the command."""
    for halting in ("fixed", "ponder"):
        loop = block_loop([[1, 2]], 2, "gate", "retrofit", halting)
        config, state = looped(original.config, original.state_dict(), loop)
        fresh = ZeroModel(config)
        assert num_parameters(config) == sum(p.numel() for p in fresh.parameters())
        for name, value in fresh.state_dict().items():
            assert torch.equal(state[name], original.state_dict().get(name, value)), name


TEXT = " ".join(f"{i} apples and {i + 1} eats each day" for i in range(300))


def command(*arguments: str) -> None:
    main([*map(str, arguments)])


def test_the_command_writes_an_export(hugging_face, tmp_path, capsys):
    """Two conversions one after the other, with perplexity: the second leaves the logits as they were."""
    _, folder = hugging_face("llama")
    (tmp_path / "text").write_text(TEXT)
    measure = ("--text", tmp_path / "text", "--evaluation_tokens", 1024)
    loop, moe = tmp_path / "loop", tmp_path / "moe"
    command("loop", "--checkpoint", folder, "--out", loop, "--core", "1-2", "--num_steps", 2, *measure)
    mixture = ("--n_routed_experts", 3, "--num_experts_per_tok", 2)
    command("moe", "--checkpoint", loop, "--out", moe, *mixture, *measure)
    first, second = json.loads((moe / "conversion.json").read_text())["conversions"]
    assert (first["command"], second["command"]) == ("loop", "moe")
    assert (first["num_steps"], second["n_routed_experts"]) == (2, 3)
    assert (first["source"], first["text"]) == (str(folder), "text")
    before, after = first["perplexity_before"], first["perplexity_after"]
    assert before["tokens"] == 1024
    assert set(after) == {"1", "2", "4"}
    assert after["1"] == before
    assert after["2"]["perplexity"] != before["perplexity"]
    started, mixed = (second[f"perplexity_{when}"]["perplexity"] for when in ("before", "after"))
    assert started == after["2"]["perplexity"]
    assert mixed == pytest.approx(started, rel=1e-4)
    assert "with num_steps=4" in capsys.readouterr().out
    tokens = torch.arange(20, 60)[None]
    with torch.no_grad():
        expected = load_pretrained(folder)(tokens).logits
        assert small_error(load_pretrained(moe)(tokens, num_steps=1).logits, expected)


REFUSED = {
    "core beyond the layers": (("loop", "--core", "3-4", "--num_steps", 2), "--core 3-4 .* 0..3 "),
    "core twice": (("loop", "--core", "1-2,2", "--num_steps", 2), "rise and lie apart"),
    "core backwards": (("loop", "--core", "2-1", "--num_steps", 2), "rise and lie apart"),
    "core in words": (("loop", "--core", "all", "--num_steps", 2), "write e.g. 11-18"),
    "core of other digits": (("loop", "--core", "\u0662", "--num_steps", 2), "write e.g. 11-18"),
    "prelude too long": (("loop", "--core", "1-2", "--prelude", 2, "--num_steps", 2), "--prelude 2 .* 0..1,"),
    "coda below 0": (
        ("loop", "--core", "1-2", "--coda", -1, "--num_steps", 2),
        "--coda -1 must lie in 0..1,",
    ),
    "too many steps": (("loop", "--core", "1-2", "--num_steps", 10_001), "num_steps=10001 .* 10,000"),
    "no step": (("loop", "--core", "1-2", "--num_steps", 0), "num_steps=0 must be at least 1"),
    "units beyond the layers": (
        ("unit", "--placement", "post_attention", "--layers", "4", "--num_steps", 2),
        "--layers 4 .* 0..3 ",
    ),
    "no latent": (("unit", "--placement", "kv", "--num_steps", 2), "convert mla first"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_one_line(hugging_face, tmp_path, capsys, case):
    (name, *options), message = REFUSED[case]
    _, folder = hugging_face("llama")
    capsys.readouterr()  # of the first test that makes the folder
    with pytest.raises(SystemExit) as ended:
        command(name, "--checkpoint", folder, "--out", tmp_path / "out", *options)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert len(error.splitlines()) == 1
    assert re.search(message, error), error
    assert not list((tmp_path / "out").glob("*.json"))


def test_models_that_have_a_loop_or_are_a_baseline_are_refused():
    for variant, message in (
        ("loop", "already has a loop"),
        ("pause", "separate baseline"),
        ("memory", "separate"),
    ):
        model = ZeroModel(ModelConfig.from_dict({**SMALL, **VARIANTS[variant]}))
        with pytest.raises(ValueError, match=message):
            with_units(model.config, model.state_dict(), "post_attention", None, 2)
