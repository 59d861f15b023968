"""Distillation between models of different vocabularies is refused: before anything starts, and by the stage itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import Config, TeacherMode, UserError
from pipelines.model.random_model import write_random_model
from pipelines.validation import validate
from tests.ranks import RankPools
from tests.stages import small_run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, beside it a student with a row more, and one whose tokenizer has the same ids for other tokens."""
    root = small_run.write_small_run(tmp_path_factory.mktemp("distil") / "runs")
    tokenizer = root / "small" / "corpus" / "tokenizer"
    larger = small_run.STUDENT.replace(vocab_size=small_run.VOCABULARY + 1)
    write_random_model(root / "larger", larger, seed=1, tokenizer=tokenizer)
    shutil.copytree(root / "small" / "prune" / "hf", root / "other")
    content = json.loads((root / "other" / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (root / "other" / "tokenizer.json").write_text(json.dumps(content))
    return root


def configure(root: Path, **settings: Any) -> Config:
    small = root / "small"
    given = {"model__path": str(small / "teacher/hf"), "data__corpus": str(small / "corpus")} | settings
    config = small_run.configure(root, **given)
    config.teacher.mode, config.run.name = TeacherMode.take, "next"
    return config


def messages(ranks: RankPools, root: Path, **settings: Any) -> tuple[str, str]:
    """(before anything starts, by the stage)."""
    config = configure(root, **settings)
    with pytest.raises(UserError) as early:
        validate(config, ["distil"])
    given = {"model__path": config.model.path, "data__corpus": config.data.corpus} | settings
    late = ranks(1, "tests.stages.cases_evaluate:run", stage="distil", root=str(root), name="next", **given)
    return str(early.value), str(late[0]["error"])


def test_the_run_that_the_others_differ_from_is_good(root: Path) -> None:
    validate(configure(root, student__path=str(root / "small/prune/hf")), ["distil"])


def test_a_student_of_another_size_is_refused(ranks: RankPools, root: Path) -> None:
    for message in messages(ranks, root, student__path=str(root / "larger")):
        assert "302" in message and "301" in message and str(root / "larger") in message


def test_a_student_of_other_tokens_is_refused(ranks: RankPools, root: Path) -> None:
    for message in messages(ranks, root, student__path=str(root / "other")):
        assert "expected the model's vocabulary of" in message and f"data.tokenizer={root / 'other'}" in message


def test_a_corpus_of_other_tokens_is_refused(ranks: RankPools, root: Path) -> None:
    shutil.copytree(root / "small" / "corpus", root / "corpus")
    shutil.copyfile(root / "other" / "tokenizer.json", root / "corpus" / "tokenizer" / "tokenizer.json")
    found = messages(ranks, root, data__corpus=str(root / "corpus"), student__path=str(root / "small/prune/hf"))
    for message in found:
        assert str(root / "corpus") in message and f"data.tokenizer={root / 'small/teacher/hf'}" in message
