"""Several parts of one pruning write into the same file, one after the other."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pipelines.core.importance import Scores
from pipelines.pruning.scores_file import add, copy, named_arrays, read_arrays, read_notes, update, write


def test_an_update_leaves_what_others_wrote(tmp_path):
    path = tmp_path / "scores.safetensors"
    update(path, {"hidden": torch.arange(3.0)}, {"provenance": {"samples": 2}})
    update(path, {"removed_loss": torch.tensor([1.0])}, {"removal": {"samples": 4}})
    update(path, {"removed_loss": torch.tensor([1.0, 2.0])}, {})
    found = load_file(path)
    assert {name: value.tolist() for name, value in found.items()} == {"hidden": [0, 1, 2], "removed_loss": [1, 2]}
    with safe_open(path, framework="pt") as file:
        metadata = {name: json.loads(value) for name, value in file.metadata().items()}
    assert metadata == {"provenance": {"samples": 2}, "removal": {"samples": 4}}
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_file_with_nothing_in_it_is_one_to_add_to(tmp_path):
    path = tmp_path / "scores.safetensors"
    update(path, {}, {"provenance": {}})
    update(path, {"hidden": torch.ones(1)}, {})
    assert load_file(path).keys() == {"hidden"}


def test_another_runs_scores_leave_ones_own_measurements_of_layers(tmp_path):
    own, given = tmp_path / "own.safetensors", tmp_path / "given.safetensors"
    update(given, {"hidden": torch.ones(1), "removed_loss": torch.tensor([1.0])}, {"removal": 1, "provenance": "given"})
    copy(given, own)
    assert own.read_bytes() == given.read_bytes()
    update(own, {"removed": torch.zeros(2, 1), "removed_loss": torch.tensor([1.0, 2.0])}, {"removal": 2})
    copy(given, own)
    assert load_file(own)["removed_loss"].tolist() == [1, 2] and load_file(own)["hidden"].tolist() == [1]
    with safe_open(own, framework="pt") as file:
        assert file.metadata() == {"removal": "2", "provenance": '"given"'}


def some_scores(samples: int) -> Scores:
    hidden, ffn, heads, groups, influence = (torch.ones(1, 2, dtype=torch.float64) for _ in range(5))
    return Scores(hidden[0], ffn, heads, groups, influence[0], samples=samples, tokens=8 * samples)


def test_new_scores_leave_ones_own_measurements_of_layers(tmp_path):
    path = tmp_path / "scores.safetensors"
    write(path, None, {"model": "a"})
    update(path, {"removed": torch.zeros(1, 1), "removed_loss": torch.tensor([1.0])}, {"removal": 2})
    write(path, some_scores(3), {"model": "b"})
    assert read_arrays(path).keys() == {*named_arrays(some_scores(3)), "removed", "removed_loss"}
    assert read_notes(path) == {"provenance": {"model": "b", "samples": 3, "tokens": 24}, "removal": 2}
    path.write_bytes(b"broken")
    write(path, some_scores(3), {"model": "b"})
    assert read_arrays(path).keys() == named_arrays(some_scores(3)).keys()


def test_scores_that_are_added_say_how_much_was_scored(tmp_path):
    path = tmp_path / "scores.safetensors"
    write(path, None, {"model": "a"})
    add(path, some_scores(3), ["hidden"])
    assert read_arrays(path).keys() == {"hidden"}
    assert read_notes(path) == {"provenance": {"model": "a", "samples": 3, "tokens": 24}}
