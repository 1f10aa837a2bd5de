"""Multi-token prediction: its loss written out, and drafts that change no output."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model import ModelConfig, ZeroModel
from model.cache import LatentCache
from model.losses import IGNORE_INDEX
from model.speculative import generate_speculatively

from .conftest import BLOCK, SMALL

STARTS = torch.tensor([[0, 5, 6, 17], [0, 17, 17, 17], [0, 1, 16, 17]], dtype=torch.int32)


def literal_mtp_loss(model: ZeroModel, document: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Eq. 21-25 for one document (T,): summed over modules and positions, divided by the modules."""
    T, total = len(document), torch.zeros(())
    context = model.attention_context(document[None])
    context.num_steps = model.config.recurrence.num_steps
    hidden = model.model(model.model.embed(document[None], context), context).hidden
    for k, module in enumerate(model.model.mtp, 1):
        ahead = document.roll(-k)  # the last k positions have no token ahead and are left out below
        joined = torch.cat((module.enorm(model.model.embed_tokens(ahead[None])), module.hnorm(hidden)), -1)
        hidden = module.norm(module.layer(joined @ module.eh_proj.weight.T, context).hidden)
        for place in range(T - k):
            if targets[place + k] != IGNORE_INDEX:
                logits = model.lm_head.weight @ hidden[0, place]
                total = total + F.cross_entropy(logits, targets[place + k])
    return total / model.config.num_nextn_predict_layers


@pytest.mark.parametrize("recurrence", [{}, BLOCK])
def test_the_loss_follows_its_equations_document_by_document(build, tokens, recurrence):
    model = build("multi_token", recurrence=recurrence)
    targets = tokens.roll(-1, 1)
    targets[0, 3], targets[2, 8:11] = IGNORE_INDEX, IGNORE_INDEX
    found = model(tokens, targets=targets, cu_seqlens=STARTS).loss_sums["mtp"]
    expected = torch.zeros(())
    for row, starts in enumerate(STARTS.tolist()):
        for first, last in zip(starts, starts[1:], strict=False):
            if first < last:
                expected += literal_mtp_loss(
                    model, tokens[row, first:last], targets[row, first:last]
                ).detach()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert (found.detach() / expected - 1).abs() < 1e-4


def test_the_loss_is_weighted_into_the_total_and_reaches_every_weight(build, tokens):
    model = build("multi_token", mtp_loss_weight=0.5, balance_loss_weight=0.0)
    out = model(tokens, targets=tokens)
    sums = out.loss_sums
    expected = (sums["cross_entropy"] + 0.5 * sums["mtp"]) / tokens.numel()
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    assert all(p.grad.abs().sum() > 0 for p in model.model.mtp[1].eh_proj.parameters())


@torch.no_grad()
def test_drafts_token_by_token_equal_drafts_of_the_whole_row(build, tokens):
    model = build("multi_token")
    hidden, following = model(tokens).hidden, tokens.roll(-1, 1)
    whole, cache = model.draft(hidden, following, None, LatentCache()), LatentCache()
    for place in range(17):
        part = slice(place, place + 1)
        step = model.draft(hidden[:, part], following[:, part], None, cache)
        torch.testing.assert_close(step, whole[:, part], rtol=0, atol=2e-5)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 99),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    new=st.integers(0, 24),
    eos=st.sampled_from([None, 3]),
    looped=st.booleans(),
    mla=st.booleans(),
)
def test_speculative_decoding_equals_greedy_decoding(seed, lengths, new, eos, looped, mla):
    sizes = {**SMALL, "vocab_size": 7, "num_nextn_predict_layers": 1, "use_mla": mla}
    sizes |= {"recurrence": BLOCK} if looped else {}
    model = ZeroModel(ModelConfig.from_dict(sizes), seed=seed).eval()
    tokens = torch.randint(1, 7, (len(lengths), 9), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(9) >= 9 - torch.tensor(lengths)[:, None]).long()
    plain = model.generate(tokens, new, attention_mask=mask, eos_token_id=eos)
    found, acceptance = generate_speculatively(model, tokens, new, attention_mask=mask, eos_token_id=eos)
    assert torch.equal(found, plain)
    assert 0 <= acceptance.accepted <= acceptance.drafted


def test_a_trained_module_drafts_well_and_still_changes_nothing():
    config = ModelConfig.from_dict({**SMALL, "num_nextn_predict_layers": 1, "initializer_range": 0.05})
    model = ZeroModel(config).train()
    pattern = torch.randint(1, 61, (11,), generator=torch.Generator().manual_seed(0))
    rows = torch.stack([pattern.roll(-i).repeat(4)[:33] for i in range(11)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        model(rows[:, :-1], targets=rows[:, 1:]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    plain = model.generate(rows[:4, :12], 40)
    found, acceptance = generate_speculatively(model, rows[:4, :12], 40)
    assert torch.equal(found, plain)
    assert acceptance.rate > 0.9
    assert acceptance.drafted < 4 * 25  # about two tokens per pass


def test_a_model_without_the_module_is_refused(build, tokens):
    with pytest.raises(ValueError, match="num_nextn_predict_layers=0; train with at least 1 or use generate"):
        generate_speculatively(build(), tokens, 4)
    with pytest.raises(ValueError, match="exceed max_position_embeddings=64"):
        generate_speculatively(build("multi_token"), tokens, 48)


@pytest.mark.parametrize(
    ("mixing", "name"),
    [
        ({"recurrence": {"placement": "kv", "num_steps": 2, "position_mixing": 3}}, "position_mixing=3"),
        ({"embedding_mixing": 4}, "embedding_mixing=4"),
    ],
)
def test_speculation_over_several_rows_is_refused_where_holes_would_be_mixed_in(build, tokens, mixing, name):
    model = build("multi_token", **mixing)
    with pytest.raises(ValueError, match=f"speculative decoding of 3 rows leaves holes .*{name}"):
        generate_speculatively(model, tokens, 4)
    assert torch.equal(generate_speculatively(model, tokens[:1], 6)[0], model.generate(tokens[:1], 6))
