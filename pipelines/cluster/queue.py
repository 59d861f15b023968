"""What SLURM is asked: which jobs of a run it has, and to take new ones. Imports no torch."""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.config import UserError

# Of SLURM's variables, what its commands need to find the cluster and to be let in. The others are of the job that
# this shell may be in, or defaults of sbatch and squeue that outdo what the scripts say, and are left out.
NEEDED = ("SLURM_CONF", "SLURM_JWT")
LEFT_OUT = ("SLURM", "SBATCH_", "SQUEUE_", "SCANCEL_", "SALLOC_", "SRUN_", "STILLHOUSE_")


@dataclass(frozen=True)
class Queued:
    job: str
    state: str
    name: str


class Unanswered(UserError):
    """SLURM is not there, or does not do what it was asked."""


def jobs_of(home: Path) -> list[Queued]:
    """The user's jobs, waiting or running, whose script lies in a chain's directory; also those that continue them, and
    those that were submitted by another name of it.

    Raises Unanswered where SLURM gives no answer.
    """
    answer = _ask(["squeue", "--noheader", f"--user={os.getuid()}", "--format=%i|%T|%j|%o"])
    found, place = [], home.resolve()
    for line in answer.splitlines():
        job, state, name, command = (line.split("|", 3) + [""] * 4)[:4]
        script = Path(command)
        if script.is_absolute() and script.parent.name == home.name and script.parent.resolve() == place:
            found.append(Queued(job.strip(), state, name))
    return found


def command(script: Path, after: str | None) -> list[str]:
    """The line that submits a job, after the job `after` has ended well."""
    chained = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
    return ["sbatch", "--parsable", *chained, str(script)]


def submit(scripts: Sequence[Path]) -> list[str]:
    """Submit all, each after the one before it, and return their job ids. Where SLURM refuses one, those before it are
    cancelled. Raises Unanswered."""
    jobs: list[str] = []
    for script in scripts:
        try:
            jobs.append(_ask(command(script, jobs[-1] if jobs else None)).strip().partition(";")[0])
        except Unanswered as error:
            raise Unanswered(f"{error} {_cancelled(jobs)}".rstrip()) from None
    return jobs


def _cancelled(jobs: Sequence[str]) -> str:
    """Cancel what a chain has submitted before it was refused a job, and say so."""
    if not jobs:
        return ""
    ids = " ".join(jobs)
    try:
        _ask(["scancel", *jobs])
    except Unanswered as error:
        return f"Of its jobs {ids} is in the queue, and was not cancelled ({error}): `scancel {ids}`."
    return f"What was submitted before it, {ids}, is cancelled: nothing of the chain is in the queue."


def _ask(line: list[str]) -> str:
    try:
        done = subprocess.run(line, check=False, env=_environment(), capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise Unanswered(
            f"{line[0]}: expected SLURM's commands on this machine, found none. Use a login node of the cluster, "
            "--dry-run, or launchers/torchrun.sh on one machine."
        ) from None
    except subprocess.TimeoutExpired:
        raise Unanswered(f"{line[0]}: expected SLURM's answer within two minutes, found none. Try again.") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().replace("\n", "; ")
        raise Unanswered(
            f"{line[0]}: expected SLURM to take `{' '.join(line)}`, found: {said}. Check the settings of cluster=, and "
            "whether SLURM runs."
        )
    return done.stdout


def _environment() -> dict[str, str]:
    """This process's, without what would outdo the scripts or belongs to a job that it is in itself."""
    return {k: v for k, v in os.environ.items() if k in NEEDED or not k.startswith(LEFT_OUT)}
