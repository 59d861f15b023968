"""What the studies of this directory share: arms over seeds, as ordinary runs of `python -m pipelines`.

An arm is pruned once in <runs>/<study>_arms/<arm>, and distilled and evaluated once per seed beside it. Every command
is printed before it starts: what has finished is not run again, and what was killed continues. --jobs runs go at a
time, one process each. The table and the plot go into the study's page.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipelines.report import study as report  # noqa: E402


@dataclass(frozen=True)
class Arm:
    """overrides: of stage=prune and of what follows, {seed} in one is the seed. per_seed: it distils while it prunes,
    or draws at random, so it prunes for each seed. starts_from: another arm whose pruned model it distils. experiment:
    of its runs; corpus, teacher: the runs that made them; each where it is not the study's.
    """

    title: str
    overrides: tuple[str, ...] = ()
    per_seed: bool = False
    starts_from: str | None = None
    experiment: str | None = None
    corpus: str | None = None
    teacher: str | None = None


@dataclass(frozen=True)
class Study:
    """name: of the experiment whose corpus and teacher the arms share, and of the run that made these. home: of the
    arms' runs below `runs`. threads: of each run."""

    name: str
    arms: Mapping[str, Arm]
    comparisons: Sequence[report.Comparison]
    page: Path
    plot: str
    runs: Path
    home: str
    threads: int = 1
    block: str = "figures"  # of the page: what stands between <!-- block --> and <!-- /block -->

    @property
    def arms_directory(self) -> Path:
        return self.runs / self.home

    def command(self, run: str, stages: str, arm: Arm, overrides: Sequence[str]) -> list[str]:
        """Of one run among the arms'."""
        corpus, teacher = (self.runs / (made_by or self.name) for made_by in (arm.corpus, arm.teacher))
        given = [f"data.corpus={corpus}/corpus", "model=given", f"model.path={teacher}/teacher/hf", "teacher=take"]
        own = [f"run.directory={self.arms_directory}", f"run.name={run}", "parallel=tp1", "parallel.processes=1"]
        start = [sys.executable, "-m", "pipelines", f"stage={stages}", f"experiment={arm.experiment or self.name}"]
        return [*start, *given, *own, *overrides]

    def commands(self, name: str, seeds: Sequence[int]) -> tuple[list[str] | None, list[list[str]]]:
        """(what prunes for every seed, what runs for each seed afterwards) of an arm."""
        arm, seeded = self.arms[name], []
        for seed in seeds:
            overrides = [override.replace("{seed}", str(seed)) for override in arm.overrides]
            by_seed = [*overrides, f"run.seed={seed}"]
            if arm.per_seed:
                seeded.append(self.command(f"{name}_{seed}", "[prune,distil,evaluate]", arm, by_seed))
            else:
                start = f"student.path={self.arms_directory}/{arm.starts_from or name}/prune/hf"
                by_seed = [start, *(o for o in by_seed if not o.startswith(("student.", "prune.")))]
                seeded.append(self.command(f"{name}_{seed}", "[distil,evaluate]", arm, by_seed))
        prunes = not arm.per_seed and arm.starts_from is None
        return self.command(name, "prune", arm, arm.overrides) if prunes else None, seeded

    def run(self, command: Sequence[str]) -> None:
        print(shlex.join(["python", *command[1:]]), flush=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{shlex.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")

    def write(self, seeds: Sequence[int]) -> None:
        titles = {name: arm.title for name, arm in self.arms.items()}
        report.write(
            report.read(self.arms_directory, titles, seeds), self.comparisons, self.page, self.plot, self.block
        )
        print(self.page)


def options(description: str, arms: Mapping[str, Arm], page: Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--page", type=Path, default=page)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--arms", nargs="+", choices=arms, default=list(arms))
    return parser


def threads(jobs: int) -> int:
    """Of each of so many runs at a time."""
    return max(1, (os.cpu_count() or 1) // jobs)


def stages(names: str, experiment: str, runs: Path, *overrides: str) -> list[str]:
    """The command of what the arms share."""
    start = [sys.executable, "-m", "pipelines", f"stage={names}", f"experiment={experiment}"]
    return [*start, f"run.directory={runs}", *overrides]


def follow(study: Study, first: Sequence[Sequence[str]], seeds: Sequence[int], jobs: int, names: Sequence[str]) -> None:
    """Run what comes first one by one, then the arms, jobs at a time, then write the page."""
    for command in first:
        study.run(command)
    planned = [study.commands(name, seeds) for name in names]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(study.run, [command for command, _ in planned if command]))
        list(pool.map(study.run, [command for _, seeded in planned for command in seeded]))
    study.write(seeds)
