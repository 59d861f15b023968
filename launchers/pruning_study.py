"""Choices of pruning compared on one trained teacher, each followed by the same short distillation, over several seeds.

    python launchers/pruning_study.py [--runs runs] [--page docs/pruning/pruning.md] [--seeds 1 2 3] [--jobs 2]
        [--arms NAME ...]

Trains the teacher of experiment=pruning_study in <runs>/pruning_study where there is none; launchers/study.py says how
the arms follow.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from study import Arm, Study, follow, options, stages, threads

PAGE, PLOT = Path("docs/pruning/pruning.md"), "students"
WIDTH = ("student=custom", "student.hidden_size=112", "student.intermediate_size=296")
HALF = ("student=custom", "student.hidden_size=96", "student.intermediate_size=320")
DEPTH = (
    "student=custom",
    "student.num_hidden_layers=6",
)

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
        ("student=custom", "prune.target.parameters=2070768", "prune.search.distil_tokens=102400"),
    ),
    "half": Arm("half size in one shot", HALF),
    "steps": Arm(
        "half size in two steps, half the steps each",
        (
            "student=custom",
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


def study(runs: Path, page: Path = PAGE, jobs: int = 2) -> Study:
    home = "pruning_study_arms"
    return Study("pruning_study", ARMS, COMPARISONS, page, PLOT, runs.resolve(), home, threads(jobs))


def main(arguments: Sequence[str] | None = None) -> None:
    given = options(str(__doc__), ARMS, PAGE).parse_args(arguments)
    own = study(given.runs, given.page, given.jobs)
    first = stages("[corpus,teacher]", "pruning_study", own.runs)
    follow(own, [first], given.seeds, given.jobs, given.arms)


if __name__ == "__main__":
    main()
