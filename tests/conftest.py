"""Fixtures of all tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of the published data sets: DATA_ROOT, else `data/` in the repository."""
    root = Path(os.environ.get("DATA_ROOT", Path(__file__).parents[1] / "data"))
    if not root.is_dir():
        pytest.skip(f"no data sets at {root}: set DATA_ROOT")
    return root
