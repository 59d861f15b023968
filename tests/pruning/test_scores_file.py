"""Several parts of one pruning write into the same file, one after the other."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pipelines.pruning.scores_file import update


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
