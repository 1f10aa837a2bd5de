"""One SLURM for all tests of this folder."""

from collections.abc import Iterator

import pytest

from . import cluster as slurm


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    if missing := slurm.missing():
        pytest.skip(f"no {', '.join(missing)} here: install slurm-wlm and munge (see .ci/run)")
    with slurm.start(tmp_path_factory.mktemp("slurm")) as running:
        yield running
