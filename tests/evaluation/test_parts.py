"""Each part of an evaluation is measured once, and a mistake in one is a gap in that one alone."""

import json
from pathlib import Path

import pytest

from tests.ranks import RankPools

CASE = "tests.evaluation.cases_parts:measure"
DOMAINS = {"name": "domains", "settings": {"batches": 1}, "result": {"loss": 2.0}}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_inputs(tmp_path, "abc")
    return tmp_path


def write_inputs(directory: Path, digest: str) -> None:
    manifest = {"inputs": {"teacher": {"path": "teacher/hf", "files": {"config.json": digest}}}}
    (directory / "manifest.json").write_text(json.dumps(manifest))


def test_a_part_made_from_the_same_is_taken(ranks: RankPools, directory: Path) -> None:
    for expected in (1, 0):
        for found, gaps, ran in ranks(2, CASE, directory=str(directory), turns=[DOMAINS]):
            assert (found, gaps, ran) == ([{"loss": 2.0}], {}, expected)


@pytest.mark.parametrize("change", ["settings", "models"])
def test_a_part_made_from_other_things_is_measured_again(ranks: RankPools, directory: Path, change: str) -> None:
    ranks(1, CASE, directory=str(directory), turns=[DOMAINS, DOMAINS | {"name": "tasks"}])
    if change == "models":
        write_inputs(directory, "abd")
    again = DOMAINS | ({"settings": {"batches": 2}} if change == "settings" else {}) | {"result": {"loss": 1.0}}
    ((found, _, ran),) = ranks(1, CASE, directory=str(directory), turns=[again, DOMAINS | {"name": "tasks"}])
    assert found == [{"loss": 1.0}, {"loss": 2.0}] and ran == (1 if change == "settings" else 2)


def test_without_a_record_of_the_inputs_nothing_is_taken(ranks: RankPools, tmp_path: Path) -> None:
    for _ in range(2):
        ((_, _, ran),) = ranks(1, CASE, directory=str(tmp_path), turns=[DOMAINS])
        assert ran == 1


def test_a_mistake_is_a_gap_and_the_others_go_on(ranks: RankPools, directory: Path) -> None:
    bad = {"name": "tasks", "mistake": "tasks.jsonl: expected a question, found nothing. Give one."}
    for found, gaps, ran in ranks(2, CASE, directory=str(directory), turns=[bad, DOMAINS]):
        assert found == [None, {"loss": 2.0}] and gaps == {"tasks": bad["mistake"]} and ran == 2
    assert not (directory / "parts/tasks.json").exists()


def test_a_mistake_in_what_is_needed_ends_the_stage(ranks: RankPools, directory: Path) -> None:
    with pytest.raises(RuntimeError, match="expected a teacher"):
        ranks(
            1,
            CASE,
            directory=str(directory),
            turns=[{"name": "quality", "mistake": "expected a teacher", "needed": True}],
        )
