"""Latent thoughts, against passes over whole rows without any cache."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model import ZeroModel
from model.cache import LatentCache
from model.latent_cot.thoughts import derangement, generate_with_thoughts, think

from .thoughts import EOT, FEEDBACKS, KINDS, C, make, questions

EXACT = {"rtol": 1e-7, "atol": 1e-8}
ANSWER = torch.tensor([[EOT, 11, 12]]).expand(3, -1)


def whole(model: ZeroModel, embedded: Tensor) -> Tensor:
    """Hidden states from a pass without a cache."""
    return model(inputs_embeds=embedded).hidden


def literal(
    model: ZeroModel, tokens: Tensor, c: int = C, iterations: int | None = None
) -> tuple[Tensor, Tensor]:
    """The latents' hidden states and the answer's logits by the formulas, with passes over whole rows."""
    settings, unit = model.config.latent_cot, model.latent_thoughts
    project = unit.projection if settings.projects else torch.nn.Identity()
    question, kind = model.model.embed_tokens(tokens), settings.feedback
    n = settings.iterations if iterations is None else iterations
    bot = whole(model, question)[:, -1]
    if kind == "sequential":
        z = [project(bot)]
        for _ in range(1, c):
            z.append(project(whole(model, torch.cat((question, torch.stack(z, 1)), 1))[:, -1]))
    else:
        embedding = unit.embedding.weight[0].expand(len(tokens), -1)
        z = [embedding] * c
        for _ in range({"jacobi": n, "lotus": n - 1, "none": 0}[kind]):
            h = whole(model, torch.cat((question, torch.stack(z, 1)), 1))[:, -c:].unbind(1)
            z = (
                [project(bot), *map(project, h[:-1])]
                if kind == "jacobi"
                else [embedding + state for state in h]
            )
    answer = model.model.embed_tokens(ANSWER[: len(tokens)])
    out = model(inputs_embeds=torch.cat((question, torch.stack(z, 1), answer), 1))
    T = tokens.shape[1]
    return out.hidden[:, T : T + c], out.logits[:, T + c :]


def thought(model: ZeroModel, tokens: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The same by `think` and a pass over its cache."""
    thoughts = think(model, tokens, **options)
    return thoughts.hidden, model(ANSWER[: len(tokens)], cache=thoughts.cache).logits


def gradients(model: ZeroModel, results: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Gradients of a scalar of both results; a parameter that takes no part has none."""
    generator = torch.Generator().manual_seed(7)
    scalar = sum((r * torch.randn(r.shape, generator=generator, dtype=r.dtype)).sum() for r in results)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(scalar, parameters, allow_unused=True)
    return {name: g for name, g in zip(names, found, strict=True) if g is not None and bool(g.any())}


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert set(ours) == set(expected)
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=tolerance["rtol"] * max(scale, 1.0))


PAIRS = [("latent_moe", f) for f in FEEDBACKS] + [
    (k, f) for k in list(KINDS)[1:] for f in ("jacobi", "lotus")
]


@pytest.mark.parametrize(("kind", "feedback"), PAIRS)
def test_values_and_gradients_equal_passes_without_a_cache(kind, feedback):
    model, tokens = make(kind, feedback), questions()
    expected, ours = literal(model, tokens), thought(model, tokens)
    for theirs, mine in zip(expected, ours, strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)
    assert_same(gradients(model, ours), gradients(model, expected), **EXACT)


@pytest.mark.parametrize("kind", ["latent_moe", "plain", "gpt2", "block", "kv"])
@pytest.mark.parametrize("iterations", [C, C + 2])
def test_as_many_iterations_as_latents_equal_the_sequential_form(kind, iterations):
    parallel, serial = make(kind), make(kind, "sequential")
    serial.load_state_dict(parallel.state_dict(), strict=False)
    ours, expected = thought(parallel, questions(), num_iterations=iterations), thought(serial, questions())
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)
    assert_same(gradients(parallel, ours), gradients(serial, expected), **EXACT)
    early = think(parallel, questions(), num_iterations=C - 1).hidden
    assert (early[:, : C - 1] - expected[0][:, : C - 1]).abs().max() < 1e-5
    assert (early[:, C - 1] - expected[0][:, C - 1]).abs().max() > 1e-3
    single = think(parallel.float(), questions(), num_iterations=iterations).hidden
    torch.testing.assert_close(single, think(serial.float(), questions()).hidden, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("c", "iterations"), [(1, 1), (1, 3), (5, 1), (6, 0)])
def test_latents_and_iterations_can_be_changed_at_test_time(c, iterations):
    model, tokens = make("latent_moe"), questions()
    ours = thought(model, tokens, num_latents=c, num_iterations=iterations)
    for mine, theirs in zip(ours, literal(model, tokens, c, iterations), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize("kind", ["latent_moe", "plain", "gpt2", "block", "kv", "mixing"])
@pytest.mark.parametrize("tolerance", [0.0, 0.3])
@torch.no_grad()
def test_padding_batch_order_and_batch_size_change_nothing(kind, tolerance):
    model, lengths = make(kind).eval(), (7, 3, 5)
    options = {"num_iterations": 6, "tolerance": tolerance}
    tokens, mask = questions(), torch.ones(3, 7, dtype=torch.int64)
    for row, length in enumerate(lengths):
        tokens[row, : 7 - length], mask[row, : 7 - length] = 60, 0
    order = torch.tensor([2, 0, 1])
    batch = think(model, tokens, mask, **options)
    moved = think(model, tokens[order], mask[order], **options)
    torch.testing.assert_close(moved.hidden, batch.hidden[order], **EXACT)
    answered = torch.cat((batch.attention_mask, torch.ones(3, 3)), 1)
    logits = model(ANSWER, attention_mask=answered, cache=batch.cache).logits
    taken = []
    for row, length in enumerate(lengths):
        alone = think(model, tokens[row : row + 1, 7 - length :], **options)
        torch.testing.assert_close(alone.hidden, batch.hidden[row : row + 1], **EXACT)
        theirs = model(ANSWER[:1], cache=alone.cache).logits
        torch.testing.assert_close(theirs, logits[row : row + 1], **EXACT)
        taken.append(alone.iterations)
    assert batch.iterations == max(taken)


@pytest.mark.parametrize("kind", ["latent_moe", "block"])
@pytest.mark.parametrize("feedback", ["jacobi", "sequential", "lotus"])
def test_a_padded_batch_learns_what_its_rows_learn(kind, feedback):
    model, tokens, lengths = make(kind, feedback), questions(), (7, 3, 5)
    mask = torch.arange(7) >= 7 - torch.tensor(lengths)[:, None]

    def learned(rows: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        thoughts = think(model, rows, mask)
        answer = ANSWER[: len(rows)]
        seen = None if mask is None else torch.cat((thoughts.attention_mask, answer > 0), 1)
        logits = model(answer, attention_mask=seen, cache=thoughts.cache).logits
        loss = logits.square().sum() + thoughts.hidden.pow(3).sum()
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        return {n: g for (n, _), g in zip(model.named_parameters(), found, strict=True) if g is not None}

    alone = [learned(tokens[i : i + 1, 7 - n :], None) for i, n in enumerate(lengths)]
    for name, gradient in learned(tokens, mask).items():
        expected = torch.stack([g[name] for g in alone if name in g]).sum(0)
        scale = max(float(expected.abs().max()), 1.0)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-7 * scale)


@pytest.mark.parametrize("kind", ["latent_moe", "plain", "gpt2", "block", "kv"])
def test_gradients_equal_finite_differences(kind):
    model, tokens, step = make(kind), questions(), 1e-6

    def scalar() -> Tensor:
        return think(model, tokens).hidden[:, -1].square().mean(0).cumsum(0).sum()

    unit = model.latent_thoughts
    for parameter, place in ((unit.embedding.weight, (0, 3)), (unit.projection[0].weight, (2, 5))):
        (gradient,) = torch.autograd.grad(scalar(), parameter)
        with torch.no_grad():
            parameter[place] += step
            above = scalar()
            parameter[place] -= 2 * step
            below = scalar()
            parameter[place] += step
        difference = float(above - below) / (2 * step)
        assert abs(difference) > 1e-6
        assert float(gradient[place]) == pytest.approx(difference, rel=1e-4, abs=1e-7)


def test_the_question_is_read_once_and_learns_through_the_cache():
    model, tokens, lengths = make("latent_moe", "none"), questions(), list[int]()
    model.model.register_forward_hook(lambda module, inputs, out: lengths.append(inputs[0].shape[1]))
    hidden = think(model, tokens).hidden
    assert lengths == [7, C]
    (gradient,) = torch.autograd.grad(hidden.square().cumsum(-1).sum(), model.model.embed_tokens.weight)
    used = sorted(set(tokens.flatten().tolist()))
    assert gradient.any(1).nonzero().flatten().tolist() == used
    jacobi = make("latent_moe")
    jacobi.model.register_forward_hook(lambda module, inputs, out: lengths.append(inputs[0].shape[1]))
    lengths.clear()
    thoughts = think(jacobi, tokens)
    assert lengths == [7, C, C, C]
    assert (thoughts.passes, thoughts.iterations, len(thoughts.change)) == (3, 2, 2)


@pytest.mark.parametrize("kind", ["latent_moe", "plain", "block", "kv"])
@torch.no_grad()
def test_a_converged_row_stops_and_nothing_changes(kind):
    model, tokens = make(kind).eval(), questions()
    full = think(model, tokens, num_iterations=20)
    stopped = think(model, tokens, num_iterations=20, tolerance=1e-9)
    # At iteration C the latents equal the sequential form's, and later iterations do not change them.
    assert (stopped.iterations, stopped.passes) == (C, C + 1)
    assert min(full.change[:C]) > 1e-6
    assert max(full.change[C:]) < 1e-12
    torch.testing.assert_close(stopped.hidden, full.hidden, rtol=0, atol=1e-12)


@pytest.mark.parametrize("policy", ["block", "selective", "iteration"])
@pytest.mark.parametrize("kind", ["latent_moe", "block", "kv"])
def test_activation_checkpointing_changes_no_gradient(kind, policy):
    def run(**execution: Any) -> tuple[dict[str, Tensor], list[Tensor]]:
        model, states = make(kind, **execution).train(), list[Tensor]()
        thoughts = think(model, questions())
        out = model(ANSWER, cache=thoughts.cache, targets=ANSWER, states=states)
        results = (torch.stack([out.loss, *(s.square().mean() for s in states)]), thoughts.hidden)
        return gradients(model, results), states

    plain, recomputed = run(), run(checkpointing=policy)
    assert_same(recomputed[0], plain[0], **EXACT)
    assert (
        len(recomputed[1]) == len(plain[1]) == (5 if kind == "block" else 3)
    )  # 3 layers, one of them looped
    for mine, theirs in zip(recomputed[1], plain[1], strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


def test_states_are_what_each_layer_gives(tokens):
    model, seen, states = make("block"), list[Tensor](), list[Tensor]()
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, inputs, out: seen.append(out.hidden))
    hidden = model(tokens, states=states).hidden
    assert len(states) == len(seen) == 5
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(states, seen, strict=True))
    torch.testing.assert_close(model.model.norm(states[-1]), hidden)


def test_latent_passes_leave_the_experts_count_alone():
    model = make("latent_moe").train()
    think(model, questions())
    assert all(int(layer.load.sum()) == 0 for layer in model.moe_layers())


@torch.no_grad()
def test_controls_replace_the_latents():
    model, tokens = make("latent_moe").eval(), questions(5)
    fed: list[Tensor] = []
    model.model.register_forward_hook(lambda module, inputs, out: fed.append(inputs[0]))
    think(model, tokens)
    true = fed[-1]
    for replace, expected in (("shuffled", true[derangement(5, 2)]), ("zeroed", torch.zeros_like(true))):
        thoughts = think(model, tokens, replace=replace, seed=2)
        torch.testing.assert_close(fed[-1], expected, **EXACT)
        embedded = torch.cat((model.model.embed_tokens(tokens), expected), 1)
        torch.testing.assert_close(thoughts.hidden, whole(model, embedded)[:, -C:], **EXACT)
        assert thoughts.passes == 4
    with pytest.raises(ValueError, match="the batch has 1 row"):
        think(model, tokens[:1], replace="shuffled")


def test_a_derangement_moves_everything():
    for n in range(2, 30):
        orders = [derangement(n, seed).tolist() for seed in range(4)]
        for order in orders:
            assert sorted(order) == list(range(n))
            assert all(source != place for place, source in enumerate(order))
        assert n < 4 or len(set(map(tuple, orders))) > 1
        assert orders[0] == derangement(n, 0).tolist()


@pytest.mark.parametrize(
    ("kind", "feedback"), [("latent_moe", "jacobi"), ("plain", "coconut"), ("block", "lotus")]
)
@torch.no_grad()
def test_generation_equals_passes_over_whole_rows(kind, feedback):
    model, tokens = make(kind, feedback).eval(), questions()
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    answer, thoughts = generate_with_thoughts(model, tokens, EOT, 6, mask)
    assert answer.shape == (3, 6)
    assert thoughts.cache.length == 7 + C + 1 + 5
    fed: list[Tensor] = []
    for row in range(3):
        alone, hook = tokens[row : row + 1, 2 * (row == 1) :], None
        hook = model.model.register_forward_hook(lambda module, inputs, out: fed.append(inputs[0]))
        think(model, alone, differentiable=True)
        hook.remove()
        latents = torch.cat(fed[1:], 1) if feedback == "coconut" else fed[-1]
        written = [EOT]
        for _ in range(6):
            parts = (
                model.model.embed_tokens(alone),
                latents,
                model.model.embed_tokens(torch.tensor([written])),
            )
            written.append(int(model(inputs_embeds=torch.cat(parts, 1)).logits[0, -1].argmax()))
        assert written[1:] == answer[row].tolist()
        fed.clear()
    options = {"thinking": {"num_iterations": 1}} if feedback != "coconut" else {}
    assert generate_with_thoughts(model, tokens, EOT, 2, stopping=lambda new: new[:, 0] >= 0, **options)[
        0
    ].shape == (3, 1)
    with pytest.raises(
        ValueError, match="prompt of 12 and max_new_tokens=60 exceed max_position_embeddings=64"
    ):
        generate_with_thoughts(model, tokens, EOT, 60)


@pytest.mark.parametrize("differentiable", [False, True])
@torch.no_grad()
def test_branches_of_a_cache_do_not_disturb_each_other(differentiable):
    generator = torch.Generator().manual_seed(0)

    def some(n: int) -> Tensor:
        return torch.randn(2, n, 3, generator=generator)

    cache, slot, first, rest = LatentCache(differentiable=differentiable), (0, 0), some(4), [some(3), some(3)]
    for part in first.split(1, 1):  # leaves spare capacity behind
        cache.append(slot, part)
        cache.advance(1)
    branches = [cache.branch(), cache.branch()]
    for branch, new in zip(branches, rest, strict=True):
        branch.append(slot, new)
        branch.advance(3)
    cache.crop(2)
    cache.append(slot, some(1))
    cache.advance(1)
    for branch, new in zip(branches, rest, strict=True):
        assert torch.equal(branch.held(slot), torch.cat((first, new), 1))
    assert torch.equal(cache.held(slot)[:, :2], first[:, :2])
    assert cache.length == 3
