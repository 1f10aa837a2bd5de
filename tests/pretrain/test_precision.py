"""Training in bf16: every shipped DeepSpeed file against fp32."""

import json
from pathlib import Path

import pytest
import torch

from model.config.execution import check_precision
from tests.conftest import ROOT

WORKER = Path(__file__).with_name("precision_worker.py")
FP32 = "zero1.json"  # that the other fp32 files equal it: test_matrix.py
FILES = [FP32, "zero1_bf16.json", "zero2_bf16.json", "zero3_ep_bf16.json", "zero3_ep_offload.json"]


@pytest.fixture(scope="module")
def reports(launch):
    output = launch(2, WORKER, *FILES).stdout
    lines = [json.loads(line[7:]) for line in output.splitlines() if line.startswith("REPORT ")]
    found = {line["file"]: line for line in lines}
    assert list(found) == FILES
    return found


@pytest.mark.parametrize("file", FILES)
def test_gradients_accumulate_in_fp32(reports, file):
    """To fp32's rounding they are the fp32 sum of the micro-batches' gradients, over two ranks."""
    assert reports[file]["gradient"] < 1e-6
    assert reports[file]["dtype"] == ("torch.float32" if file == FP32 else "torch.bfloat16")


@pytest.mark.parametrize("file", FILES)
def test_resumes_bit_exactly_and_skips_the_refused_step(reports, file):
    assert reports[file]["resumed_alike"]
    assert [step[2] for step in reports[file]["history"]] == [1, 1, 0, 1, 1, 1]


@pytest.mark.parametrize("file", FILES[1:])
def test_losses_are_those_of_fp32(reports, file):
    """To 0.3 % of the loss and 1 % of the gradient norm: bf16 keeps 8 bits of each number."""
    for ours, theirs in zip(reports[file]["history"], reports[FP32]["history"], strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=3e-3)
        assert ours[1] == pytest.approx(theirs[1], rel=1e-2)


def test_every_shipped_file_is_covered():
    assert {path.name for path in (ROOT / "ds_configs").iterdir()} == {*FILES, "zero2.json", "zero3_ep.json"}


@pytest.mark.parametrize(
    ("precision", "device", "dtype", "line"),
    [
        ("auto", "cuda", torch.float32, "trains in fp32, which is several times slower than bf16 on cuda"),
        ("fp32", "cuda", torch.bfloat16, "execution.precision=fp32, but the DeepSpeed JSON sets bf16"),
        ("fp32", "cpu", torch.bfloat16, "execution.precision=fp32, but the DeepSpeed JSON sets bf16"),
        ("auto", "cpu", torch.float32, None),
        ("auto", "cuda", torch.bfloat16, None),
        ("fp32", "cuda", torch.float32, None),
    ],
)
def test_fp32_on_a_gpu_must_be_asked_for(precision, device, dtype, line):
    if line is None:
        check_precision(precision, device, dtype)
        return
    with pytest.raises(ValueError, match=line) as caught:
        check_precision(precision, device, dtype)
    assert "\n" not in str(caught.value)


def test_no_product_is_rounded_to_tf32(reports):
    assert all(report["tf32"] is False for report in reports.values())
