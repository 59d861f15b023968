"""Kept indices: the highest scores, ascending, ties to the lowest index; and the messages for impossible targets."""

import pytest
import torch

from pipelines.config import UserError
from pipelines.core.importance import Scores
from pipelines.core.selection import select, select_channels, select_heads, select_layers


def test_channels_are_the_highest_in_ascending_order():
    scores = torch.tensor([0.5, 3.0, 1.0, 2.0])
    assert select_channels(scores, 2) == [1, 3]
    assert select_channels(scores, 3) == [1, 2, 3]
    assert select_channels(scores, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [8, 5000])
def test_of_equal_scores_the_lowest_index_stays(size):
    scores = torch.ones(size)
    scores[-1] = 2
    assert select_channels(scores, 4) == [0, 1, 2, size - 1]


def test_heads_keep_the_same_number_in_every_group_however_the_scores_lie():
    scores = torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 4.0, 3.0, 2.0])
    assert select_heads(scores, 4, groups=2) == [0, 1, 5, 6]
    assert select_heads(scores, 2, groups=2) == [0, 5]
    assert select_heads(scores, 8, groups=2) == list(range(8))
    assert select_heads(scores, 3, groups=1) == [0, 1, 2]


def test_layers_by_drop_list_and_by_block_influence():
    influence = torch.tensor([0.9, 0.1, 0.3, 0.1, 0.5])
    assert select_layers(5, drop=[4, 2]) == [1, 3, 5]
    assert select_layers(5, keep=4, block_influence=influence) == [1, 2, 3, 5]
    assert select_layers(5, keep=2, block_influence=influence) == [1, 5]
    assert select_layers(5, keep=5) == select_layers(5) == [1, 2, 3, 4, 5]


def test_select_ranks_each_kept_layer_by_its_own_scores():
    scores = Scores(
        hidden=torch.tensor([1.0, 3.0, 2.0, 4.0]),
        ffn=torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [0.0, 9.0, 1.0]]),
        heads=torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 4.0, 3.0]]),
        block_influence=torch.tensor([0.5, 0.1, 0.9]),
        samples=1,
        tokens=1,
    )
    sizes = {"hidden_size": 4, "ffn_size": 3, "heads": 4, "groups": 2, "layers": 3}
    kept = select(scores, **sizes, keep_hidden=2, keep_ffn=2, keep_heads=2, keep_layers=2)
    assert kept.hidden == [1, 3]
    assert kept.layers == [1, 3]
    assert kept.ffn == {1: [1, 2], 3: [1, 2]}
    assert kept.heads == {1: [1, 3], 3: [1, 2]}
    everything = select(None, **sizes, drop_layers=[1])
    assert everything.layers == [2, 3]
    assert everything.hidden == [0, 1, 2, 3]
    assert everything.ffn == {2: [0, 1, 2], 3: [0, 1, 2]}
    assert everything.heads == {2: [0, 1, 2, 3], 3: [0, 1, 2, 3]}


SIZES = {"hidden_size": 8, "ffn_size": 16, "heads": 8, "groups": 4, "layers": 4}


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ({"keep_hidden": 9}, ["student.hidden_size", "at most the teacher's 8", "found 9"]),
        ({"keep_ffn": 17}, ["student.intermediate_size", "at most the teacher's 16", "found 17"]),
        ({"keep_heads": 12}, ["student.num_attention_heads", "at most the teacher's 8", "found 12"]),
        ({"keep_layers": 5}, ["student.num_hidden_layers", "at most the teacher's 4", "found 5"]),
        ({"keep_hidden": 0}, ["student.hidden_size", "at least 1", "found 0"]),
        ({"keep_heads": 6}, ["multiple of the teacher's 4 KV groups", "found 6", "4 or 8"]),
        ({"keep_heads": 2}, ["multiple of the teacher's 4 KV groups", "found 2", "Take 4"]),
        ({"drop_layers": [0, 2]}, ["numbers from 1 to 4", "found [0]"]),
        ({"drop_layers": [5]}, ["numbers from 1 to 4", "found [5]"]),
        ({"drop_layers": [2, 2]}, ["each layer once", "[2] more than once"]),
        ({"drop_layers": [1, 2, 3, 4]}, ["all 4 dropped"]),
        ({"drop_layers": [2, 3], "keep_layers": 3}, ["disagree", "4 - 2 = 2", "num_hidden_layers=3"]),
    ],
)
def test_impossible_targets_are_refused_before_any_score_exists(target, parts):
    with pytest.raises(UserError) as error:
        select(None, **SIZES, **target)
    for part in parts:
        assert part in str(error.value)


def test_a_size_off_the_multiple_is_refused():
    with pytest.raises(UserError, match="expected a multiple of 4, found 6. Take 4"):
        select_channels(torch.arange(8.0), 6, what="student.hidden_size", multiple=4)
