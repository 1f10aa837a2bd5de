"""Fixtures of all tests, and the sizes of a tiny training run."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
Training = Callable[..., list[str]]

# Sizes that make a step take milliseconds.
TINY = [
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.moe_intermediate_size=32",
    "data.sequence_length=64",
    "global_batch_size=8",
    "optimizer.warmup_steps=2",
]

# Folders whose files take minutes: a worker that began one of them last would work on alone.
FIRST = ("tests", "pretrain", "slurm", "distill", "experiments")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        folder = item.path.parent.name
        return FIRST.index(folder) if folder in FIRST else len(FIRST)

    items.sort(key=place)


@pytest.fixture
def remote_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers copies the code that it runs into a folder of this test, and imports it from there."""
    import transformers.dynamic_module_utils  # not for all tests

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    forget()
    yield
    forget()


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of the published data sets: DATA_ROOT, else `data/` in the repository."""
    root = Path(os.environ.get("DATA_ROOT", ROOT / "data"))
    if not root.is_dir():
        pytest.skip(f"no data sets at {root}: set DATA_ROOT")
    return root


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from data_pipeline.build import build
    from data_pipeline.recipe import load_recipe

    folder = tmp_path_factory.mktemp("data") / "built"
    overrides = ["sources.0.num_samples=300", "sources.0.levels=[1,3]", "validation_fraction=0.1"]
    build(load_recipe(ROOT / "data_pipeline/recipes/demo.yaml", overrides), ROOT, folder)
    return folder


@pytest.fixture(scope="session")
def training(data_folder: Path) -> Training:
    """The command of the shipped demo config at tiny size, to be launched on any number of ranks."""

    def command(output_dir: Path, *overrides: str) -> list[str]:
        return [
            "pretrain/main.py",
            *("--ds_config", "ds_configs/zero3_ep.json", "--config", "pretrain/configs/demo.yaml"),
            *(*TINY, f"output_dir={output_dir}", f"data.path={data_folder}", *overrides),
        ]

    return command
