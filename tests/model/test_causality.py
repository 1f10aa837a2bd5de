"""No logit depends on a later token, on another document of the row, or on padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import ModelConfig, ZeroModel

from .conftest import BLOCK, SMALL, check_documents_are_apart

TOLERANCE = {"rtol": 0, "atol": 2e-5}


@pytest.mark.parametrize("place", [0, 1, 9, 16])
def test_a_changed_token_changes_no_earlier_logit(build, variant, tokens, place):
    model = build(variant)
    changed = tokens.clone()
    changed[:, place] = changed[:, place] % 60 + 1
    before, after = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(after[:, :place], before[:, :place], **TOLERANCE)
    assert (after[:, place] - before[:, place]).abs().max() > 1e-3


def test_documents_of_a_row_do_not_see_each_other(build, variant, tokens):
    model = build(variant)
    starts = torch.tensor([[0, 5, 6, 17], [0, 17, 17, 17], [0, 1, 16, 17]], dtype=torch.int32)
    check_documents_are_apart(model, tokens, starts, tolerance=2e-5)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), left=st.booleans(), seed=st.integers(0, 9)
)
def test_padding_changes_nothing(lengths, left, seed):
    model = ZeroModel(ModelConfig.from_dict({**SMALL, "embedding_mixing": 3, "recurrence": BLOCK})).eval()
    width = max(lengths)
    generator = torch.Generator().manual_seed(seed)
    batch, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width)
    rows = [torch.randint(1, 61, (n,), generator=generator) for n in lengths]
    spans = [slice(width - n, width) if left else slice(0, n) for n in lengths]
    for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
        batch[i, span], mask[i, span] = row, 1
    padded = model(batch, attention_mask=mask).logits
    assert torch.isfinite(padded).all()
    for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
        torch.testing.assert_close(padded[i, span], model(row[None]).logits[0], **TOLERANCE)
