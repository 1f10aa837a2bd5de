"""Training the exported class: loss, gradients, recomputation, adapters, new tokens, initial weights."""

import copy
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import ModelConfig, ZeroModel
from model.hf.remote.configuration_zeromodel import ZeroModelConfig
from model.hf.remote.modeling_zeromodel import ZeroModelForCausalLM

from .conftest import SMALL, VARIANTS
from .own_classes import assert_close, left_mask, wrapped
from .test_hf_own import named

TRAINED = ("kv-act-token-per_step", "block-ponder-sequence-ema", "deepseek", "gpt2", "pause", "memory")
needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")


def labels_of(tokens: Tensor) -> Tensor:
    labels = tokens.clone()
    labels[0, :4] = -100
    return labels


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", TRAINED)
def test_loss_and_gradients_are_those_of_the_next_tokens(name, tokens):
    ours = named(name).train()
    theirs, labels, mask = wrapped(ours).train(), labels_of(tokens), left_mask(tokens)
    labels[mask == 0] = -100
    logits = ours(tokens, attention_mask=mask).logits
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    count = int((labels[:, 1:] != -100).sum())
    out = theirs(tokens, attention_mask=mask, labels=labels)
    assert_close(out.loss, total / count)
    assert out.past_key_values is None
    given = theirs(tokens, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(50)).loss
    assert_close(given, total / 50)
    expected, found = gradients(ours, total / count), gradients(theirs.network, out.loss)
    assert found.keys() == expected.keys()
    for parameter, gradient in found.items():
        assert_close(gradient, expected[parameter])


@pytest.mark.parametrize("name", ["deepseek", "block-ponder-sequence-ema"])
def test_recomputation_changes_no_gradient(name, tokens):
    plain = wrapped(named(name)).train()
    recomputing = copy.deepcopy(plain)
    recomputing.activation_checkpointing_enable()
    assert recomputing.is_activation_checkpointing
    losses = [model(tokens, labels=tokens).loss for model in (plain, recomputing)]
    assert losses[0] == losses[1]
    expected, found = (gradients(m, loss) for m, loss in zip((plain, recomputing), losses, strict=True))
    for parameter, gradient in found.items():
        assert_close(gradient, expected[parameter])
    recomputing.activation_checkpointing_disable()
    assert not recomputing.is_activation_checkpointing


def adapted(name: str, targets: list[str]) -> Any:
    """A model under LoRA whose adapters are not 0."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(wrapped(named(name)), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@needs_peft
@pytest.mark.parametrize("target", ["q_proj", "kv_b_proj", "up_proj", "down_proj", "gate_proj", "o_proj"])
def test_an_adapter_counts_in_every_form_of_the_network(target, tokens):
    """In one pass, over a cache (where latent attention absorbs kv_b_proj), switched off, and merged."""
    model = adapted("loop", [target])
    training = model(tokens).logits
    with torch.no_grad():
        base = wrapped(named("loop"))(tokens).logits
        whole = model(tokens, use_cache=False).logits
        assert float((whole - base).abs().max()) > 1e-3
        assert_close(training, whole)
        out = model(tokens[:, :-1])
        last = model(tokens[:, -1:], past_key_values=out.past_key_values).logits
        assert_close(last, whole[:, -1:])
        with model.disable_adapter():
            out = model(tokens[:, :-1])
            assert_close(model(tokens[:, -1:], past_key_values=out.past_key_values).logits, base[:, -1:])
        model.merge_adapter()
        out = model(tokens[:, :-1])
        assert_close(model(tokens[:, -1:], past_key_values=out.past_key_values).logits, whole[:, -1:])
        model.unmerge_adapter()
        assert_close(model.merge_and_unload()(tokens).logits, whole)


@needs_peft
def test_adapters_learn_and_nothing_else(tokens):
    model = adapted("loop", ["q_proj", "kv_b_proj", "down_proj"]).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model.activation_checkpointing_enable()
    losses = []
    for _ in range(4):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }


@pytest.mark.parametrize("name", ["loop", "gpt2"])
def test_new_tokens_get_rows(name, tokens, tmp_path):
    model = wrapped(named(name))
    before = model(tokens).logits
    model.resize_token_embeddings(70, mean_resizing=False)
    after = model(tokens).logits
    assert after.shape[-1] == 70
    assert_close(after[..., :61], before)
    assert model(torch.full((1, 3), 69), labels=torch.full((1, 3), 69)).loss.isfinite()
    model.save_pretrained(tmp_path)
    again = ZeroModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.vocab_size == 70
    assert_close(again(tokens).logits, after)
    assert again.get_input_embeddings().weight.shape == again.get_output_embeddings().weight.shape == (70, 24)


def test_a_model_without_weights_starts_as_ours_does():
    config = ModelConfig.from_dict({**SMALL, **VARIANTS["loop_concat_simple"]})
    found = ZeroModelForCausalLM(ZeroModelConfig(zeromodel=config.to_dict())).network.state_dict()
    for name, value in ZeroModel(config).state_dict().items():
        assert torch.equal(found[name], value), name


def test_missing_weights_start_as_ours_do_and_the_others_are_read(tmp_path):
    model = wrapped(named("loop"))
    state = model.state_dict()
    gone = "network.model.layers.1.mlp.gate.weight"
    model.save_pretrained(tmp_path, state_dict={name: v for name, v in state.items() if name != gone})
    again, report = ZeroModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {gone}
    fresh = {f"network.{name}": v for name, v in ZeroModel(named("loop").config).state_dict().items()}
    for name, value in again.state_dict().items():
        assert torch.equal(value, (fresh if name == gone else state)[name]), name
    assert all(not layer.load.any() for layer in again.network.moe_layers())
