"""Mistakes in the tasks of an evaluation, told before anything is built."""

import re
from pathlib import Path

import pytest

from pipelines.compose import compose
from pipelines.config import UserError
from pipelines.validation import gates, numbers, tasks


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            ["names=[none/task.yaml]"],
            "expected a task file, a directory of them or a .jsonl of questions in none/task.yaml",
        ),
        (["names=[winogrande,winogrande]"], "expected every task once, found winogrande more often"),
        (["names=[mmlu]", "shots={mmlu: -1}"], "evaluate.tasks.shots.mmlu: expected 0 or more, found -1"),
        (["names=[mmlu]", "published={student: {mmlu: high}}"], "published.student: expected a number for each task"),
        (
            ["names=[corpus_choice]", "published={student: {corpus_choice: 60.5}}"],
            r"published.student.corpus_choice: expected a share from 0 to 1, found 60.5. Write 0.605.",
        ),
        (["names=[mmlu]", "published={student: {mmlu: 60.5}}"], "Write 0.605, or name the metric with evaluate.tasks"),
        (["names=[mmlu]", "published={pupil: {mmlu: 1}}"], "expected teacher, pruned, student, found 'pupil'"),
    ],
)
def test_a_mistake_is_told_with_its_setting(settings: list[str], expected: str) -> None:
    config = compose([f"evaluate.tasks.{setting}" for setting in settings])
    tasks.check(config, ["prune"])  # of no concern to other stages
    with pytest.raises(UserError, match=expected):
        tasks.check(config, ["evaluate"])


def test_a_file_of_prompts_must_be_there() -> None:
    for setting in ("generation.prompts", "behaviour.prompts", "behaviour.lexicon", "behaviour.refusals"):
        with pytest.raises(UserError, match="none/file: expected a file, as evaluate.generation or evaluate.behaviour"):
            tasks.check(compose([f"evaluate.{setting}=none/file"]), ["evaluate"])
    tasks.check(compose(["evaluate.behaviour.prompts=shipped"]), ["evaluate"])
    with pytest.raises(UserError, match="evaluate.student=none: expected a Hugging Face directory"):
        tasks.check(compose(["evaluate.student=none"]), ["evaluate"])


def test_files_go_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("one.yaml", "mine/two.jsonl"):
        (tmp_path / name).write_text("{}\n")
    names = f"evaluate.tasks.names=[{tmp_path}/one.yaml,{tmp_path}/mine,mmlu]"
    tasks.check(compose([names, "evaluate.tasks.shots={one: 1, two: 2, mmlu: 5}"]), ["evaluate"])
    assert not list(tasks._not_asked_for(compose([names, "evaluate.tasks.shots={one: 1, two: 2}"]).evaluate.tasks))
    (tmp_path / "odd.txt").write_text("")
    with pytest.raises(UserError, match=r"expected a .yaml or .jsonl, found .*odd.txt"):
        tasks.check(compose([f"evaluate.tasks.names=[{tmp_path}/odd.txt]"]), ["evaluate"])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["names=[mmlu]", "shots={helaswag: 5}"], ["helaswag in shots"]),
        (["names=[mmlu]", "shots={mlmu: 5}"], ["mlmu in shots .*: did you mean mmlu"]),
        (["names=[mmlu]", "metrics={mmlu_: acc}"], ["mmlu_ in metrics .* did you mean mmlu"]),
        (["names=[mmlu]", "published={student: {mmul: 1}}"], ["mmul in published.student .* did you mean mmlu"]),
        (["names=[mmlu]", "shots={mmlu: 5}", "metrics={mmlu: acc}", "published={student: {mmlu: 1}}"], []),
        (["names=[]", "shots={mmlu: 5}"], []),
    ],
)
def test_a_name_that_no_task_has_is_told_and_refused_nowhere(settings: list[str], expected: list[str]) -> None:
    config = compose([f"evaluate.tasks.{setting}" for setting in settings])
    told = list(tasks.warnings(config, ["evaluate"]))
    assert len(told) == len(expected) and all(map(re.search, expected, told)), told
    assert all("is of no task of evaluate.tasks.names" in line for line in told)
    tasks.check(config, ["evaluate"])
    assert not list(tasks.warnings(config, ["prune"]))


def test_a_task_like_one_of_the_experiment_is_taken() -> None:
    config = compose(["experiment=llama31_8b_to_4b_width", "evaluate.tasks.names=[truthfulqa_mc1]"])
    tasks.check(config, ["evaluate"])
    told = list(tasks.warnings(config, ["evaluate"]))
    assert len(told) == 6 and sum("did you mean truthfulqa_mc1?" in line for line in told) == 1


def test_fewer_tasks_than_an_experiment_s_leave_its_other_settings_without_effect() -> None:
    """As docs/evaluation.md has it: metrics and published scores of the tasks that are left out remain."""
    given = ["experiment=llama31_8b_to_4b_width", "evaluate.tasks.names=[mmlu,winogrande]"]
    config = compose([*given, "evaluate.tasks.shots={mmlu: 5, winogrande: 0}"])
    tasks.check(config, ["evaluate"])
    gates.check(config)
    with pytest.raises(UserError, match="one of evaluate.tasks.names, mmlu.*Add it to evaluate.tasks.names"):
        gates.check(compose([given[0], "evaluate.tasks.names=[mmlu]"]))


def test_files_that_cannot_be_read_are_told_at_the_start_and_are_gaps(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"frage": 1}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    asked = [f"evaluate.tasks.names=[{tmp_path}/bad.jsonl]", "evaluate.generation.count=2"]
    asked += [
        f"evaluate.generation.prompts={tmp_path}/empty.jsonl",
        f"evaluate.behaviour.prompts={tmp_path}/binary.jsonl",
    ]
    config = compose([*asked, "evaluate.generation.greedy=true", "evaluate.generation.temperature=2"])
    tasks.check(config, ["evaluate"])
    told = list(tasks.warnings(config, ["evaluate"]))
    assert len(told) == 4 and all("\n" not in line for line in told)
    for words in (
        "bad.jsonl, line 1: expected a question",
        "expected a prompt per line, found none",
        "a text file in UTF-8",
    ):
        assert any(words in line and "is a gap" in line for line in told)
    assert "evaluate.generation.temperature has no effect with evaluate.generation.greedy=true" in told
    assert not list(tasks.warnings(config, ["export"]))


def test_a_metric_that_is_no_share_may_be_published() -> None:
    asked = ["names=[wikitext]", "metrics={wikitext: word_perplexity}", "published={teacher: {wikitext: 9.3}}"]
    tasks.check(compose([f"evaluate.tasks.{setting}" for setting in asked]), ["evaluate"])


def test_a_number_that_may_be_1_is_said_to_be_at_most_1() -> None:
    with pytest.raises(UserError, match=r"top_p: expected a number above 0 and at most 1, found 2"):
        numbers.check(compose(["evaluate.generation.top_p=2"]))
