"""Sequences cut over ranks: the parts, their positions, and sums that are those of whole sequences."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.model.cases_step import SEQUENCE
from tests.ranks import RankPools

CASES = "tests.model.cases_context"


def test_each_rank_has_an_early_and_a_late_part_with_their_positions(ranks: RankPools) -> None:
    """Twice as many parts as ranks, rank r with part r and the r-th from the end: as much attention on every rank."""
    found = ranks(2, f"{CASES}:places", context=2)
    part = SEQUENCE // 4
    for result in found:
        rank = result["rank"]
        late = SEQUENCE - (rank + 1) * part
        expected = [*range(rank * part, (rank + 1) * part), *range(late, late + part)]
        assert result["positions"] == result["angles"] == expected
        assert result["labels follow"] and result["data"] == (0, 1), "both read the same rows"
    assert sorted(p for result in found for p in result["positions"]) == list(range(SEQUENCE))


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, {"context": 2}),
        (4, {"context": 2, "tensor": 2, "sequence_parallel": True}),
    ],
    ids=["cp2", "tp2_cp2_sequence_parallel"],
)
def test_losses_and_gradients_add_up_to_those_of_whole_sequences(
    ranks: RankPools, tmp_path: Path, world: int, layout: dict[str, Any]
) -> None:
    whole = ranks(world // 2, f"{CASES}:step", directory=tmp_path / "whole", **layout | {"context": 1})
    cut = ranks(world, f"{CASES}:step", directory=tmp_path / "cut", **layout)
    assert len(whole[0]["gradients"]) == 3
    for rank, result in enumerate(cut):
        assert result["means"] == pytest.approx(whole[0]["means"], rel=1e-6)
        for name, gradient in whole[rank % (world // 2)]["gradients"].items():
            np.testing.assert_allclose(result["gradients"][name], gradient, rtol=1e-4, atol=1e-6, err_msg=name)
