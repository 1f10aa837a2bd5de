"""CPU offload of the optimizer and of the weights."""

import json
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("offload_worker.py")


@pytest.mark.slow  # test_precision.py has a run with offload
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_offload_changes_no_loss_and_resumes(launch, kind):
    """Under every ZeRO stage, with accumulation, a refused step and the moving average."""
    output = launch(2, WORKER, kind).stdout
    reports = [json.loads(line[7:]) for line in output.splitlines() if line.startswith("REPORT ")]
    assert len(reports) == 8
    for report in reports:
        assert report["resumed_alike"], report  # bit-exactly
        assert report["switched"] < 1e-5, report
        assert report["applied"] == [1, 1, 0, 1, 1, 1], report
        assert report["loss"] < 1e-5, report
        assert report["norm"] < 1e-5, report
        assert report["weights"] < 1e-5, report
