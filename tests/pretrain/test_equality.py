"""Two ranks with ZeRO-3 and expert parallelism compute what one plain torch process computes."""

import json
from pathlib import Path

import pytest

from .conftest import Launch

WORKER = Path(__file__).with_name("equality_worker.py")


def check(launch: Launch, which: str, cases: int) -> list[dict]:
    """Runs some of the worker's cases, 5 clipped steps each, and checks its reports."""
    output = launch(2, WORKER, "ds_configs/zero3_ep.json", which).stdout
    reports = [json.loads(line[7:]) for line in output.splitlines() if line.startswith("REPORT ")]
    assert len(reports) == cases
    for report in reports:
        assert report["loss"] < 1e-5, report
        assert report["norm"] < 1e-5, report
        assert report["smallest_norm"] > 0.3, report  # clipping took place
        assert report["moved"] > 3e-3, report  # training took place: 5 steps of 1e-3
        assert report["weights"] < 1e-4, report  # AdamW turns rounding of tiny gradients into steps
        assert report["loads_equal"], report
        assert report["bias_spread"] == 0, report
        assert report["skipped"], report  # a step with gradients that are not finite changes nothing
    return reports


def test_two_ranks_equal_one_plain_process(launch):
    """Cases that test_matrix has no axis for, in one launch; targets are unevenly distributed."""
    reports = check(launch, "eager", 12)
    assert reports[1]["idle_experts"] == 2 * 2, reports[1]


@pytest.mark.slow
def test_two_compiled_ranks_equal_one_plain_process(launch):
    check(launch, "compiled", 1)


@pytest.mark.slow
def test_auto_ep_by_config_trains_the_same(launch):
    """DeepSpeed's own MoE layer in transformers' DeepseekV3: six clipped steps of AdamW."""
    output = launch(2, WORKER.with_name("autoep_worker.py"), "ds_configs/zero3_ep.json").stdout
    (line,) = (line for line in output.splitlines() if line.startswith("REPORT "))
    histories = json.loads(line[7:])
    assert len(histories["ours"]) == 6
    for ours, theirs in zip(histories["ours"], histories["AutoEP"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert min(norm for _, norm in histories["ours"]) > 0.3  # clipping took place
