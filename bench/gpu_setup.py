"""Installs the optional GPU backends of requirements-gpu.txt one by one and says which of them work.

    python bench/gpu_setup.py [--only NAME,...]      (make setup-gpu)

A package that is installed at its pinned version and imports is left alone, so that the command continues
where it was interrupted. One package's failure stops no other. Packages without a wheel are compiled for
TORCH_CUDA_ARCH_LIST: the variable, else the GPUs that are here, else "8.0;9.0;10.0". MAX_JOBS limits the
compilers that run at once; flash-attn takes hours on a few cores. The exit status is 1 if a package does not
work; everything else runs without it.
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from measuring import check_choices, listed, print_table
from torch.utils.cpp_extension import CUDA_HOME

from common.errors import user_errors

ROOT = Path(__file__).parents[1]
PINS, LOGS = ROOT / "requirements-gpu.txt", ROOT / "runs" / "setup_gpu"
ARCHITECTURES = "8.0;9.0;10.0"  # where no GPU is to be seen: A100, H100 and H200, B200


@dataclass(frozen=True)
class Package:
    """A line of requirements-gpu.txt."""

    modules: tuple[str, ...]  # what must import, compiled parts included
    use: str
    compiled: bool = False
    own_needs: bool = False  # pip may install what it needs, with torch held where it is
    patch: Callable[[Path], None] | None = None  # of the unpacked sources


@dataclass(frozen=True)
class Result:
    name: str
    version: str
    status: str  # works | not built | FAILED
    seconds: float
    reason: str


def patch_megablocks(sources: Path) -> None:
    """Drops the argument `debug_synchronous`, which CUB's scans no longer have (CCCL 3, in CUDA 13).

    It was always false. Apache-2.0; all other sources of 0.10.0 compile as they are.

    Raises:
        ValueError: the sources are not those that this was written for.
    """
    path = sources / "csrc" / "cumsum.h"
    text, declared = re.subn(r",\s*bool debug_synchronous = false\)", ")", path.read_text())
    text, passed = re.subn(r",\s*debug_synchronous\)", ")", text)
    if (declared, passed) != (2, 2):
        raise ValueError(f"{path} is not that of megablocks 0.10.0; adapt patch_megablocks to it")
    path.write_text(text)


PACKAGES = {
    "einops": Package(("einops",), "flash-attn needs it"),
    "stanford-stk": Package(("stk.matrix",), "megablocks needs it"),
    "grouped_gemm": Package(("grouped_gemm",), "megablocks needs it", compiled=True),
    "megablocks": Package(
        ("megablocks.grouped_gemm_util", "megablocks_ops"),
        "execution.experts=megablocks",
        compiled=True,
        patch=patch_megablocks,
    ),
    "flash-attn": Package(
        ("flash_attn", "flash_attn_2_cuda"), "execution.attention=flash_attn", compiled=True
    ),
    "flash-attn-4": Package(("flash_attn.cute",), "execution.attention=flash_attn_4", own_needs=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Install the optional GPU backends.")
    parser.add_argument("--only", type=listed, default=list(PACKAGES), help="comma-separated (default: all)")
    arguments = parser.parse_args()
    with user_errors(ValueError, OSError):
        check_choices("only", arguments.only, tuple(PACKAGES))
        LOGS.mkdir(parents=True, exist_ok=True)
        pins, environment = read_pins(), build_environment(os.environ)
        print(f"compiling for {environment['TORCH_CUDA_ARCH_LIST']}; logs in {LOGS}", flush=True)
        results = []
        for name in PACKAGES:
            if name in arguments.only:
                print(f"{name} ...", flush=True)
                results.append(install(name, pins[name], environment))
    print_results(results)
    sys.exit(any(result.status in ("FAILED", "not built") for result in results))


def read_pins() -> dict[str, str]:
    """Package -> version, from requirements-gpu.txt."""
    return dict(re.findall(r"^(\S+)==(\S+)", PINS.read_text(), flags=re.M))


def build_environment(given: Mapping[str, str]) -> dict[str, str]:
    """The environment of the compilers; what the user set stays.

    flash-attn reads a list of its own, in which all GPUs of a generation share a number.
    """
    here = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    found = ";".join(f"{major}.{minor}" for major, minor in sorted(here)) or ARCHITECTURES
    architectures = given.get("TORCH_CUDA_ARCH_LIST") or found
    generations = sorted({int(number) for number in re.findall(r"(\d+)\.\d", architectures)})
    flash = ";".join(f"{number}0" for number in generations)
    return {"FLASH_ATTN_CUDA_ARCHS": flash, **given, "TORCH_CUDA_ARCH_LIST": architectures}


def install(name: str, version: str, environment: Mapping[str, str]) -> Result:
    """Installs one package unless it works already; builds it if it has to be."""
    package, started = PACKAGES[name], time.perf_counter()

    def result(status: str, reason: str = "") -> Result:
        return Result(name, version, status, time.perf_counter() - started, reason)

    if broken(name, version) is None:
        return result("works")
    if package.compiled and (missing := compiler_missing()):
        return result("not built", missing)
    log = LOGS / f"{name}.log"
    with log.open("w") as output:
        try:
            done = _build(name, version, lambda *pip: _pip(pip, environment, output.fileno()))
        except ValueError as error:  # the patch does not fit: the other packages are still installed
            return result("FAILED", str(error))
    if not done:
        return result("FAILED", f"{last_error(log.read_text())} (see {log})")
    problem = broken(name, version)
    return result("works") if problem is None else result("FAILED", problem)


def _build(name: str, version: str, pip: Callable[..., bool]) -> bool:
    """Whether pip could install a package."""
    package, pin, alone = PACKAGES[name], f"{name}=={version}", ("--no-deps", "--no-build-isolation")
    if package.own_needs:
        return pip("install", pin, f"torch=={torch.__version__}")
    if package.patch is None:
        return pip("install", *alone, pin)
    folder = LOGS / "sources"
    if not pip("download", *alone, "--no-binary", ":all:", "--dest", str(folder), pin):
        return False
    with tarfile.open(folder / f"{name}-{version}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    package.patch(folder / f"{name}-{version}")
    return pip("install", *alone, str(folder / f"{name}-{version}"))


def _pip(arguments: tuple[str, ...], environment: Mapping[str, str], output: int) -> bool:
    command = [sys.executable, "-m", "pip", *arguments]
    done = subprocess.run(command, env=dict(environment), stdout=output, stderr=output, check=False)
    return done.returncode == 0


def broken(name: str, version: str) -> str | None:
    """Why a package cannot be used, in one line, asked in a process of its own; None: it imports."""
    script = (
        "import importlib, importlib.metadata as metadata, sys\n"
        "name, version, *modules = sys.argv[1:]\n"
        "found = metadata.version(name)\n"
        "assert found == version, f'version {found} is installed'\n"
        "for module in modules: importlib.import_module(module)"
    )
    command = [sys.executable, "-c", script, name, version, *PACKAGES[name].modules]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else last_error(done.stderr)


def compiler_missing() -> str:
    """What is missing to compile CUDA sources here, with the fix; empty: nothing."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA; install torch's CUDA build first"
    if CUDA_HOME is None:
        return f"nvcc is missing; install the toolkit of CUDA {torch.version.cuda}, or set CUDA_HOME"
    return ""


def last_error(text: str) -> str:
    """The line of a build's output that says most: the first compiler error, else the last error or line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    compilers = [line for line in lines if re.search(r"\berror:", line) and not line.startswith("error:")]
    # pip's own last word, such as metadata-generation-failed, says nothing.
    raised = [x for x in lines if re.match(r"(error: \S+ \S|\w*(Error|Exception)\b)", x)]
    return (compilers[:1] or raised[-1:] or lines[-1:] or ["it printed nothing"])[0][:200]


def print_results(results: list[Result]) -> None:
    lines: list[tuple[str, ...]] = [("package", "version", "status", "seconds", "for", "why not")]
    for r in results:
        lines.append((r.name, r.version, r.status, f"{r.seconds:.0f}", PACKAGES[r.name].use, r.reason))
    print_table(lines)


if __name__ == "__main__":
    main()
