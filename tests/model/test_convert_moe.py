"""Dense layers as mixtures of their copies: equal at the start, and every weight learns."""

import re

import pytest
import torch

from model import ModelConfig, ZeroModel, load_pretrained
from model.convert.loop import block_loop, looped
from model.convert.moe import upcycled
from model.convert.unit import with_units
from model.hf.deepseek import import_folder

from .conftest import SMALL, VARIANTS
from .hf_folders import llama_folder
from .test_convert_loop import KNOWN, built, in_two_passes, padded, small_error, with_gradient

SIZES = {"experts": (4, 2, 0, 0), "shared": (3, 2, 1, 1), "two_shared": (5, 4, 2, 0), "all": (3, 3, 3, 1)}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """transformers' model, and ours."""
    folder = tmp_path_factory.mktemp("llama")
    theirs = llama_folder(folder / "hf")
    import_folder(folder / "hf", folder / "import")
    return theirs, load_pretrained(folder / "import")


@torch.no_grad()
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_logits_equal_transformers_at_the_start(llama, sizes):
    """Whole rows and decoding, whichever experts the router chooses."""
    theirs, original = llama
    config, state = upcycled(original.config, original.state_dict(), *sizes)
    tokens = torch.randint(KNOWN, (3, 17), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits[..., :KNOWN]
    model, mask = built(config, state), torch.ones_like(tokens)
    assert small_error(model(tokens).logits[..., :KNOWN], expected)
    assert small_error(in_two_passes(model, tokens, mask)[..., :KNOWN], expected)
    for layer in model.moe_layers():
        layer.gate.weight += torch.randn(layer.gate.weight.shape, generator=torch.Generator().manual_seed(2))
        assert not layer.gate.e_score_correction_bias.any()
    assert small_error(model(tokens).logits[..., :KNOWN], expected)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_experts_and_router_learn(llama, sizes):
    """In the first step all copies that a token chose; once they differ, the router as well."""
    _, original = llama
    model = built(*upcycled(original.config, original.state_dict(), *sizes)).train()
    tokens = torch.randint(KNOWN, (4, 33), generator=torch.Generator().manual_seed(1))
    fresh = {n: p for n, p in model.named_parameters() if ".experts." in n or ".shared_experts." in n}
    routers = {n: p for n, p in model.named_parameters() if n.endswith("mlp.gate.weight")}
    assert routers
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens[:, :-1], targets=tokens[:, 1:]).loss_sums["cross_entropy"].backward()
        assert with_gradient(fresh) == set(fresh)
        largest = max(p.grad.abs().max() for p in routers.values())
        optimizer.step()
    assert largest > 1e-3  # of the second step: without auxiliary losses, only differing experts teach it


@torch.no_grad()
@pytest.mark.parametrize("step", ["loop", "kv", "post_attention"])
def test_mixtures_go_with_loops_and_units(step, tokens):
    """In either order; the model converted to latent attention, and one that also predicts further tokens."""
    for variant, further in (("converted", 0), ("latent_dense", 1)):
        sizes = {**SMALL, **VARIANTS[variant], "num_nextn_predict_layers": further}
        original = ZeroModel(ModelConfig.from_dict(sizes)).eval()

        def recurrent(config, state):
            if step == "loop":
                return looped(config, state, block_loop([[1, 1]], 3, "none", "retrofit", "fixed"))
            return with_units(config, state, step, [[1, 2]], 3)

        start = original.config, original.state_dict()
        first = built(*upcycled(*recurrent(*start), 4, 2, 1, 1))
        second = built(*recurrent(*upcycled(*start, 4, 2, 1, 1)))
        assert first.config == second.config
        expected = original(tokens, padded(tokens)).logits
        for model in (first, second):
            steps = 1 if step == "loop" else 3
            assert small_error(model(tokens, padded(tokens), num_steps=steps).logits, expected)


REFUSED = {
    "experts": ("deepseek", (4, 2), "already has experts (n_routed_experts=4); choose a dense model"),
    "gelu": ("gpt2", (4, 2), "hidden_act=gelu and use_bias=true, but experts are of silu or relu2"),
    "one per token": ("llama", (4, 1), "--num_experts_per_tok 1 must be at least 2"),
    "more than there are": ("llama", (4, 5), "num_experts_per_tok=5 exceeds the 4 experts"),
    "none left": ("llama", (4, 2, 0, 3), "--first_k_dense_replace 3 must lie in 0..2"),
    "shared below 0": ("llama", (4, 2, -1), "n_shared_experts=-1 must be at least 0"),
    "without number": ("llama", (10**9, 2), "n_routed_experts=1000000000 must be"),
}


@pytest.mark.parametrize(("variant", "sizes", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(variant, sizes, message):
    model = ZeroModel(ModelConfig.from_dict({**SMALL, **VARIANTS[variant]}))
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        upcycled(model.config, model.state_dict(), *sizes)
    assert "\n" not in str(refused.value)
