"""The studies: their commands compose, and their tables say what the runs left."""

import json
import sys
from pathlib import Path

import pytest

from pipelines.compose import compose
from pipelines.report import study as report
from pipelines.validation import validate

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "launchers"))

import ablations  # noqa: E402
import pruning_study  # noqa: E402

STUDIES = {"pruning_study": pruning_study.study, "ablations": lambda runs: ablations.studies(runs)[0]}
STUDIES["correction"] = lambda runs: ablations.studies(runs)[1]
ARMS = [(name, arm) for name, make in STUDIES.items() for arm in make(Path("runs")).arms]


@pytest.mark.parametrize(("name", "arm"), ARMS)
def test_every_arm_composes(name: str, arm: str, tmp_path: Path) -> None:
    study = STUDIES[name](tmp_path)
    first, seeded = study.commands(arm, [1, 2])
    assert len(seeded) == 2
    for command in [first, *seeded] if first else seeded:
        compose(command[3:])
    seeds = [compose(command[3:]).run.seed for command in seeded]
    assert seeds == [1, 2]


@pytest.mark.parametrize("name", STUDIES)
def test_every_comparison_is_of_two_arms(name: str) -> None:
    study = STUDIES[name](Path("runs"))
    for _, better, other in study.comparisons:
        assert {better, other} <= study.arms.keys()


def test_arms_differ_in_what_they_are_named_after(tmp_path: Path) -> None:
    """All distil one pruned model, but for those that start at random, with losses of their own."""
    study, losses = STUDIES["ablations"](tmp_path), set()
    for arm in study.arms:
        config = compose(study.commands(arm, [1])[1][0][3:])
        start = config.student.path or f"at random, {config.prune.random_weights}"
        assert start in (f"{study.arms_directory}/kd/prune/hf", "at random, True")
        losses.add((start, str(config.distil)))
        kept = (config.distil.steps, config.distil.global_batch_size, config.distil.learning_rate)
        assert kept == (160, 16, 2.0e-3), "equal tokens, at the same rate"
        assert not config.gates and not config.evaluate.tasks.names, "losses alone; no arm may end the study"
    assert len(losses) == len(study.arms)


def test_a_corrected_teacher_is_another_one_on_the_same_corpus(tmp_path: Path) -> None:
    study = STUDIES["correction"](tmp_path)
    own, corrected = (compose(study.commands(arm, [1])[0][3:]) for arm in ("uncorrected", "corrected"))
    assert own.data.corpus == corrected.data.corpus and own.model.path != corrected.model.path
    given = compose([*ablations.stages("corpus", "ablations/corrected", tmp_path)[3:], ablations.other_text()])
    assert validate(given, ["corpus"]) == []


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
    report.write(study, comparisons, docs / "page.md", "students")
    page = (docs / "page.md").read_text()
    assert "| first | 50 (50.0%) | 3.0000 | 2.5100 ± 0.0100 | 0.1000 |" in page
    assert "| first against second | -0.0667 ± 0.0351 | 3 of 3 | as expected |" in page
    assert "| second against first | +0.0667 ± 0.0351 | 0 of 3 | the other way |" in page
    assert "first, third" not in page
    assert (docs / "students.png").stat().st_size > 1000
    (docs / "page.md").write_text(page.replace("# Results", "Words before.\n# Results") + "Words after.\n")
    report.write(study, comparisons, docs / "page.md", "students")
    again = (docs / "page.md").read_text()
    assert again.startswith("Words before.") and again.endswith("Words after.\n") and again.count("as expected") == 1
    report.write(study, comparisons, docs / "page.md", "others", "second")
    both = (docs / "page.md").read_text()
    assert both.startswith(again) and both.endswith("![losses by student and seed](others.png)\n<!-- /second -->\n")
