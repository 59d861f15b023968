"""The study of pruning choices: its commands compose, and its tables say what the runs left."""

import json
import sys
from pathlib import Path

import pytest

from pipelines.compose import compose
from pipelines.report import pruning_study as report

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "launchers"))

import pruning_study as launcher  # noqa: E402


@pytest.mark.parametrize("name", launcher.ARMS)
def test_every_arm_composes(name: str, tmp_path: Path) -> None:
    study = launcher.Study(tmp_path, 1)
    first, seeded = study.commands(name, [1, 2])
    assert len(seeded) == 2
    for command in [first, *seeded] if first else seeded:
        compose(command[3:])
    seeds = [compose(command[3:]).run.seed for command in seeded]
    assert seeds == [1, 2]


def test_every_comparison_is_of_two_arms() -> None:
    for _, better, other in launcher.COMPARISONS:
        assert {better, other} <= launcher.ARMS.keys()


def evaluated(directory: Path, pruned: float, student: float) -> None:
    directory.mkdir(parents=True)
    models = {
        "teacher": {"loss": 2.0, "parameters": 100},
        "pruned": {"loss": pruned, "parameters": 50},
        "student": {"loss": student, "parameters": 50, "kl": 0.1},
    }
    (directory / "results.json").write_text(json.dumps({"models": models}))


def test_the_page_says_what_the_runs_left_and_keeps_what_was_written(tmp_path: Path) -> None:
    for seed, (better, other) in enumerate([(2.5, 2.6), (2.51, 2.58), (2.52, 2.55)], start=1):
        evaluated(tmp_path / f"a_{seed}" / "evaluate", 3.0, better)
        evaluated(tmp_path / f"b_{seed}" / "evaluate", 4.0, other)
    evaluated(tmp_path / "c_1" / "evaluate", 4.0, 3.0)  # two seeds are not there
    study = report.read(tmp_path, {"a": "first", "b": "second", "c": "third"}, [1, 2, 3])
    assert study.arms.keys() == {"a", "b"}
    docs = tmp_path / "docs"
    comparisons = [("first against second", "a", "b"), ("second against first", "b", "a"), ("first, third", "a", "c")]
    report.write(study, comparisons, docs)
    page = (docs / report.PAGE).read_text()
    assert "| first | 50 (50.0%) | 3.0000 | 2.5100 ± 0.0100 | 0.1000 |" in page
    assert "| first against second | -0.0667 ± 0.0351 | 3 of 3 | as expected |" in page
    assert "| second against first | +0.0667 ± 0.0351 | 0 of 3 | the other way |" in page
    assert "first, third" not in page
    assert (docs / f"{report.PLOT}.png").stat().st_size > 1000
    (docs / report.PAGE).write_text(page.replace("# Choices", "Words before.\n# Choices") + "Words after.\n")
    report.write(study, comparisons, docs)
    again = (docs / report.PAGE).read_text()
    assert again.startswith("Words before.") and again.endswith("Words after.\n") and again.count("as expected") == 1
