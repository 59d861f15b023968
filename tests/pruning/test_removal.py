"""What was measured is found again, and only where it was measured on the same."""

import json

import pytest
import torch

from pipelines.config import Config, UserError
from pipelines.families import ModelShape
from pipelines.pruning import scores_file
from pipelines.pruning.removal import Cost, arrays, merged, read_removals, without
from pipelines.questions import TaskScore, tokenizer_directory

SOURCES = {"loss": {"model": "a", "samples": 3}, "task": {"model": "a", "task": "t"}}
COSTS = {
    (): Cost(1.5),
    (2,): Cost(1.75, TaskScore(0.5, 0.25, -1.0)),
    (1, 4): Cost(task=TaskScore(1.0, 0.0, -2.0)),
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "scores.safetensors"
    scores_file.update(path, {"hidden": torch.ones(2)}, {"provenance": {}})
    scores_file.update(path, arrays(COSTS, 4), {"removal": SOURCES})
    return path


def test_costs_are_read_as_they_were_written(path):
    assert read_removals(path, SOURCES, 4) == COSTS
    found = scores_file.read_arrays(path)
    assert found["removed"].tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 1]]
    assert found["removed"].dtype == torch.uint8 and torch.isnan(found["removed_loss"][2])
    assert found["hidden"].tolist() == [1, 1]


def test_only_what_was_measured_on_the_same_counts(path):
    other = SOURCES | {"task": {"model": "a", "task": "another"}}
    assert read_removals(path, other, 4) == {(): Cost(1.5), (2,): Cost(1.75)}
    assert read_removals(path, SOURCES | {"loss": {"model": "b"}}, 4).keys() == {(2,), (1, 4)}
    assert read_removals(path, {"loss": {"model": "b"}, "task": None}, 4) == {}
    assert read_removals(path, SOURCES, 5) == {}
    assert read_removals(path.with_name("none"), SOURCES, 4) == {}


@pytest.mark.parametrize("damage", ["removed", "removed_task", "shorter", "metadata"])
def test_a_damaged_file_is_refused_by_its_name(path, damage):
    held, notes = scores_file.read_arrays(path), scores_file.read_notes(path)
    path.unlink()
    if damage == "metadata":
        notes["removal"] = [1]
    elif damage == "shorter":
        held["removed"] = held["removed"][:1]
    else:
        del held[damage]
    scores_file.update(path, held, notes)
    with pytest.raises(UserError, match=f"{path}: expected what leaving layers out costs.*found them damaged"):
        read_removals(path, SOURCES, 4)


def test_scores_that_are_not_finite_are_refused(path):
    scores_file.update(path, {"hidden": torch.tensor([1.0, torch.nan]), "ffn.1": torch.ones(1)}, {})
    scores_file.check_finite(path, ["ffn.1"])
    with pytest.raises(UserError, match="found NaN or infinity in hidden. Leave prune.scores out"):
        scores_file.check_finite(path, ["hidden", "ffn.1"])


def test_one_measure_adds_to_the_other():
    task = TaskScore(0.5, 0.5, -1.0)
    assert merged(Cost(1.0), Cost(task=task)) == Cost(1.0, task) == merged(Cost(task=task), Cost(1.0))


def test_without_layers_all_else_stays():
    kept = without(ModelShape(50, 8, 6, 3, 4, 2, 4), (1, 3))
    assert (kept.layers, kept.hidden, kept.ffn) == ([2], list(range(8)), {2: list(range(6))})
    assert (kept.heads, kept.groups) == ({2: [0, 1, 2, 3]}, {2: [0, 1]})


def test_the_tokenizer_is_the_teachers_own_or_the_corpuss(tmp_path):
    config, teacher = Config(), ModelShape(50, 8, 6, 3, 4, 2, 4)
    config.data.corpus = str(tmp_path / "corpus")
    own, corpus = tmp_path / "teacher", tmp_path / "corpus" / "tokenizer"
    own.mkdir()
    corpus.mkdir(parents=True)
    with pytest.raises(UserError, match="expected a tokenizer.json in the teacher's directory"):
        tokenizer_directory(config, own, teacher)
    (corpus / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    (tmp_path / "corpus" / "blend.json").write_text(json.dumps({"splits": {}, "vocab_size": 51}))
    with pytest.raises(UserError, match="at most the 50 ids of the model"):
        tokenizer_directory(config, own, teacher)
    (tmp_path / "corpus" / "blend.json").write_text(json.dumps({"splits": {}, "vocab_size": 50}))
    assert tokenizer_directory(config, own, teacher) == corpus
    (own / "tokenizer.json").write_text("{}")
    assert tokenizer_directory(config, own, teacher) == own
