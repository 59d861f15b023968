"""Shared fixtures: the pool of ranks, and a home without network."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import config as configuration
from tests.ranks import RankPools

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell starts background jobs with Ctrl-C ignored, and so would be whatever the tests start in their turn.
signal.signal(signal.SIGINT, signal.default_int_handler)


# The files that take longest, longest first: `make test` gives whole files to its workers in this order, and a long one
# that began last would be waited for alone.
LONGEST = (
    "test_pipeline.py",
    "cluster/test_slurm.py",
    "trainer/test_runs.py",
    "stages/test_search.py",
    "trainer/test_full_disk.py",
    "stages/test_benchmark.py",
    "test_main.py",
    "test_dry_run.py",
    "stages/test_prune_depth.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


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
