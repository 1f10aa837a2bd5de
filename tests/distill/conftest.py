"""Real launches, as in tests/pretrain/, and traced data."""

from pathlib import Path

import pytest

from data_pipeline.build import build
from data_pipeline.recipe import load_recipe

from ..conftest import ROOT
from ..pretrain.conftest import begin, launch

__all__ = ["begin", "launch"]


@pytest.fixture(scope="session")
def traced_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traced") / "built"
    overrides = ["sources.0.num_samples=300", "validation_fraction=0.1"]
    build(load_recipe(ROOT / "data_pipeline/recipes/distill_causal_loop.yaml", overrides), ROOT, folder)
    return folder
