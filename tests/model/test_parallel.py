"""What rank 0 does alone while the others wait."""

from tests.ranks import RankPools

CASES = "tests.model.cases_parallel"


def test_the_wait_for_rank_0_outlasts_the_timeout_of_collectives(ranks: RankPools) -> None:
    found = ranks(2, f"{CASES}:waited_for", seconds=4.0, limit=1.5)
    assert found == [{"rank": 0}, {"rank": 0}]


def test_what_fails_on_rank_0_fails_on_every_rank(ranks: RankPools) -> None:
    assert ranks(2, f"{CASES}:failed", user=True) == ["UserError: a mistake"] * 2
    first, second = ranks(2, f"{CASES}:failed", user=False)
    assert first == "OSError: [Errno 28] No space left on device"
    assert second == "RuntimeError: rank 0: [Errno 28] No space left on device"
