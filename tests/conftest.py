"""Shared fixtures: the pool of ranks, and a home without network."""

import os
import signal
from collections.abc import Iterator

import pytest

from pipelines import config as configuration
from tests.ranks import RankPools

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell starts background jobs with Ctrl-C ignored, and so would be whatever the tests start in their turn.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def machine_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings are checked as on a machine without a GPU, outside of any job, whatever this one is."""
    monkeypatch.setattr(configuration, "gpu_count", lambda: 0)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPools]:
    pools = RankPools()
    yield pools
    pools.close()
