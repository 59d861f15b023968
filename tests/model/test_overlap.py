"""Gradients reduced while the backward pass runs, and weights gathered while the forward pass runs."""

from pathlib import Path

import pytest

from tests.ranks import RankPools


@pytest.mark.parametrize(
    "options",
    [{"distributed": False}, {"distributed": True}, {"distributed": True, "tied": True, "hidden": True}],
    ids=["all_reduce", "distributed_optimizer", "tied_head_and_projections"],
)
def test_overlap_changes_no_bit(ranks: RankPools, tmp_path: Path, options: dict[str, bool]) -> None:
    """The head's gradient is written in the forward pass, over two micro batches; the head itself is read past its
    module, as projections are."""
    for found in ranks(2, "tests.model.cases_overlap:steps", directory=tmp_path, **options):
        assert found["means"] and found["weights"] and found["learned"]
        assert found["outstanding"] == 0, "all that was started was waited for"
        assert found["buckets"] == 0, "each parameter has its own"
