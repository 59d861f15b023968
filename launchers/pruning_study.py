"""Choices of pruning compared on one trained teacher, each followed by the same short distillation, over several seeds.

    python launchers/pruning_study.py [--runs runs] [--docs docs/pruning] [--seeds 1 2 3] [--jobs 2] [--arms NAME ...]

Trains the teacher of experiment=pruning_study in <runs>/pruning_study where there is none, prunes it once per arm in
<runs>/pruning_study_arms/<arm>, distils and evaluates each student once per seed beside it, and writes the table and
the plot into --docs. Every run is an ordinary run of `python -m pipelines`, printed before it starts: what has finished
is not run again, and what was killed continues. --jobs runs go at a time, one process each.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipelines.report import pruning_study as report  # noqa: E402


@dataclass(frozen=True)
class Arm:
    """overrides: of stage=prune. per_seed: it distils while it prunes, or draws at random, so it prunes for each seed;
    {seed} in an override is the seed."""

    title: str
    overrides: tuple[str, ...]
    per_seed: bool = False


WIDTH = ("student.hidden_size=112", "student.intermediate_size=296")
HALF = ("student.hidden_size=96", "student.intermediate_size=320")
DEPTH = ("student.num_hidden_layers=6",)

ARMS: dict[str, Arm] = {
    "width": Arm("width, by activations", WIDTH),
    "width_taylor": Arm("width, by Taylor scores", (*WIDTH, "prune.importance=taylor")),
    "width_random": Arm(
        "width, at random", (*WIDTH, "prune.importance=random", "prune.random_seed={seed}"), per_seed=True
    ),
    "depth_contiguous": Arm("depth, contiguous search by loss", (*DEPTH, "prune.depth_method=contiguous")),
    "depth_influence": Arm("depth, block influence", (*DEPTH, "prune.depth_method=block_influence")),
    "searched": Arm(
        "searched shape, at most width's parameters",
        ("prune.target.parameters=2070768", "prune.search.distil_tokens=102400"),
    ),
    "half": Arm("half size in one shot", HALF),
    "steps": Arm(
        "half size in two steps, half the steps each",
        (
            "iterate.students=[{hidden_size: 128, intermediate_size: 384}, {hidden_size: 96, intermediate_size: 320}]",
            "distil.steps=80",
        ),
        per_seed=True,
    ),
}

# (what is asked, the arm expected to be better, the other): by arXiv 2407.14679 and 2408.11796, and our own search.
COMPARISONS = (
    ("importance against random pruning", "width", "width_random"),
    ("contiguous search against block influence", "depth_contiguous", "depth_influence"),
    ("width against depth at equal parameters", "width", "depth_contiguous"),
    ("searched against hand-picked shape", "searched", "width"),
    ("two steps against one shot at half size", "steps", "half"),
)


@dataclass(frozen=True)
class Study:
    runs: Path
    threads: int

    @property
    def teacher(self) -> Path:
        return self.runs / "pruning_study"

    @property
    def arms(self) -> Path:
        return self.runs / "pruning_study_arms"

    def command(self, name: str, stages: str, overrides: Sequence[str]) -> list[str]:
        """Of one run below `arms`, with the study's corpus and teacher."""
        given = [f"data.corpus={self.teacher}/corpus", "model=given", f"model.path={self.teacher}/teacher/hf"]
        own = [f"run.directory={self.arms}", f"run.name={name}", "parallel=tp1", "parallel.processes=1"]
        start = [sys.executable, "-m", "pipelines", f"stage={stages}", "experiment=pruning_study", "teacher=take"]
        return [*start, "student=custom", *given, *own, *overrides]

    def run(self, command: list[str]) -> None:
        print(shlex.join(["python", *command[1:]]), flush=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{shlex.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")

    def commands(self, name: str, seeds: Sequence[int]) -> tuple[list[str] | None, list[list[str]]]:
        """(what prunes for every seed, what runs for each seed afterwards) of an arm."""
        arm, seeded = ARMS[name], []
        for seed in seeds:
            run, by_seed = f"{name}_{seed}", f"run.seed={seed}"
            if arm.per_seed:
                overrides = [override.replace("{seed}", str(seed)) for override in arm.overrides]
                seeded.append(self.command(run, "[prune,distil,evaluate]", [*overrides, by_seed]))
            else:
                start = f"student.path={self.arms}/{name}/prune/hf"
                seeded.append(self.command(run, "[distil,evaluate]", [start, by_seed]))
        return None if arm.per_seed else self.command(name, "prune", arm.overrides), seeded


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--docs", type=Path, default=Path("docs/pruning"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    given = parser.parse_args(arguments)
    study = Study(given.runs.resolve(), max(1, (os.cpu_count() or 1) // given.jobs))
    own = [f"run.directory={study.runs}"]
    study.run([sys.executable, "-m", "pipelines", "stage=[corpus,teacher]", "experiment=pruning_study", *own])
    planned = {name: study.commands(name, given.seeds) for name in given.arms}
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(study.run, [first for first, _ in planned.values() if first]))
        list(pool.map(study.run, [command for _, seeded in planned.values() for command in seeded]))
    titles = {name: arm.title for name, arm in ARMS.items()}
    found = report.read(study.arms, titles, given.seeds)
    report.write(found, COMPARISONS, given.docs)
    print(f"{given.docs / report.PAGE}")


if __name__ == "__main__":
    main()
