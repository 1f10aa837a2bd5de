"""Which launcher's variables count. What srun really sets: tests/slurm/."""

import os
import socket
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch

from pretrain import process_group
from pretrain.launch import (
    Process,
    device_number,
    first_host,
    join_slurm_step,
    launchers,
    meeting_place,
    publish_port,
    published_port,
)
from pretrain.process_group import communication_problem

from ..conftest import ROOT

JOB = {"SLURM_JOB_ID": "70123", "SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_NODELIST": "gpu[1-4]"}
STEP = {
    **JOB,
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",  # fewer than the job's
    "SLURM_STEP_NODELIST": "gpu[2-3]",
}


def set_variables(environment: dict[str, str]) -> dict[str, str]:
    """What join_slurm_step adds to this environment or changes in it."""
    with mock.patch.dict(os.environ, environment, clear=True):
        join_slurm_step()
        return dict(os.environ.items() - environment.items())


def test_an_srun_task_takes_its_rank_in_the_step():
    assert set_variables(STEP) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu2",
        "MASTER_PORT": "25123",
    }


def test_the_batch_shell_is_not_a_rank():
    assert set_variables(JOB) == {}


def test_another_launcher_inside_a_step_is_believed():
    assert set_variables({**STEP, "RANK": "3"}) == {}


def test_a_step_of_one_task_is_alone():
    """With the job's port, two runs started in one such shell would collide."""
    assert set_variables({**STEP, "SLURM_STEP_NUM_TASKS": "1"}) == {}


def test_a_port_in_use_and_a_lost_rank_have_different_errors(monkeypatch):
    with socket.socket() as other_run:
        other_run.bind(("127.0.0.1", 0))
        other_run.listen()
        port = other_run.getsockname()[1]
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(torch.distributed.DistError) as caught:
            torch.distributed.TCPStore("127.0.0.1", port, world_size=1, is_master=True)
    problem = (
        f"port {port} is in use, perhaps by another run; give the launcher another --master_port, or srun "
        "another MASTER_PORT"
    )
    assert communication_problem(caught.value) == problem
    lost = communication_problem(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    assert lost is not None
    assert lost.startswith("rank 0 lost another rank, whose own error says why if it had one ([gloo/")
    assert communication_problem(RuntimeError("something else")) is None
    late = RuntimeError("[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1000ms for recv")
    assert str(communication_problem(late)).startswith(
        "rank 0 waited longer than communication_timeout_minutes for another rank; if that one was still at"
    )
    nccl = "NCCL error in: x.cpp:3690, invalid usage (run with NCCL_DEBUG=WARN for details)\nLast error:\n"
    shared = torch.distributed.DistBackendError(f"{nccl}Duplicate GPU detected : rank 0 and rank 1 both on")
    assert str(communication_problem(shared)).startswith("rank 0 shares its GPU with another rank; start as")


def test_steps_of_a_job_have_different_ports():
    ports = {set_variables({**STEP, "SLURM_STEP_ID": str(step)})["MASTER_PORT"] for step in range(100)}
    assert len(ports) == 100


def test_ranks_of_one_machine_meet_where_nobody_else_does(monkeypatch):
    launcher = Process(5, "77")
    monkeypatch.setattr("pretrain.launch.launchers", lambda: [launcher, Process(4, "70")])
    one_node = {**STEP, "SLURM_STEP_NUM_NODES": "1"}
    assert "MASTER_PORT" not in set_variables(one_node)
    for environment, place in (
        (one_node, "70123.0.0"),
        ({**one_node, "SLURM_STEP_ID": "1", "SLURM_RESTART_COUNT": "2"}, "70123.1.2"),
        ({**one_node, "MASTER_PORT": "4000"}, None),
        ({"MASTER_PORT": "29500", "CROSS_SIZE": "1"}, "5-77"),  # deepspeed without --master_port
        ({"MASTER_PORT": "29501", "CROSS_SIZE": "1"}, None),
        ({"MASTER_PORT": "29500", "CROSS_SIZE": "2"}, None),  # two machines
        ({"MASTER_PORT": "29500"}, None),  # torchrun
    ):
        with mock.patch.dict(os.environ, environment, clear=True):
            assert meeting_place() == place


def test_a_port_is_found_by_those_who_come_first_and_last(tmp_path):
    place = f"test-{tmp_path}"[:100]
    with ThreadPoolExecutor(2) as ranks:
        early = ranks.submit(published_port, place)
        publish_port(place, 12345)
        assert early.result(60) == 12345
        assert published_port(place) == 12345


ANCESTORS = """
import subprocess, sys
sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))
"""


def test_launchers_are_found_among_the_ancestors(tmp_path):
    """By script and module, through shells, whatever their arguments are called."""
    for name in ("deepspeed", "harness.py"):
        (tmp_path / name).write_text(ANCESTORS)
    found = "from pretrain.launch import launchers; print(len(launchers()))"
    before = len(launchers())  # those of the tests themselves
    for command, number in (
        ([tmp_path / "deepspeed", "-c", found], 1),
        (["-u", tmp_path / "harness.py", tmp_path / "deepspeed", "-c", found], 1),
        ([tmp_path / "deepspeed", tmp_path / "deepspeed", "-c", found], 2),
        ([tmp_path / "harness.py", "-c", found, "deepspeed", "torchrun"], 0),
    ):
        call = [sys.executable, *map(str, command)]
        done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True)
        assert int(done.stdout) == before + number, command


def test_a_process_runs_until_it_has_ended_even_as_a_zombie():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    stat = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
    process = Process(child.pid, stat[19])
    assert process.runs()
    assert not Process(child.pid, stat[19] + "0").runs()  # another process had this pid
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not process.runs()
    child.communicate()
    assert not process.runs()


def test_a_given_address_is_kept():
    kept = set_variables({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert kept == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(("local", "visible", "number"), [("3", 1, 0), ("0", 1, 0), ("3", 8, 3), ("7", 8, 7)])
def test_a_rank_takes_its_own_gpu_and_the_only_one_it_sees(monkeypatch, local, visible, number):
    monkeypatch.setenv("LOCAL_RANK", local)
    assert device_number(visible) == number


def test_the_device_of_a_rank_is_that_of_every_library(monkeypatch):
    """With a pretended accelerator: LOCAL_RANK, which DeepSpeed reads, becomes the device's number."""
    used: list[int] = []

    def stop_here(**options):
        raise InterruptedError

    accelerator = types.SimpleNamespace(
        device_name=lambda: "cuda",
        device_count=lambda: 1,
        set_device=used.append,
        communication_backend_name=stop_here,
    )
    monkeypatch.setattr(process_group, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(process_group, "prepare_extensions", lambda: None)
    # What init_process_group changes beside them comes back after the test.
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(process_group.distributed_c10d, name, timedelta(minutes=10))
    monkeypatch.setenv("RANK", "11")
    monkeypatch.setenv("MASTER_PORT", "4000")
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(InterruptedError):
        process_group.init_process_group()
    assert (os.environ["LOCAL_RANK"], used) == ("0", [0])


def test_more_ranks_than_gpus_is_one_line(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    message = (
        r"LOCAL_RANK=4 has no GPU of its own, since this process sees 4 \(CUDA_VISIBLE_DEVICES=0,1,2,3\); "
        r"start at most 4 ranks per node, or give each task one GPU \(--gpus-per-task=1\)$"
    )
    with pytest.raises(ValueError, match=message):
        device_number(4)


def test_the_first_host_of_a_list():
    assert first_host("127.0.0.[1-2]") == "127.0.0.1"
    assert first_host("gpu[07-09,12],login") == "gpu07"
    assert first_host("gpu3,gpu[5-6]") == "gpu3"
