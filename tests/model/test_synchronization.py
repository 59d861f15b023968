"""No micro batch makes the host wait for the device: kernels are queued ahead of the GPU from the first to the last."""

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import RankPools

CASES = "tests.model.cases_synchronization"


@pytest.mark.parametrize("tensor", [1, 2], ids=["tp1", "tp2"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"hidden": True}, {"attention": True}, {"teacher_share": 0.6}],
    ids=["loss", "hidden", "attention", "taid"],
)
def test_no_micro_batch_waits_for_the_device(
    ranks: RankPools, tmp_path: Path, tensor: int, settings: dict[str, Any]
) -> None:
    for found in ranks(tensor, f"{CASES}:waits_of_a_step", directory=tmp_path, tensor=tensor, **settings):
        assert found == []


def test_what_would_wait_is_seen(ranks: RankPools) -> None:
    (found,) = ranks(1, f"{CASES}:what_waits")
    free = {"a value where a mask says so", "where", "chosen by numbers"}
    assert {name for name, count in found.items() if not count} == free
