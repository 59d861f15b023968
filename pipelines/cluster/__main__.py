"""The command line of launchers/slurm.sh: a run as a chain of SLURM jobs, shown or submitted. Imports no torch."""

import shlex
import sys

from pipelines import console
from pipelines.cluster import queue
from pipelines.cluster.chain import Chain
from pipelines.config import UserError
from pipelines.lock import Lock

USAGE = """A run as a chain of SLURM jobs, one for each stage that is not finished yet.

  launchers/slurm.sh [--dry-run] cluster=NAME experiment=NAME [key=value ...]

Overrides are those of `python -m pipelines`; without stage= it is stage=all. cluster= is one of conf/cluster.
  --dry-run  writes the scripts and says what would be submitted
"""


def dispatch(arguments: list[str]) -> None:
    dry = "--dry-run" in arguments
    overrides = [argument for argument in arguments if argument != "--dry-run"]
    for flag in (a for a in overrides if a.startswith("-")):
        raise UserError(f"{flag}: expected --dry-run or key=value. launchers/slurm.sh --help shows more.")
    for override in overrides:
        if not override.isprintable():
            raise UserError(f"{override!r}: expected characters that can be printed, found others. Leave them out.")
    chain = Chain(overrides)
    for warning in chain.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for line in chain.left_out:
        console.say(f"left out  {line}")
    if not chain.jobs:
        console.say(f"run {chain.name}: nothing is left to do")
        return
    if chain.unfit and not dry:
        raise UserError(chain.unfit)
    if chain.unfit:
        print(f"warning: this will not be submitted: {chain.unfit}", file=sys.stderr)
    try:
        chain.home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.directory: expected a place to write, found: {error}.") from None
    lock = Lock(chain.home / "lock", console.say)
    try:
        try:
            refuse_second(chain.name, queue.jobs_of(chain.home))
        except queue.Unanswered as error:
            if not dry:
                raise
            print(f"warning: whether a chain of this run is under way is not known: {error}", file=sys.stderr)
        chain.write()
        if dry:
            show(chain)
        else:
            submit(chain)
    finally:
        lock.release()


def refuse_second(run: str, queued: list[queue.Queued]) -> None:
    if queued:
        shown = ", ".join(f"{one.job} ({one.name}, {one.state})" for one in queued)
        ids = " ".join(one.job for one in queued)
        raise UserError(
            f"run {run}: expected none of its jobs in SLURM's queue, found {shown}. Wait for them, or end them with "
            f"`scancel {ids}`."
        )


def show(chain: Chain) -> None:
    before = None
    for number, job in enumerate(chain.jobs, start=1):
        options = [line for line in job.script.read_text().splitlines() if line.startswith("#SBATCH ")]
        console.say(f"\n{job.label}: {job.size()}, {job.nodes.time}")
        for line in options:
            console.say(f"  {line}")
        console.say(f"  {shlex.join(queue.command(job.script, before))}  # JOB{number}")
        before = f"JOB{number}"
    console.say(f"\nnothing was submitted; scripts and settings are in {chain.home}")


def submit(chain: Chain) -> None:
    chain.forget()
    ids = queue.submit([job.script for job in chain.jobs])
    chain.record(ids)
    for number, (identity, job) in enumerate(zip(ids, chain.jobs, strict=True)):
        after = f", after job {ids[number - 1]}" if number else ""
        console.say(f"job {identity}  {job.label}: {job.size()}, {job.nodes.time}{after}")
    console.say(f"scripts: {chain.home}  logs: {chain.home / 'logs'}")
    console.say(f"watch: squeue --jobs={','.join(ids)}  end: scancel {' '.join(ids)}; the same command continues")


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, 2 for a user's mistake or what SLURM refuses."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return 0
    try:
        dispatch(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
