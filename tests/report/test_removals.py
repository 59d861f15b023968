"""What leaving layers out cost, as the report reads it from scores.safetensors."""

import math

import numpy as np
import pytest
import torch

from pipelines.pruning import scores_file
from pipelines.pruning.removal import Cost, arrays
from pipelines.questions import TaskScore
from pipelines.report import plots
from pipelines.report.record import read_importance


def axes_of(tmp_path, costs, layers, kept):
    path = tmp_path / "scores.safetensors"
    scores_file.update(path, arrays(costs, layers), {})
    found = read_importance(path, {"layers": kept})
    for axis in found:
        assert "<svg" in plots.importance(axis, "removals", tmp_path)
    return found


def test_blocks_are_shown_where_a_block_went(tmp_path):
    costs = {(): Cost(2.0), (1, 2): Cost(3.0), (2, 3): Cost(2.5), (3, 4): Cost(2.75), (2,): Cost(2.1)}
    (axis,) = axes_of(tmp_path, costs, 4, [1, 4])
    assert axis.title == "Blocks of 2 layers left out" and axis.label == "loss above the teacher's, nats/token"
    np.testing.assert_allclose(axis.scores[0], [1.0, 0.5, 0.75])
    assert axis.kept[0].tolist() == [False, True, False] and axis.words[0] == "the block that went"


def test_single_layers_are_shown_else(tmp_path):
    costs = {(): Cost(2.0), (1,): Cost(3.0), (3,): Cost(2.5), (1, 3): Cost(4.0)}
    (axis,) = axes_of(tmp_path, costs, 3, [2])
    np.testing.assert_allclose(axis.scores[0], [1.0, math.nan, 0.5])
    assert axis.kept[0].tolist() == [False, True, False] and axis.words == ("kept", "dropped")


def test_a_task_is_shown_where_there_is_no_loss(tmp_path):
    costs = {(n,): Cost(task=TaskScore(n / 4, 0.0, -1.0)) for n in (1, 2, 3)}
    (axis,) = axes_of(tmp_path, costs, 3, [1, 2])
    assert axis.label == "accuracy without"
    np.testing.assert_allclose(axis.scores[0], [0.25, 0.5, 0.75])


@pytest.mark.parametrize("costs", [{(): Cost(1.0)}, {(1, 2): Cost(1.0)}])
def test_nothing_is_shown_of_what_compares_nothing(tmp_path, costs):
    assert axes_of(tmp_path, costs, 4, [2, 4]) == ()
    assert torch.isfinite(scores_file.read_arrays(tmp_path / "scores.safetensors")["removed_loss"]).all()
