"""The shipped scripts under a real SLURM of two nodes."""

import json
import re
from pathlib import Path

import pytest

from data_pipeline.build import build
from data_pipeline.recipe import load_recipe
from pretrain.launch import first_host

from ..conftest import ROOT, Training
from ..pretrain.conftest import finish, start
from .cluster import Cluster

pytestmark = pytest.mark.slurm

TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
ONE_RANK = ("--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
STEPS = 30
NEVER = ("save_every=1000", "eval_every=0")  # only stopping saves a checkpoint


def losses(run: Path) -> list[tuple[int, float, float]]:
    """(step, loss, grad_norm) of every whole line of metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records]


def train(
    cluster: Cluster, training: Training, run: Path, *options: str, overrides: tuple[str, ...] = ()
) -> str:
    """Submits the tiny training with these options of sbatch; the job's id."""
    main, *arguments = training(run, f"max_steps={STEPS}", *NEVER, *overrides)
    assert main == "pretrain/main.py"
    return cluster.submit(*options, "slurm/pretrain.sbatch", *arguments)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, training: Training, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run on two nodes."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    output = cluster.ends(train(cluster, training, run, *TWO_NODES), "COMPLETED")
    assert "2 ranks, ep_size 2, ZeRO stage 3" in output
    assert f"done: {STEPS} steps" in output
    return run


def test_two_nodes_train_as_two_ranks_of_deepspeed_do(undisturbed, training, tmp_path):
    """Bit-exactly."""
    assert (undisturbed / "DONE").read_text() == f"{STEPS}\n"
    finish(start(2, *training(tmp_path, "max_steps=3", f"optimizer.decay_steps={STEPS}", *NEVER)))
    assert len(losses(undisturbed)) == STEPS
    assert losses(undisturbed)[:3] == losses(tmp_path)


def test_a_preempted_run_is_requeued_and_repeats_the_undisturbed_one(
    cluster, undisturbed, training, tmp_path
):
    """Bit-exactly; a job in the partition `urgent` takes its nodes in between."""
    job = train(cluster, training, tmp_path, *TWO_NODES)
    cluster.until(lambda: len(losses(tmp_path)) >= 3, "three steps")
    urgent = cluster.submit("--nodes=2", "--exclusive", "--partition=urgent", "--wrap", "srun hostname")
    cluster.ends(urgent, "COMPLETED")
    assert not (tmp_path / "DONE").exists()
    output = cluster.ends(job, "COMPLETED")
    assert output.count("asked to stop, saving a checkpoint") == 1
    stopped = re.search(r"stopped after step (\d+) by the file", output)
    assert stopped is not None
    assert f"resuming from {tmp_path}/checkpoints/step-{stopped[1]}" in output
    assert cluster.restarts(job) == 1
    assert losses(tmp_path) == losses(undisturbed)


def test_restarts_are_bounded_and_a_cancelled_job_stays_cancelled(cluster, training, tmp_path):
    def submit(*options: str) -> str:
        return train(cluster, training, tmp_path, *ONE_RANK, *options, overrides=("ep_size=1",))

    # SIGTERM to the ranks alone is what a pre-emption sends where the site has no preempt_send_user_signal.
    job = submit("--export=ALL,MAX_RESTARTS=0")
    cluster.until(lambda: losses(tmp_path), "a step")
    cluster.run("scancel", "--signal=TERM", job)
    output = cluster.ends(job, "FAILED")
    assert "error: restarted 0 times, MAX_RESTARTS=0; submit again, which continues" in output
    stopped = len(losses(tmp_path))
    assert (tmp_path / f"checkpoints/step-{stopped}").is_dir()

    job = submit()
    cluster.until(lambda: len(losses(tmp_path)) > stopped, "a further step")
    cluster.run("scancel", job)
    cluster.ends(job, "CANCELLED")
    assert cluster.restarts(job) == 0
    assert not (tmp_path / "DONE").exists()


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ((), (), "no output_dir=... among the arguments"),
        ((), ("output_dir=runs/x", "no.such.key=1"), "error: the following arguments are required"),
        (("--chdir=/",), ("output_dir=runs/x",), "/ has no pretrain/main.py; submit from the root"),
        (("--export=ALL,PYTHON=no/python",), ("output_dir=runs/x",), "PYTHON=no/python does not exist"),
    ],
)
def test_a_mistake_ends_the_job_with_one_line(cluster, options, arguments, message):
    job = cluster.submit(*ONE_RANK, *options, "slurm/pretrain.sbatch", *arguments)
    assert message in cluster.ends(job, "FAILED")


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sbatch")), ids=lambda path: path.name)
def test_sbatch_accepts_every_script_as_it_is(cluster, script):
    assert "to start at" in cluster.run("sbatch", "--test-only", script).stderr


def test_sbatch_accepts_the_commands_of_the_readme(cluster):
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^sbatch (.*)$", text, flags=re.M)
    assert {Path(name).name for name in re.findall(r"slurm/\S+", " ".join(commands))} == {
        "build.sbatch",
        "pretrain.sbatch",
        "eval.sbatch",
        "experiments.sbatch",
    }
    for command in commands:
        assert "to start at" in cluster.run("sbatch", "--test-only", *command.split()).stderr


def test_an_array_runs_the_four_evaluations(cluster, undisturbed, data_root, tmp_path):
    paths = ("--checkpoint", undisturbed / "export", "--data", data_root, "--output_path", tmp_path)
    job = cluster.submit(
        "--cpus-per-task=1", "slurm/eval.sbatch", *paths, "--limit", 1, "--max_new_tokens", 4
    )
    cluster.ends(job, "COMPLETED")
    reports = [json.loads(path.read_text())["results"] for path in tmp_path.glob("results_*.json")]
    assert len(reports) == 4
    for task in ("gsm8k", "logiqa", "babi", "arc_easy", "arc_challenge"):
        assert sum(task in report for report in reports) == 1, task


@pytest.mark.slow
def test_an_array_runs_the_cells_of_a_matrix(cluster, tmp_path):
    """Two at once, which share one build of the data."""
    options = ("--array=0-1", "--cpus-per-task=1", "--gpus-per-node=1")
    arguments = ("--matrix", "tests/experiments/tiny.yaml", "--out", tmp_path)
    cluster.ends(cluster.submit(*options, "slurm/experiments.sbatch", *arguments), "COMPLETED")
    records = [json.loads(path.read_text()) for path in tmp_path.glob("cells/**/cell.json")]
    assert {record["group"] for record in records} == {"loop", "dense_narrow"}


def test_an_array_builds_the_shards_of_one_process(cluster, tmp_path):
    text = "".join(f"Part {i}. " + "Water under the bridge. " * 80 + "\n\n" for i in range(60))
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(text.replace("Part", f"Text {number}, part"))
    source = {"name": "text", "kind": "text", "weight": 1, "files": ["*.txt"], "cleaning": ["exact"]}
    recipe = {"name": "r", "tokenizer": {"vocab_size": 400}, "sources": [source]}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    arguments = ("--recipe", tmp_path / "r.yaml", "--data", tmp_path)
    build(load_recipe(tmp_path / "r.yaml"), tmp_path, tmp_path / "one")
    for options in (("--array=0-1",), ("--plan_only",), ("--array=0-1",), ()):
        before = [option for option in options if option.startswith("--array")]
        after = [option for option in options if option not in before]
        script = (*before, "--cpus-per-task=1", "slurm/build.sbatch", *arguments, "--out", tmp_path / "out")
        cluster.ends(cluster.submit(*script, *after), "COMPLETED")
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "out")]
    assert files[0] == files[1]
    assert "manifest.json" in files[0]


@pytest.mark.parametrize(
    "nodes", ["127.0.0.[1-2]", "gpu[07-09,12],login", "a", "a,b", "r2-gpu[5,7-9],r3-gpu1"]
)
def test_the_first_host_is_the_one_scontrol_names(cluster, nodes):
    assert first_host(nodes) == cluster.run("scontrol", "show", "hostnames", nodes).stdout.split()[0]
