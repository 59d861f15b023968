"""Who this process is among those that torchrun or srun started. Imports no torch.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. Under srun the launcher sets the first two, and SLURM
itself knows the last two under other names.
"""

import ctypes
import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

from pipelines.config import UserError

# What tells a process that it is one of several; a command that starts ranks of its own must not inherit it.
OF_A_RANK = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE"),
)
OF_TORCHRUN = "TORCHELASTIC_"  # how the names of torchrun's other variables begin
OF_A_JOB = ("SLURM_", "SBATCH_", "STILLHOUSE_", OF_TORCHRUN)  # beginnings of the names that each job has of its own
STARTED = "STILLHOUSE_STARTED"  # environment variable: seconds since 1970 at which the parent started this stage


def environment_outside_ranks(*without: str) -> dict[str, str]:
    """This process's environment without OF_A_RANK and OF_TORCHRUN, and `without` those of these names."""
    dropped = (*OF_A_RANK, *without)
    return {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith(OF_TORCHRUN)}


def end_with_parent() -> None:
    """Linux: this process gets SIGTERM when its parent dies, so that kill -9 of the parent leaves no ranks behind."""
    PR_SET_PDEATHSIG = 1
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def children(pid: int) -> list[int]:
    """The processes that its main thread has started and that are still there; none of a process that is gone."""
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def descendants(pid: int) -> list[int]:
    """The process itself first, each before its children."""
    return [pid, *(one for child in children(pid) for one in descendants(child))]


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process among those of its machine: LOCAL_RANK, or SLURM_LOCALID. Raises UserError where neither is set."""
    if world_size() == 1 and "LOCAL_RANK" not in os.environ:
        return 0
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        if name in os.environ:
            return int(os.environ[name])
    raise UserError(
        f"LOCAL_RANK: expected this process's number on its machine, of the {world_size()} processes in all, found "
        "neither LOCAL_RANK nor SLURM_LOCALID. Start the ranks with torchrun or srun, or set LOCAL_RANK."
    )


def local_world_size() -> int:
    """Processes on each machine: LOCAL_WORLD_SIZE, SLURM_STEP_TASKS_PER_NODE such as 4(x2), or SLURM_NTASKS_PER_NODE.

    Raises UserError where none is set, or where the machines run different numbers of processes.
    """
    if world_size() == 1:
        return 1
    for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        if name in os.environ:
            return _each(name, os.environ[name])
    raise UserError(
        f"LOCAL_WORLD_SIZE: expected how many of the {world_size()} processes run on each machine, found neither it "
        "nor SLURM_STEP_TASKS_PER_NODE. Start the ranks with torchrun or srun, or set LOCAL_WORLD_SIZE."
    )


def seconds_since_start() -> float:
    """Since the command that started this process, as it says in STILLHOUSE_STARTED, else since this process itself."""
    if given := os.environ.get(STARTED):
        return time.time() - float(given)
    with open("/proc/self/stat", "rb") as file:
        ticks = int(file.read().rsplit(b")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _each(name: str, text: str) -> int:
    """4, 4(x2) and 4,4 are 4; the numbers of machines are not read."""
    counts = {int(count) for count in re.sub(r"\(x\d+\)", "", text).split(",")}
    size = counts.pop()
    if counts or world_size() % size:
        raise UserError(
            f"{name}={text}: expected the same number of processes on every machine, {world_size()} in all, found "
            "different ones. Give srun --ntasks-per-node."
        )
    return size
