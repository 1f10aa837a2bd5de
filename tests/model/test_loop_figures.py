"""The loops' figures against counts by hand."""

import pytest
import torch

from model import loop_trace
from model.loop_trace import kept_tokens, loop_figures, loop_sums, zeroed_tokens


@pytest.mark.parametrize("counted", [kept_tokens, zeroed_tokens])  # on a CPU, on a GPU
def test_figures_of_two_loops_and_padding(monkeypatch, counted):
    monkeypatch.setattr(loop_trace, "kept_tokens", counted)
    steps = torch.tensor([[[1, 3, 9]], [[2, 3, 9]]])  # (U, B, T), the last token is padding
    p = torch.zeros(2, 1, 3, 3)
    p[0, 0, 0, 0] = p[0, 0, 1, 2] = p[1, 0, 0, 1] = p[1, 0, 1, 2] = 1.0
    residuals = torch.tensor([[0.8, 0.4, 0.2], [0.6, 0.3, 0.1]])
    real = torch.tensor([[True, True, False]])
    one = loop_sums(steps, p, residuals, real)
    figures = loop_figures(one + one)  # two equal batches have the same means
    assert figures["steps_mean"] == pytest.approx((1 + 3 + 2 + 3) / 4)
    assert figures["steps_histogram"] == pytest.approx([0.25, 0.25, 0.5])
    assert figures["halting_distribution"] == pytest.approx([0.25, 0.25, 0.5])
    # Step 1 ran for 2 + 2 tokens, step 2 for 1 + 2, step 3 for 1 + 1.
    expected = [(0.8 * 2 + 0.6 * 2) / 4, (0.4 + 0.3 * 2) / 3, (0.2 + 0.1) / 2]
    assert figures["residuals"] == pytest.approx(expected)
    assert figures["convergence_ratio"] == pytest.approx(expected[2] / expected[0])


def test_figures_of_a_real_pass_equal_its_outputs(build, tokens):
    model = build("loop")
    out = model(tokens)
    figures = loop_figures(loop_sums(out.num_iterations, out.halt_probs, out.residuals))
    assert figures["steps_mean"] == 3
    assert figures["halting_distribution"] == [0, 0, 1]
    assert figures["residuals"] == pytest.approx(out.residuals[0].tolist())
