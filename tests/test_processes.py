"""Which rank a process is, from the variables of torchrun and of srun."""

import os
import signal
import subprocess

import pytest

from pipelines import processes
from pipelines.config import UserError

NAMES = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_LOCALID"]
NAMES += ["SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_process_alone_is_the_first_of_one(environment: pytest.MonkeyPatch) -> None:
    assert (processes.rank(), processes.world_size()) == (0, 1)
    assert (processes.local_rank(), processes.local_world_size()) == (0, 1)


def test_torchrun_is_believed_before_slurm(environment: pytest.MonkeyPatch) -> None:
    # torchrun in a batch script: SLURM knows one task per machine
    given = {"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}
    for name, value in (given | {"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}).items():
        environment.setenv(name, value)
    assert (processes.rank(), processes.local_rank(), processes.local_world_size()) == (6, 2, 4)


@pytest.mark.parametrize("tasks", ["4(x2)", "4", "4,4"])
def test_srun_tells_the_local_numbers(environment: pytest.MonkeyPatch, tasks: str) -> None:
    for name, value in {"RANK": "6", "WORLD_SIZE": "8", "SLURM_LOCALID": "2"}.items():
        environment.setenv(name, value)
    environment.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
    environment.setenv("SLURM_NTASKS_PER_NODE", "7")  # the job's, where this step has another
    assert (processes.local_rank(), processes.local_world_size()) == (2, 4)
    environment.delenv("SLURM_STEP_TASKS_PER_NODE")
    environment.setenv("SLURM_NTASKS_PER_NODE", "8")
    assert processes.local_world_size() == 8


@pytest.mark.parametrize("tasks", ["4,3", "3(x2)", "5(x2),6"])
def test_machines_with_different_numbers_of_processes_are_refused(environment: pytest.MonkeyPatch, tasks: str) -> None:
    environment.setenv("WORLD_SIZE", "8")
    environment.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
    with pytest.raises(UserError, match="expected the same number of processes on every machine"):
        processes.local_world_size()


def test_ranks_that_cannot_know_their_machine_are_refused(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("WORLD_SIZE", "8")
    with pytest.raises(UserError, match="LOCAL_RANK.*torchrun or srun"):
        processes.local_rank()
    with pytest.raises(UserError, match="LOCAL_WORLD_SIZE.*torchrun or srun"):
        processes.local_world_size()


def test_a_command_outside_the_ranks_keeps_all_else(environment: pytest.MonkeyPatch) -> None:
    dropped = (*processes.OF_A_RANK, "GROUP_RANK", "TORCHELASTIC_RUN_ID", "HF_TOKEN")
    for name in (*dropped, "KEPT"):
        environment.setenv(name, "1")
    found = processes.environment_outside_ranks("HF_TOKEN")
    assert found["KEPT"] == "1" and not {*dropped} & found.keys()


def test_descendants_are_told_from_the_top() -> None:
    with subprocess.Popen(["bash", "-c", "bash -c 'sleep 60 & wait' & wait"]) as top:
        try:
            while len(found := processes.descendants(top.pid)) < 3:
                assert top.poll() is None
            assert found[:2] == [top.pid, *processes.children(top.pid)] and len(set(found)) == 3
        finally:
            for pid in reversed(processes.descendants(top.pid)):
                os.kill(pid, signal.SIGKILL)
    assert processes.children(top.pid) == []
