"""The shipped scripts under a real SLURM of two nodes."""

import json
from pathlib import Path

import pytest

from ..conftest import ROOT, TINY
from .cluster import Cluster, until

pytestmark = pytest.mark.slurm

SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
TRAIN = ("--ds_config", "ds_configs/zero3_ep.json", "--config", "pretrain/configs/demo.yaml", *TINY)
STEPS = ("max_steps=100", "save_every=1000", "eval_every=0")


def losses(run: Path) -> list[tuple[int, float, float]]:
    """(step, loss, grad_norm) of every whole line of metrics.jsonl."""
    if not (run / "metrics.jsonl").exists():
        return []
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records]


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two nodes that nobody disturbs."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    paths = (f"output_dir={run}", f"data.path={data_folder}")
    output = cluster.wait(cluster.submit(*TWO_NODES, "slurm/pretrain.sbatch", *TRAIN, *paths, *STEPS), 120)
    assert "2 ranks, ep_size 2, ZeRO stage 3" in output
    assert "done: 100 steps" in output
    return run


def test_two_nodes_train(undisturbed):
    assert (undisturbed / "DONE").read_text() == "100\n"
    assert [step for step, _, _ in losses(undisturbed)] == list(range(1, 101))
