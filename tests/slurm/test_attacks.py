"""Attacks on jobs: killed daemons, one folder or one node for two runs, and mistakes of whoever submits."""

import shlex
import sys

import psutil
import pytest

from common.locks import FolderLock

from .test_jobs import NEVER, ONE_RANK, STEPS, losses, train

pytestmark = pytest.mark.slurm

TWO_RANKS = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1")


def running(name: str, job: str) -> psutil.Process:
    """The process of this name that serves the job's first step, or that asked for it."""
    ranks = [p for p in psutil.process_iter() if _is_rank(p, job)]
    step = ranks[0].parent()
    assert step is not None
    if name == "slurmstepd":
        return step
    return next(p for p in psutil.process_iter() if p.name() == "srun" and _job(p) == job)


def _is_rank(process: psutil.Process, job: str) -> bool:
    try:
        return "pretrain/main.py" in process.cmdline() and _job(process) == job and process.name() != "srun"
    except psutil.Error:
        return False


def _job(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("SLURM_JOB_ID")
    except psutil.Error:
        return None


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["slurmstepd", "srun"])
def test_no_rank_outlives_its_launcher(victim, cluster, training, tmp_path):
    """Ranks notice the end of slurmstepd and save; SLURM itself ends those of a killed srun, at once."""
    job = train(cluster, training, tmp_path, *TWO_RANKS)
    cluster.until(lambda: len(losses(tmp_path)) >= 2, "two steps")
    ranks = [p for p in psutil.process_iter() if _is_rank(p, job)]
    assert len(ranks) == 2
    running(victim, job).kill()
    cluster.until(lambda: not any(map(psutil.Process.is_running, ranks)), "the ranks have ended")
    stopped = len(losses(tmp_path))
    assert 2 <= stopped < STEPS
    saved = (tmp_path / f"checkpoints/step-{stopped}/manifest.json").is_file()
    assert saved == (victim == "slurmstepd"), cluster.output(job)
    cluster.run("scancel", job)
    output = cluster.ends(train(cluster, training, tmp_path, *TWO_RANKS), "COMPLETED")
    assert (f"resuming from {tmp_path}/checkpoints/step-{stopped}" in output) == saved
    assert [step for step, *_ in losses(tmp_path)] == list(range(1, STEPS + 1))


def test_a_second_job_in_a_folder_fails_with_one_line(cluster, training, tmp_path):
    with FolderLock(tmp_path, "a training run", "-"):
        output = cluster.ends(train(cluster, training, tmp_path, *TWO_RANKS), "FAILED")
    (line,) = (line for line in output.splitlines() if line.startswith("error: "))  # SLURM adds its own
    assert line.startswith(f"error: {tmp_path} is in use by a training run, process ")
    assert "Traceback" not in output
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_runs_in_one_job_do_not_meet(cluster, training, tmp_path):
    """Nor do two jobs of an array on one node: the ranks of a step meet on a port that nobody chose."""
    runs = [tmp_path / "first", tmp_path / "second"]
    commands = [
        shlex.join(("srun", "--overlap", "--ntasks=2", sys.executable, *training(run, "max_steps=3", *NEVER)))
        for run in runs
    ]
    job = cluster.submit(*TWO_RANKS, "--wrap", f"{commands[0]} & {commands[1]} & wait")
    cluster.ends(job, "COMPLETED")
    assert [len(losses(run)) for run in runs] == [3, 3]
    assert losses(runs[0]) == losses(runs[1])
    assert all((run / "DONE").exists() for run in runs)


def test_a_folder_of_any_name(cluster, training, tmp_path):
    run = tmp_path / "a run of $HOME & 'more'; *"
    cluster.ends(
        train(cluster, training, run, *ONE_RANK, overrides=("ep_size=1", "max_steps=2")), "COMPLETED"
    )
    assert (run / "DONE").exists()


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        (
            ("--export=ALL,MAX_RESTARTS=many",),
            ("pretrain", "output_dir=x"),
            "MAX_RESTARTS=many is not an int",
        ),
        (("--array=7",), ("eval",), "array index 7 is not one of 0-3 (gsm8k logiqa babi arc)"),
        (("--array=0",), ("eval", "--tasks", "arc"), "each job of the array has its own --tasks; leave it"),
        (("--array=0,2",), ("build",), "the array has gaps, but each of its 2 jobs does a share; submit"),
        (("--chdir=/", "--array=0"), ("eval",), "/ has no eval/run.py; submit from the root"),
        (("--chdir=/",), ("build",), "/ has no data_pipeline/build.py; submit from the root"),
        (("--chdir=/",), ("experiments",), "/ has no experiments/run.py; submit from the root"),
        (("--export=ALL,PYTHON=no",), ("experiments",), "PYTHON=no does not exist; run make setup or set"),
    ],
)
def test_a_mistake_is_one_line(cluster, options, arguments, message):
    script, *rest = arguments
    job = cluster.submit("--gpus-per-node=1", "--cpus-per-task=1", *options, f"slurm/{script}.sbatch", *rest)
    output = cluster.ends(job, "FAILED")
    assert set(output.splitlines()) == {line for line in output.splitlines() if f"error: {message}" in line}
    assert output
