"""Kept indices: the highest scores, ascending, ties to the lowest index; and the messages for impossible targets."""

from dataclasses import replace

import pytest
import torch

from pipelines.config import UserError
from pipelines.core.importance import Scores
from pipelines.core.selection import select, select_channels, select_heads, select_layers
from pipelines.protection import Protected


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
    assert select_layers(5, keep=4, scores=influence) == [1, 2, 3, 5]
    assert select_layers(5, keep=2, scores=influence) == [1, 5]
    assert select_layers(5, keep=5) == select_layers(5) == [1, 2, 3, 4, 5]


def test_select_ranks_each_kept_layer_by_its_own_scores():
    scores = Scores(
        hidden=torch.tensor([1.0, 3.0, 2.0, 4.0]),
        ffn=torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [0.0, 9.0, 1.0]]),
        heads=torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 4.0, 3.0]]),
        kv_groups=torch.ones(3, 2),
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
    by_others = select(replace(scores, layers=torch.tensor([1.0, 3.0, 2.0])), **sizes, keep_layers=2)
    assert by_others.layers == [2, 3]
    everything = select(None, **sizes, drop_layers=[1])
    assert everything.layers == [2, 3]
    assert everything.hidden == [0, 1, 2, 3]
    assert everything.ffn == {2: [0, 1, 2], 3: [0, 1, 2]}
    assert everything.heads == {2: [0, 1, 2, 3], 3: [0, 1, 2, 3]}
    assert everything.groups == {2: [0, 1], 3: [0, 1]}


def some_scores(layers: int = 2, groups: int = 3, per_group: int = 2) -> Scores:
    draw = torch.Generator().manual_seed(3)
    heads = torch.rand(layers, groups * per_group, generator=draw, dtype=torch.float64)
    influence = torch.rand(layers, generator=draw, dtype=torch.float64)
    hidden, ffn = (torch.rand(*size, generator=draw, dtype=torch.float64) for size in ((6,), (layers, 5)))
    return Scores(hidden, ffn, heads, of_groups(heads, groups), influence, samples=1, tokens=1)


def of_groups(heads: torch.Tensor, groups: int) -> torch.Tensor:
    return heads.unflatten(-1, (groups, -1)).norm(dim=-1)


def test_kv_groups_are_ranked_in_each_layer_and_heads_within_those_that_stay():
    heads = torch.tensor([[1.0, 2.0, 9.0, 0.0, 3.0, 4.0], [8.0, 1.0, 2.0, 3.0, 1.0, 1.0]], dtype=torch.float64)
    scores = replace(some_scores(), heads=heads, kv_groups=of_groups(heads, 3))
    sizes = {"hidden_size": 6, "ffn_size": 5, "heads": 6, "groups": 3, "layers": 2}
    kept = select(scores, **sizes, keep_groups=2)
    assert kept.groups == {1: [1, 2], 2: [0, 1]}
    assert kept.heads == {1: [2, 3, 4, 5], 2: [0, 1, 2, 3]}
    kept = select(scores, **sizes, keep_groups=2, keep_heads=2)
    assert (kept.groups, kept.heads) == ({1: [1, 2], 2: [0, 1]}, {1: [2, 5], 2: [0, 3]})
    kept = select(scores, **sizes, keep_groups=2, protected=Protected(heads={1: frozenset({1})}))
    assert kept.groups == {1: [0, 1], 2: [0, 1]}, "a head keeps its group"


@pytest.mark.parametrize("seed", range(20))
def test_what_is_protected_stays_whatever_its_score_and_all_else_is_the_highest(seed):
    draw = torch.Generator().manual_seed(seed)
    size = int(torch.randint(2, 30, (1,), generator=draw))
    keep = int(torch.randint(1, size + 1, (1,), generator=draw))
    scores = torch.randint(0, 4, (size,), generator=draw).double()  # with many ties
    named = torch.randperm(size, generator=draw)[: int(torch.randint(0, keep + 1, (1,), generator=draw))].tolist()
    found = select_channels(scores, keep, protected=named)
    others = sorted((index for index in range(size) if index not in named), key=lambda i: (-scores[i], i))
    assert found == sorted(named + others[: keep - len(named)])
    with pytest.raises(UserError, match=f"expected room for the {keep + 1} that prune.protect names, found {keep}"):
        select_channels(torch.zeros(keep + 2), keep, protected=range(keep + 1))


def test_a_protected_layer_is_neither_ranked_away_nor_dropped():
    influence = torch.tensor([0.9, 0.1, 0.3, 0.1, 0.5])
    assert select_layers(5, keep=2, scores=influence, protected=[4]) == [1, 4]
    with pytest.raises(UserError, match=r"no layer that prune.protect names, or that holds .*found \[2\]"):
        select_layers(5, drop=[1, 2], protected=[2, 3])
    protected = Protected(ffn={2: frozenset({4})})
    sizes = {"hidden_size": 6, "ffn_size": 5, "heads": 6, "groups": 3, "layers": 2}
    scores = replace(some_scores(), block_influence=torch.tensor([1.0, 0.0]))
    kept = select(scores, **sizes, keep_layers=1, keep_ffn=1, protected=protected)
    assert (kept.layers, kept.ffn) == ([2], {2: [4]}), "a neuron keeps its layer"


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
        ({"keep_groups": 5}, ["student.num_key_value_heads", "at most the teacher's 4", "found 5"]),
        ({"keep_groups": 3, "keep_heads": 4}, ["multiple of the 3 KV groups", "found 4", "3 or 6"]),
        ({"keep_groups": 2, "keep_heads": 6}, ["multiple of the 2 KV groups", "at most the teacher's 2", "Take 4."]),
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
