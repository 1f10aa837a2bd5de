"""`make setup-gpu` and `make gpu-check`, as far as a CPU can show them."""

import fcntl
import importlib
import json
import os
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from data_pipeline.tokenization.tokenizer import Tokenizer
from model.backends import attention, experts

from .conftest import ROOT

BENCH = ROOT / "bench"


@pytest.fixture
def bench(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.fixture
def check(bench) -> ModuleType:
    return bench("gpu_check")


@pytest.fixture
def setup(bench, tmp_path, monkeypatch) -> ModuleType:
    module = bench("gpu_setup")
    monkeypatch.setattr(module, "LOGS", tmp_path)
    monkeypatch.setattr(module, "compiler_missing", str)
    return module


@pytest.fixture
def setting(bench, tmp_path) -> Any:
    return bench("gpu_rows").Setting("parity", "cpu", "", "", tmp_path)


def rows(setting: Any) -> dict[str, tuple[str, str]]:
    lines = map(json.loads, setting.rows.read_text().splitlines())
    return {line["what"]: (line["verdict"], line["result"]) for line in lines}


# make setup-gpu

CUMSUM = """\
  static void Run(InputIteratorT d_in,
\t\t  cudaStream_t stream = 0,
\t\t  bool debug_synchronous = false) {
    CUDA_CALL(cub::DeviceScan::%sSum(d_in,
\t\t\t\t\t    stream,
\t\t\t\t\t    debug_synchronous));
"""


def test_the_patch_takes_the_dropped_argument_out(setup, tmp_path):
    (tmp_path / "csrc").mkdir()
    source = tmp_path / "csrc" / "cumsum.h"
    source.write_text(CUMSUM % "Exclusive" + CUMSUM % "Inclusive")
    setup.patch_megablocks(tmp_path)
    assert "debug_synchronous" not in source.read_text()
    assert source.read_text().count("cudaStream_t stream = 0) {") == 2
    assert "ExclusiveSum(d_in,\n\t\t\t\t\t    stream));" in source.read_text()
    with pytest.raises(ValueError, match="is not that of megablocks 0.10.0; adapt patch_megablocks"):
        setup.patch_megablocks(tmp_path)  # other sources than those it was written for


def test_every_pinned_package_is_known_and_every_backend_has_one(setup):
    assert setup.read_pins().keys() == setup.PACKAGES.keys()
    uses = " ".join(package.use for package in setup.PACKAGES.values())
    for backend in ("attention=flash_attn", "attention=flash_attn_4", "experts=megablocks"):
        assert f"execution.{backend}" in uses
    assert "flash_attn_4" in attention._BACKENDS
    assert "megablocks" in experts._PRODUCTS


def test_one_failure_leaves_the_others_installed_and_what_works_is_left_alone(setup, monkeypatch, capsys):
    installed, asked = {"einops"}, []

    def broken(name: str, version: str) -> str | None:
        return None if name in installed else f"No module named {name}"

    def pip(arguments: tuple[str, ...], environment: dict[str, str], output: int) -> bool:
        name = arguments[-1].partition("==")[0]
        asked.append(name)
        os.write(output, b"error: the compiler of %s\n" % name.encode())
        if name != "grouped_gemm":
            installed.add(name)
        return name != "grouped_gemm"

    def unfit(sources: Path) -> None:
        raise ValueError("cumsum.h is not that of megablocks")

    monkeypatch.setattr(setup, "broken", broken)
    monkeypatch.setattr(setup, "_pip", pip)
    monkeypatch.setattr(setup.tarfile, "open", lambda path: _Archive())
    monkeypatch.setitem(
        setup.PACKAGES, "megablocks", setup.Package(("megablocks",), "experts", compiled=True, patch=unfit)
    )
    monkeypatch.setattr(sys, "argv", ["gpu_setup.py", "--only", "einops,grouped_gemm,megablocks,flash-attn"])
    with pytest.raises(SystemExit) as ended:
        setup.main()
    assert ended.value.code == 1
    assert asked == ["grouped_gemm", "megablocks", "flash-attn"]
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if "  " in line}
    assert "works" in lines["einops"]
    assert "works" in lines["flash-attn"]
    assert "FAILED" in lines["grouped_gemm"]
    assert "the compiler of grouped_gemm (see " in lines["grouped_gemm"]
    assert "cumsum.h is not that of megablocks" in lines["megablocks"]


class _Archive:
    def __enter__(self) -> "_Archive":
        return self

    def __exit__(self, *error: Any) -> None: ...

    def extractall(self, folder: Path, filter: str) -> None: ...


def test_a_package_is_broken_until_its_version_and_modules_are_there(setup, monkeypatch):
    monkeypatch.setitem(setup.PACKAGES, "pytest", setup.Package(("pytest",), "a test"))
    assert setup.broken("pytest", pytest.__version__) is None
    assert f"version {pytest.__version__} is installed" in setup.broken("pytest", "0.1")
    monkeypatch.setitem(setup.PACKAGES, "pytest", setup.Package(("pytest_cuda",), "a test"))
    assert setup.broken("pytest", pytest.__version__) == (
        "ModuleNotFoundError: No module named 'pytest_cuda'"
    )


def test_what_is_compiled_for(setup, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert setup.build_environment({})["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0;10.0"
    assert setup.build_environment({})["FLASH_ATTN_CUDA_ARCHS"] == "80;90;100"
    given = setup.build_environment({"TORCH_CUDA_ARCH_LIST": "8.6+PTX", "MAX_JOBS": "2"})
    assert given == {"TORCH_CUDA_ARCH_LIST": "8.6+PTX", "FLASH_ATTN_CUDA_ARCHS": "80", "MAX_JOBS": "2"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (9, 0))
    assert setup.build_environment({})["TORCH_CUDA_ARCH_LIST"] == "9.0"


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
def test_a_torch_without_cuda_is_named(bench):
    assert "has no CUDA; install torch's CUDA build" in bench("gpu_setup").compiler_missing()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\ncumsum.h(34): error: no instance\nRuntimeError: ninja\nerror: metadata", "(34): error: no inst"),
        ("Traceback\nAssertionError: no CUDA\n\nnote: pip\nerror: metadata-generation-failed", "no CUDA"),
        ("killed\n\n", "killed"),
        ("", "it printed nothing"),
    ],
)
def test_the_line_that_says_most(setup, text, line):
    assert line in setup.last_error(text)


# make gpu-check


def test_the_shares_are_the_whole_time_and_parity_comes_first(check):
    assert sum(one.share for one in check.CHECKS) == pytest.approx(1)
    assert check.NAMES[:3] == ("parity", "waits", "real size")


def test_what_is_measured_by_default_exists(check, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    arguments = check._parse()
    assert (ROOT / arguments.config).is_file()
    assert (ROOT / arguments.ds_config).is_file()


@pytest.fixture
def scripted(check, tmp_path, monkeypatch) -> Any:
    """Runs checks whose processes only run some Python, which may add lines to the table by `note(...)`."""

    def run(seconds: float = 600, **scripts: str) -> tuple[list[Any], dict[str, Any]]:
        script = tmp_path / "child.py"
        script.write_text(
            f"import json, os, signal, sys\nsys.path.insert(0, {str(BENCH)!r})\n"
            "from pathlib import Path\nfrom gpu_rows import Setting\nname = sys.argv[-1]\n"
            f"note = Setting(name, 'cpu', '', '', Path({str(tmp_path)!r})).note\n"
            f"exec({scripts!r}[name])\n"
        )
        monkeypatch.setattr(check, "__file__", str(script))
        monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
        checks = [check.Check(name, 1 / len(scripts), print) for name in scripts]
        out = tmp_path / "out.json"
        found = check.run(checks, tmp_path, out, seconds, {"device": "none"})
        return found, json.loads(out.read_text())

    return run


def test_a_failed_check_keeps_its_lines_and_stops_no_other(scripted, capsys):
    found, report = scripted(
        first="note('speed', 'measured', '3 tokens/s', rate=3); sys.exit('error: no data')",
        second="note('speed', 'ok', '4 tokens/s')",
    )
    assert [(row.check, row.what, row.verdict) for row in found] == [
        ("first", "speed", "measured"),
        ("first", "finished", "FAILED"),
        ("second", "speed", "ok"),
        ("second", "finished", "ok"),
    ]
    assert found[1].result.startswith("no data (see ")
    assert report["rows"][0]["figures"] == {"rate": 3}
    assert report["machine"] == {"device": "none"}
    table = capsys.readouterr().out
    assert "first   speed     measured  3 tokens/s" in table


def test_a_check_out_of_time_is_killed_with_its_processes(scripted, check, tmp_path, monkeypatch):
    ready, held = tmp_path / "ready", tmp_path / "held"
    os.mkfifo(ready)

    class Impatient(subprocess.Popen):
        """Its time is over when its process has started another one."""

        def wait(self, timeout: float | None = None) -> int:
            if timeout is not None and self.args[-1] == "slow":
                ready.read_text()
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait(timeout)

    monkeypatch.setattr(check.subprocess, "Popen", Impatient)
    found, _ = scripted(
        slow=f"import fcntl; note('one', 'ok', ''); lock = open({str(held)!r}, 'w')\n"
        "if os.fork(): signal.pause()\n"
        f"fcntl.flock(lock, fcntl.LOCK_EX); Path({str(ready)!r}).write_text('x'); signal.pause()",
        next="note('two', 'ok', '')",
    )
    assert [row.verdict for row in found] == ["ok", "FAILED", "ok", "ok"]
    assert "did not finish in 300 s" in found[1].result
    with held.open() as lock:  # its second process has ended too, and so has let go
        fcntl.flock(lock, fcntl.LOCK_EX)


def test_an_interrupt_keeps_what_was_found(scripted, check):
    found, report = scripted(
        first="note('one', 'ok', '')",
        second="note('two', 'ok', ''); os.kill(os.getppid(), signal.SIGINT); signal.pause()",
        third="note('three', 'ok', '')",
    )
    verdicts = [(row.what, row.verdict) for row in found]
    assert verdicts == [("one", "ok"), ("finished", "ok"), ("two", "ok"), *[("finished", "not run")] * 2]
    assert [row["result"] for row in report["rows"][-2:]] == ["interrupted"] * 2


def test_parity_names_the_backend_that_errs(bench, setting, monkeypatch):
    parity = bench("gpu_parity")
    monkeypatch.setattr(parity, "ATTENTION_BACKENDS", ("sdpa", "blockwise"))
    monkeypatch.setattr(parity, "SLOW", "varlen")
    monkeypatch.setattr(parity, "EXPERT_BACKENDS", ("grouped_mm", "loop"))
    one_case = parity.attention_cases()[:1]
    monkeypatch.setattr(parity, "attention_cases", lambda: one_case)
    right, emulated, calls = attention._BACKENDS["blockwise"], parity.fp8_forward, list[int]()

    def wrong_scale(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        calls.append(1)  # the first call is the emulation's
        return emulated(rows, weight) * (1.01 if len(calls) > 1 else 1)

    monkeypatch.setattr(parity, "fp8_forward", wrong_scale)

    def broken_kernel(counts: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setitem(attention._BACKENDS, "blockwise", lambda *given: 0.999 * right(*given))
    monkeypatch.setitem(experts._PRODUCTS, "grouped_mm", broken_kernel)
    parity.check(setting)
    found = rows(setting)
    assert found["attention sdpa fp32"][0] == "ok"
    assert found["attention blockwise fp32"][0] == "FAILED"
    assert found["attention varlen fp32"][0] == "n/a"
    assert "needs a GPU" in found["attention varlen fp32"][1]
    assert found["experts grouped_mm bf16"][0] == "FAILED"
    assert "illegal memory access" in found["experts grouped_mm bf16"][1]
    assert found["experts loop bf16"][0] == "ok"
    assert found["FP8, linear"][0] == "FAILED"
    assert found["FP8, experts, to weight"][0] == "ok"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_parity_of_every_backend_on_a_gpu(bench, setting):
    bench("gpu_parity").check(bench("gpu_rows").Setting("parity", "cuda", "", "", setting.work))
    failed = {what: result for what, (verdict, result) in rows(setting).items() if verdict == "FAILED"}
    assert not failed


def test_waits_are_counted_by_the_line_of_ours_that_waits(bench):
    training = bench("gpu_training")
    counted = training.Waits()
    ours = compile("\n\nwarn('called a synchronizing CUDA operation')", str(ROOT / "model/moe.py"), "exec")
    with counted:
        for _ in range(3):
            exec(ours, {"warn": warnings.warn})
    assert counted.places == {"model/moe.py:3": 3}


def test_waits_inside_deepspeed_are_told_apart(bench):
    def stack(*files: str) -> list[traceback.FrameSummary]:
        return [traceback.FrameSummary(file, 7, "f") for file in files]

    place_of, engine = bench("gpu_training").place_of, str(ROOT / "pretrain/engine.py")
    inside = "/lib/site-packages/deepspeed/runtime/engine.py"
    assert place_of(stack("/x.py", engine, inside)) == "pretrain/engine.py:7 > deepspeed/runtime/engine.py:7"
    assert place_of(stack(engine, inside, str(ROOT / "model/moe.py"))) == "model/moe.py:7"
    assert place_of(stack("/x.py")) == "outside model/ and pretrain/"


def test_a_wider_tokenizer_reads_texts_as_before(bench, data_folder, tmp_path):
    narrow = Tokenizer(data_folder / "tokenizer.model")
    model = bench("gpu_training").widened((data_folder / "tokenizer.model").read_bytes(), 2000)
    (tmp_path / "tokenizer.model").write_bytes(model)
    wide, text = Tokenizer(tmp_path / "tokenizer.model"), "a = 3 + 4; unused12 ⁇"
    assert wide.vocab_size == narrow.vocab_size + 2000
    assert wide.encode(text) == narrow.encode(text)


def test_losses_are_compared_step_by_step(bench):
    farthest = bench("gpu_training").farthest
    assert farthest([{"loss": 2.0}, {"loss": 3.3}], [{"loss": 2.0}, {"loss": 3.0}]) == pytest.approx(0.1)
    assert farthest([{"loss": None}], [{"loss": 2.0}]) == float("inf")


def test_packed_rows_hold_several_documents(bench):
    packed = bench("measuring").packed_rows(3, 64, "cpu")
    starts, documents = packed["cu_seqlens"], packed["documents"]
    assert (starts[:, 0] == 0).all()
    assert (starts[:, -1] == 64).all()
    assert (starts.diff() >= 0).all()
    assert documents.boundaries[-1] == 3 * 64
    assert documents.longest == documents.boundaries.diff().max() <= 64
    assert len(documents.boundaries) > 2 * 3
    assert (documents.boundaries.diff() == 1).any()


@pytest.mark.slow
def test_all_but_the_kernels_on_a_cpu(tmp_path):
    """The command itself: every check on real parts, at tiny sizes."""
    out, work = tmp_path / "check.json", tmp_path / "work"
    command = [sys.executable, "bench/gpu_check.py", "--device", "cpu", "--minutes", "40"]
    done = subprocess.run(
        [*command, "--out", str(out), "--work", str(work)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    found = {(row["check"], row["what"]): row for row in report["rows"]}
    assert {check for check, what in found if what == "finished"} == {
        *("parity", "waits", "real size", "fp8", "resume", "decode", "backends")
    }
    assert not [row for row in report["rows"] if row["verdict"] == "FAILED"]
    assert found["real size", "20 steps"]["figures"]["losses"][-1] < 5.5
    assert found["resume", "losses after kill -9"]["figures"]["steps"] >= 1
    assert 0 < found["fp8", "losses in FP8"]["figures"]["distance"] < 0.02
    assert found["parity", "attention blockwise fp32"]["verdict"] == "ok"
