"""Domains and longer sequences of an evaluation, as settings."""

import json
from pathlib import Path

import pytest

from pipelines.artifacts import INPUTS
from pipelines.compose import compose
from pipelines.config import UserError
from pipelines.evaluation_settings import DomainConfig
from pipelines.validation import validate

BASE = ["experiment=quickstart", "parallel=tp2", "parallel.device=cpu"]
STAGES = ["corpus", "teacher", "prune", "distil", "evaluate"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.domains=[{path: a.txt}]", "evaluate.domains[0].name: expected letters, digits, - and _, found ''"),
        ("evaluate.domains=[{name: a/b, path: a.txt}]", "found 'a/b'"),
        ("evaluate.domains=[{name: a}]", "evaluate.domains[0].path: expected a path, found none"),
        ("evaluate.domains=[{name: a, source: package_descriptions, path: x}]", "none with source=package_descr"),
        ("evaluate.domains=[{name: a, path: x}, {name: a, path: y}]", "a name for each, found a more often"),
        ("evaluate.domains=[{name: a, path: x, kind: mine}]", "Invalid value 'mine', expected one of [own, other]"),
        ("evaluate.domains=[{name: a, path: x, tokens: 0}]", "evaluate.domains[0].tokens: expected 1 or more"),
        ("evaluate.domains=3", "Expected a list of domains, as in 'evaluate.domains=[{name: law"),
        ("evaluate.domains=[{name: a, pth: x}]", "Did you mean path?"),
        ("evaluate.long_context=[64,0]", "evaluate.long_context: expected 1 or more, found 0"),
        ("evaluate.long_context=[64,64]", "expected each length once"),
    ],
)
def test_mistakes_are_named_before_anything_starts(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        validate(compose([*BASE, override]), STAGES)
    assert message in str(error.value)


def test_a_length_beyond_the_models_positions_is_a_warning() -> None:
    (warning,) = validate(compose([*BASE, "evaluate.long_context=[512,100000]"]), STAGES)
    assert "100000 is beyond the teacher's max_position_embeddings=" in warning


def test_a_domain_that_is_not_there_is_no_mistake_and_its_files_are_inputs(tmp_path: Path) -> None:
    given = f"evaluate.domains=[{{name: a, path: {tmp_path}/none.txt}}, {{name: b, path: '{tmp_path}/*.md'}}]"
    config = compose([*BASE, given])
    assert validate(config, STAGES) == []
    for name in ("one.md", "two.md"):
        (tmp_path / name).write_text("text")
    assert INPUTS["domain_files"](config) == [tmp_path / name for name in ("none.txt", "one.md", "two.md")]


def test_a_home_directory_is_written_as_in_a_shell() -> None:
    config = compose([*BASE, "evaluate.domains=[{name: a, path: ~/a.txt}]"])
    assert config.evaluate.domains == [DomainConfig("a", str(Path.home() / "a.txt"))]


def test_a_baseline_of_another_text_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "results.json"

    def error() -> str:
        with pytest.raises(UserError) as found:
            validate(compose([*BASE, f"evaluate.baseline={path}"]), STAGES)
        return str(found.value)

    assert "found no such file" in error()
    path.write_text("{}")
    assert "found no models or document_groups in it" in error()
    stored = {"models": {}, "document_groups": {}, "split": "test", "sequence_length": 128}
    path.write_text(json.dumps(stored | {"split": "validation"}))
    assert "expected one with split=test, found validation" in error()
    path.write_text(json.dumps(stored | {"sequence_length": 64}))
    assert "expected one with sequence_length=128, found 64" in error()
    path.write_text(json.dumps(stored))
    assert validate(compose([*BASE, f"evaluate.baseline={path}"]), STAGES) == []
