"""The collectives are right, told apart from wrong ones, and counted as they are used."""

import pytest

from pipelines.model import collectives
from tests.ranks import RankPools


@pytest.mark.parametrize("world", [2, 4])
def test_every_collective_is_right_and_timed(ranks: RankPools, world: int) -> None:
    first, *others = ranks(world, "tests.model.cases_collectives:measured", size=100_002)
    assert all(other == first for other in others), "the slowest rank's seconds, on every rank"
    assert set(first) == set(collectives.KINDS)
    for kind, (size, count, seconds, rate) in first.items():
        factor = {"all_reduce": 2 * (world - 1) / world, "send_recv": 1}.get(kind, (world - 1) / world)
        assert count == world and size <= 100_002 and size % (4 * world) == 0
        assert rate == pytest.approx(factor * size / seconds)


def test_a_wrong_sum_is_told(ranks: RankPools) -> None:
    words = ranks(2, "tests.model.cases_collectives:unsummed")
    assert words == [f"all_reduce: 1,000 of 1,000 numbers are wrong on rank {rank}" for rank in range(2)]
