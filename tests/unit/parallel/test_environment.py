"""Launchers' variables become ranks, in one order of preference."""

import os

import pytest

from trainer.parallel.distributed import backend
from trainer.parallel.environment import LaunchError, Place, device_index, place

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
STEP = {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7",
}  # fmt: skip


def test_torchrun_comes_before_slurm():
    assert place({**STEP, **TORCHRUN}) == Place(3, 4, 1, ("node0", 29500))


def test_alone_is_one_rank():
    assert place({}) == Place(0, 1, 0, None)


def test_the_shell_of_a_batch_script_is_one_rank():
    shell = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}
    assert place(shell) == Place(0, 1, 0, None)


def test_a_task_of_a_step_is_a_rank():
    assert place(STEP) == Place(1, 1, 1, None)


def test_a_local_job_of_submitit_has_its_ranks_and_one_port():
    job = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "14021", "SUBMITIT_LOCAL_NTASKS": "2"}
    tasks = [{**job, "SUBMITIT_LOCAL_GLOBALID": str(n), "SUBMITIT_LOCAL_LOCALID": str(n)} for n in range(2)]
    assert [place(task) for task in tasks] == [Place(n, 2, n, ("127.0.0.1", 24021)) for n in range(2)]


@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT"])
def test_a_variable_that_several_ranks_need_is_named(name):
    with pytest.raises(LaunchError, match=f"{name} is not set"):
        place({k: v for k, v in TORCHRUN.items() if k != name})


def test_a_rank_that_is_no_number_is_named():
    with pytest.raises(LaunchError, match="WORLD_SIZE=two is not a number"):
        place({**TORCHRUN, "WORLD_SIZE": "two"})


def test_more_ranks_than_devices_are_refused_and_a_task_s_own_device_is_its_first():
    assert device_index(3, 4, {"LOCAL_WORLD_SIZE": "4"}) == 3
    assert device_index(3, 1, {}) == 0
    with pytest.raises(LaunchError, match="8 ranks on this machine, which has 4 GPUs; start at most 4"):
        device_index(5, 4, {"LOCAL_WORLD_SIZE": "8"})


def test_tests_see_no_gpu_nor_do_the_processes_that_they_start():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert backend() == "gloo"
