"""The searches over layers, by made-up costs: which sets they look at, and what they take."""

import random
from collections import Counter

import pytest

from pipelines.choices import DepthMethod, Measure
from pipelines.config import UserError
from pipelines.prune_costs import blocks, removals
from pipelines.pruning import depth
from pipelines.pruning.depth import by_cost, words
from pipelines.pruning.removal import Cost
from pipelines.questions import TaskScore


def search(method, layers, drop, loss, protected=(), measure=Measure.loss):
    """(what was found, what was asked for in order) for the costs of a function of the left-out layers."""
    asked = []

    def cost(left_out):
        if left_out not in asked:
            asked.append(left_out)
        return loss(left_out) if measure is Measure.task else Cost(loss(left_out))

    cost(())
    found = by_cost(method, layers, drop, cost, lambda one: one.order(measure), protected)
    planned = {run: passes for passes, run in removals(method, layers, drop, protected)}
    assert len(asked) == sum(planned.values())
    assert planned == Counter(layers - len(left_out) for left_out in asked)
    return found, asked


def test_every_block_is_tried_both_ends_included_and_the_lowest_of_equals_taken():
    found, asked = search(DepthMethod.contiguous, 5, 2, lambda left_out: 1.0)
    assert asked == [(), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert (found.dropped, found.next_best) == ((1, 2), (2, 3))
    assert search(DepthMethod.contiguous, 5, 2, lambda left_out: -sum(left_out))[0].dropped == (4, 5)


def test_the_published_block_is_among_those_of_sixteen_of_thirty_two():
    every = blocks(32, 16)
    assert len(every) == 17 and tuple(range(16, 32)) in every
    assert words(tuple(range(16, 32))) == "16-31"


@pytest.mark.parametrize("seed", range(5))
def test_the_best_block_is_that_of_a_plain_search(seed):
    draw = random.Random(seed)
    layers, drop = draw.randint(3, 9), 2
    costs = {block: draw.random() for block in blocks(layers, drop)} | {(): 0.0}
    found, _ = search(DepthMethod.contiguous, layers, drop, costs.__getitem__)
    assert found.cost == Cost(min(costs[block] for block in blocks(layers, drop)))
    assert found.next_best == sorted(blocks(layers, drop), key=costs.__getitem__)[1]


def test_each_layer_alone_tells_which_go():
    harm = {1: 5.0, 2: 1.0, 3: 3.0, 4: 1.0, 5: 2.0}
    found, asked = search(DepthMethod.loss, 5, 2, lambda left_out: sum(harm[n] for n in left_out))
    assert asked == [(), (1,), (2,), (3,), (4,), (5,), (2, 4)]
    assert (found.dropped, found.cost, found.next_best) == ((2, 4), Cost(2.0), (5,))
    assert search(DepthMethod.loss, 5, 1, lambda left_out: sum(harm[n] for n in left_out))[0].dropped == (2,)


def test_one_after_the_other_sees_what_has_gone_already():
    """Without 2 nothing else is needed but 4; each alone says otherwise."""

    def loss(left_out):
        return {(): 0, (1,): 3, (2,): 1, (3,): 2, (4,): 4}.get(left_out, 9 if 4 in left_out else sum(left_out))

    found, asked = search(DepthMethod.greedy, 4, 2, loss)
    assert asked == [(), (1,), (2,), (3,), (4,), (1, 2), (2, 3), (2, 4)]
    assert (found.dropped, found.next_best) == ((1, 2), (2, 3))
    assert set(found.candidates) == set(asked[1:])


@pytest.mark.parametrize("method", [DepthMethod.loss, DepthMethod.contiguous, DepthMethod.greedy])
def test_protected_layers_are_never_left_out(method):
    _, asked = search(method, 6, 2, lambda left_out: float(sum(left_out)), protected=(1, 4))
    assert not {1, 4} & {number for left_out in asked for number in left_out}


def test_a_block_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="expected 3 neighbouring layers that prune.protect does not name, found none"):
        search(DepthMethod.contiguous, 6, 3, lambda left_out: 0.0, protected=(3, 4))


def test_equal_accuracies_are_told_apart_by_the_probability():
    def cost(left_out):
        return Cost(task=TaskScore(0.5, 0.1 * sum(left_out), {3: -1.0}.get(left_out[0] if left_out else 0, -2.0)))

    assert search(DepthMethod.greedy, 4, 1, cost, measure=Measure.task)[0].dropped == (3,)
    better = Cost(task=TaskScore(0.6, 0.0, -9.0))
    assert better.order(Measure.task) < cost((3,)).order(Measure.task)
    assert better.order(Measure.task, normalised=True) > cost((3,)).order(Measure.task, normalised=True)


def test_the_sentence_names_the_layers_and_what_came_next():
    found, _ = search(DepthMethod.contiguous, 5, 3, lambda left_out: float(sum(left_out)))
    told = depth.sentence(found, Cost(1.0), DepthMethod.contiguous, lambda cost: f"{cost.loss:g}")
    assert told == "depth by contiguous: layers 1-3 go: 6; all layers: 1; next best 2-4: 9"
    figures = depth.figures(found, Cost(1.0), DepthMethod.contiguous, Measure.loss)
    assert figures["candidates"] == {"1-3": 6.0, "2-4": 9.0, "3-5": 12.0}
    assert words((1, 3, 4, 6)) == "1, 3-4, 6"
