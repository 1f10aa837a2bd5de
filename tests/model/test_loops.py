"""What must hold for every loop: placement x halting x granularity x cache."""

import copy
import dataclasses

import pytest
import torch

from model import ModelConfig, ZeroModel
from model.cache import LatentCache
from model.config.recurrence import HaltingConfig
from model.losses import IGNORE_INDEX
from model.recurrence import LatentReasoningUnit

from .conftest import BLOCK, SMALL, check_documents_are_apart
from .loops import COVERING, EVERY, EXACT

TOLERANCE = {"rtol": 0, "atol": 3e-5}
KV = {"placement": "kv", "num_steps": 3}
STARTS = torch.tensor([[0, 5, 6, 17], [0, 17, 17, 17], [0, 1, 16, 17]], dtype=torch.int32)


def cases(keep=lambda name: True):
    names = [name for name in EVERY if keep(name)]
    slow = pytest.mark.slow
    return pytest.mark.parametrize(
        "name", [n if n in COVERING else pytest.param(n, marks=slow) for n in names]
    )


def exact(name: str) -> bool:
    return name.rsplit("-", 1)[1] in EXACT


def adaptive(name: str) -> bool:
    return "-fixed-" not in name


def learned(name: str) -> bool:
    return adaptive(name) and "-threshold-" not in name


def make(name: str, seed: int = 0, **overrides) -> ZeroModel:
    """A small model whose zero-initialised parts are not zero, and whose halting depends on the token."""
    config = ModelConfig.from_dict({**SMALL, "recurrence": EVERY[name], **overrides})
    model = ZeroModel(config, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if not parameter.any():
                parameter.normal_(0, 0.3, generator=generator)
            if ".halting." in path and path.endswith("weight"):
                parameter.normal_(0, 1.0, generator=generator)
            if ".halting." in path and path.endswith("bias"):
                parameter.fill_(0.0)
    if "-threshold-" in name:
        set_limit_between_the_tokens(model)
    return model


TOKENS = torch.randint(1, 61, (3, 17), generator=torch.Generator().manual_seed(1))


def set_limit(model: ZeroModel, limit: float) -> None:
    recurrence = model.config.recurrence
    halting = dataclasses.replace(recurrence.halting, threshold=limit)
    model.config = dataclasses.replace(
        model.config, recurrence=dataclasses.replace(recurrence, halting=halting)
    )


def set_limit_between_the_tokens(model: ZeroModel) -> None:
    """A threshold at which some tokens halt early and some do not."""
    for limit in (0.97, 0.9, 0.8, 0.6, 0.3, 0.2, 0.12, 0.1, 0.08, 0.05, 0.03, 0.01):
        set_limit(model, limit)
        if len(model(TOKENS).num_iterations.unique()) > 1:
            return
    raise AssertionError("no threshold divides the tokens")


@pytest.fixture
def tokens() -> torch.Tensor:
    return TOKENS


@cases()
def test_a_changed_token_changes_no_earlier_logit(name, tokens):
    model, changed = make(name), tokens.clone()
    changed[:, 9] = changed[:, 9] % 60 + 1
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after.logits[:, :9], before.logits[:, :9], **TOLERANCE)
    assert torch.equal(after.num_iterations[:, :, :9], before.num_iterations[:, :, :9])
    assert (after.logits[:, 9] - before.logits[:, 9]).abs().max() > 1e-3


@cases(adaptive)
def test_in_training_the_loss_of_a_place_depends_on_no_later_token(name, tokens):
    model, changed = make(name).train(), tokens.clone()
    changed[:, 9] = changed[:, 9] % 60 + 1
    targets = tokens.roll(-1, 1)
    targets[:, 9:] = IGNORE_INDEX
    sums = [model(t, targets=targets).loss_sums["cross_entropy"] for t in (tokens, changed)]
    torch.testing.assert_close(sums[0], sums[1], rtol=2e-6, atol=0)


@cases(exact)
@pytest.mark.parametrize("chunks", [[1] * 17, [6, 1, 10]])
def test_decoding_in_chunks_equals_one_full_pass(name, tokens, chunks):
    model, cache = make(name), LatentCache()
    parts = [model(part, cache=cache) for part in tokens.split(chunks, 1)]
    whole = model(tokens)
    torch.testing.assert_close(torch.cat([p.logits for p in parts], 1), whole.logits, **TOLERANCE)
    assert torch.equal(torch.cat([p.num_iterations for p in parts], 2), whole.num_iterations)


@cases()
def test_a_prefill_equals_a_full_pass_and_training_mode_computes_the_same(name, tokens):
    model = make(name)
    whole = model(tokens)
    torch.testing.assert_close(model(tokens, cache=LatentCache()).logits, whole.logits, **TOLERANCE)
    if "-threshold-" not in name:  # it halts only at inference
        torch.testing.assert_close(make(name).train()(tokens).logits, whole.logits, **TOLERANCE)


@cases()
def test_probabilities_sum_to_one_and_stop_after_halting(name, tokens):
    out = make(name)(tokens)
    p, steps = out.halt_probs, out.num_iterations
    torch.testing.assert_close(p.sum(-1), torch.ones(p.shape[:-1]), rtol=0, atol=1e-6)
    assert (p >= 0).all()
    later = torch.arange(p.shape[-1]) >= steps[..., None]
    assert not p[later].any()
    assert steps.min() >= 1
    if adaptive(name):
        assert len(steps.unique()) > 1, "tokens must halt at different steps, or the other tests show little"
    else:
        assert (steps == 4).all()


@cases(adaptive)
def test_with_zero_halting_it_equals_fixed_depth(name, tokens):
    model = make(name)
    section = dataclasses.asdict(model.config.recurrence)
    section["halting"] = {"kind": "fixed"}
    fixed = ZeroModel(ModelConfig.from_dict({**SMALL, "recurrence": section})).eval()
    weights = {k: v for k, v in model.state_dict().items() if ".halting." not in k}
    fixed.load_state_dict(weights)
    if learned(name):
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if ".halting." in path:
                    parameter.fill_(-200.0 if path.endswith("bias") else 0.0)
        expected = fixed.train()(tokens, targets=tokens).loss_sums["cross_entropy"]
        found = model.train()(tokens, targets=tokens).loss_sums["cross_entropy"]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    else:  # never settled enough
        set_limit(model, 2.0 if model.config.recurrence.halting.measure == "cosine" else -1.0)
    torch.testing.assert_close(model.eval()(tokens).logits, fixed.eval()(tokens).logits, **TOLERANCE)


@cases(adaptive)
def test_halting_of_a_call_equals_the_configs(name, tokens):
    """A model trained at fixed depth is called with a training-free exit, one that learned to halt with
    another limit; whole rows, padded ones, a prefill and decoding."""
    model = make(name)
    halting = model.config.recurrence.halting
    if learned(name):
        set_limit(model, 0.6)
        halting = dataclasses.replace(halting, threshold=0.6)
    section = {**dataclasses.asdict(model.config.recurrence), "halting": {"kind": "fixed"}}
    if learned(name):
        section["halting"] = EVERY[name]["halting"]
    trained = ZeroModel(ModelConfig.from_dict({**SMALL, "recurrence": section})).eval()
    trained.load_state_dict(model.state_dict())
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    caches = [LatentCache(), LatentCache()]
    passes = [
        (tokens, {"num_steps": 5}),
        *((part, {}) for part in tokens.split([9, 1, 7], 1)),
    ]
    for number, (part, options) in enumerate(passes):
        given = [{**options, **({"cache": cache} if number else {})} for cache in caches]
        seen = 17 if number == 0 else caches[0].length + part.shape[1]
        found = trained(part, mask[:, :seen], halting=halting, **given[0])
        expected = model(part, mask[:, :seen], **given[1])
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.num_iterations, expected.num_iterations)
    assert len(trained(tokens, halting=halting).num_iterations.unique()) > 1
    texts = [m.generate(tokens[:, :5], 6, **o) for m, o in ((trained, {"halting": halting}), (model, {}))]
    assert torch.equal(*texts)


@pytest.mark.parametrize(
    ("section", "halting", "options", "message"),
    [
        ({}, {"kind": "fixed"}, {}, "the model has none; leave it out"),
        (BLOCK, {"kind": "threshold"}, {"targets": TOKENS}, "at inference only; leave out targets"),
        (BLOCK, {"kind": "ponder"}, {}, "needs a learned token head, but .*kind=fixed and granularity=token"),
        (
            {**BLOCK, "halting": {"kind": "act"}},
            {"kind": "act", "granularity": "mixed"},
            {},
            "granularity=mixed needs a learned sequence head",
        ),
        (KV, {"kind": "threshold", "measure": "kl"}, {}, "a unit inside attention makes none"),
        (BLOCK, {"kind": "treshold"}, {}, "halting.kind='treshold' is unknown"),
        (BLOCK, {"kind": "threshold", "mixture": 2.0}, {}, "halting.mixture=2.0 must be .*below 1"),
        (
            BLOCK,
            {"kind": "threshold", "min_steps": 3},
            {"num_steps": 2},
            "min_steps=3 must lie in 1..num_steps=2",
        ),
        (
            {**BLOCK, "virtual_layers": 2},
            {"kind": "threshold"},
            {},
            "virtual_layers=2 must lie in 1..halting.min_steps=1",
        ),
    ],
)
def test_a_halting_that_does_not_fit_the_model_is_refused_in_one_line(
    section, halting, options, message, tokens
):
    model = ZeroModel(ModelConfig.from_dict({**SMALL, "recurrence": section})).eval()
    with pytest.raises(ValueError, match=message) as error:
        model(tokens, halting=HaltingConfig(**halting), **options)
    assert "\n" not in str(error.value)


@cases()
def test_documents_of_a_row_and_padding_change_nothing(name, tokens):
    model = make(name)
    check_documents_are_apart(model, tokens, STARTS, tolerance=3e-5)
    mask = torch.ones_like(tokens)
    mask[0, :7], mask[2, 11:] = 0, 0  # left and right
    padded = model(tokens, attention_mask=mask).logits
    for row, span in ((0, slice(7, 17)), (1, slice(0, 17)), (2, slice(0, 11))):
        alone = model(tokens[row : row + 1, span]).logits[0]
        torch.testing.assert_close(padded[row, span], alone, **TOLERANCE)


@cases(exact)
def test_left_padded_rows_generate_what_they_generate_alone(name):
    model, lengths = make(name), [3, 7, 1]
    prompts = [torch.randint(1, 61, (1, n), generator=torch.Generator().manual_seed(n)) for n in lengths]
    batch = torch.cat([torch.nn.functional.pad(p, (7 - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (7 - p.shape[1], 0)) for p in prompts])
    together = model.generate(batch, max_new_tokens=4, attention_mask=mask)
    for prompt, row in zip(prompts, together, strict=True):
        expected = prompt
        for _ in range(4):
            expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(-1)), 1)
        assert torch.equal(expected[0, -4:], row[-4:])


@cases()
def test_gradients_equal_finite_differences(name, tokens):
    torch.set_default_dtype(torch.float64)
    try:
        section = copy.deepcopy(EVERY[name])  # stability detaches a factor, see test_loop_trace.py
        section["halting"] |= {"sparsity_weight": 0.1, "information_weight": 0.1}
        if learned(name):
            section["halting"]["ponder_weight"] = 0.1
        model = make(name, recurrence=section).double().train()
        tokens, targets = tokens[:, :7], tokens[:, 1:8]
        generator = torch.Generator().manual_seed(5)
        parameters = [p for p in model.parameters() if p.requires_grad]
        direction = [torch.randn(p.shape, generator=generator) for p in parameters]

        def loss(distance: float) -> torch.Tensor:
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p += distance * d
            value = model(tokens, targets=targets).loss
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p -= distance * d
            return value

        value = model(tokens, targets=targets).loss
        grads = torch.autograd.grad(value, parameters)
        slope = sum((g * d).sum() for g, d in zip(grads, direction, strict=True))
        step = 1e-7  # so small that no router's choice and no halting changes
        with torch.no_grad():
            difference = (loss(step) - loss(-step)) / (2 * step)
        assert abs(difference) > 1e-3
        torch.testing.assert_close(slope, difference, rtol=1e-4, atol=1e-6)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", [n for n in COVERING if adaptive(n)])
def test_inference_stops_when_every_token_has_halted(name, tokens, monkeypatch):
    model, calls, inject = make(name), [], LatentReasoningUnit._inject
    looped = [m for m in model.modules() if isinstance(m, LatentReasoningUnit)]

    def counted(unit, *inputs):
        calls.append(unit)
        return inject(unit, *inputs)

    monkeypatch.setattr(LatentReasoningUnit, "_inject", counted)
    out = model(tokens[:, :1])
    for number, unit in enumerate(looped):
        assert calls.count(unit) == int(out.num_iterations[number].max())
    calls.clear()
    model(tokens[:, :1], targets=tokens[:, :1])  # with targets all ranks take all steps
    assert all(calls.count(unit) == 4 for unit in looped)
