"""Which launcher's variables count. What srun really sets: tests/slurm/."""

import os
import socket
from unittest import mock

import pytest
import torch

from pretrain.launch import first_host, join_slurm_step
from pretrain.process_group import communication_problem

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


def test_a_given_address_is_kept():
    kept = set_variables({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert kept == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}


def test_the_first_host_of_a_list():
    assert first_host("127.0.0.[1-2]") == "127.0.0.1"
    assert first_host("gpu[07-09,12],login") == "gpu07"
    assert first_host("gpu3,gpu[5-6]") == "gpu3"
