"""Shared fixtures: the pool of ranks, and a home without network."""

import os
from collections.abc import Iterator

import pytest

from tests.ranks import RankPools

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPools]:
    pools = RankPools()
    yield pools
    pools.close()
