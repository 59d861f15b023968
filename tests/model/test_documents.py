"""Documents that share a row: nothing of one reaches another, and each is as if it were alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.model.documents import moved, packed_sequences, separated
from tests.model import cases_documents
from tests.ranks import RankPools

CASES = "tests.model.cases_documents"
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tensor": 2},
    "tp2_sequence_parallel": {"tensor": 2, "sequence_parallel": True},
}


def test_rows_become_one_with_the_places_where_documents_begin() -> None:
    tokens = torch.tensor([[5, 9, 6, 7, 9, 9], [8, 4, 4, 4, 4, 9]])  # 9 ends a document
    batch = {
        "tokens": tokens,
        "labels": tokens.roll(-1),
        "position_ids": torch.arange(6).repeat(2, 1),
        "loss_mask": torch.tensor([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1.0]]),
    }
    found = separated(batch, 9)
    assert found["cu_seqlens"].tolist() == [0, 2, 5, 6, 12] and found["cu_seqlens"].dtype == torch.int32
    assert found["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 0, 1, 2, 3, 4, 5]]
    assert found["loss_mask"].tolist() == [[1, 0, 0, 1, 0, 0, 1, 1, 1, 1, 1, 0]]
    for name in ("tokens", "labels"):
        assert torch.equal(found[name], batch[name].reshape(1, 12))
    packed = packed_sequences(moved(found, torch.device("cpu")))
    assert packed is not None and packed.qkv_format == "thd"
    assert packed.max_seqlen_q == packed.max_seqlen_kv == 6
    assert packed_sequences(batch) is None


def test_one_document_over_the_whole_row() -> None:
    found = separated({"tokens": torch.ones(1, 5, dtype=torch.int64), "loss_mask": torch.ones(1, 5)}, 9)
    assert found["cu_seqlens"].tolist() == [0, 5] and found["position_ids"].tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_another_text_in_one_document_changes_no_bit_of_its_neighbours(
    ranks: RankPools, tmp_path: Path, layout: dict[str, Any]
) -> None:
    for found in ranks(2, f"{CASES}:leaks", directory=tmp_path, **layout):
        own = [[0, position] for position in range(4, 8)]
        assert found["apart"] == own
        # Without the mask what follows changes too; the row's first document and the other row do not.
        assert found["together"] == own + [[0, position] for position in range(9, 12)]


@pytest.mark.parametrize("options", [{}, {"tensor": 2}, {"recompute": True}], ids=["tp1", "tp2", "recompute"])
def test_terms_and_gradients_are_those_of_each_document_alone(
    ranks: RankPools, tmp_path: Path, options: dict[str, Any]
) -> None:
    """The shapes have Llama 3.1's rope scaling."""
    errors = ranks(2, f"{CASES}:against_each_alone", directory=tmp_path, **options)[0]
    assert sum(name.endswith("weight") for name in errors) == 15
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize(
    "layout", [{"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}], ids=["tp2_sequence_parallel", "pp2"]
)
def test_evaluation_of_documents_apart(ranks: RankPools, tmp_path: Path, layout: dict[str, Any]) -> None:
    results = ranks(2, f"{CASES}:figures", directory=tmp_path, **layout)
    assert all(result["found"] == pytest.approx(results[0]["expected"], rel=1e-5) for result in results)
    assert results[0]["found"][2] == cases_documents.COUNTED


def test_scores_of_documents_apart_are_those_of_each_alone(ranks: RankPools, tmp_path: Path) -> None:
    found = ranks(2, f"{CASES}:scores", directory=tmp_path)[0]
    assert found["apart"] == pytest.approx(found["alone"], rel=1e-5)
    sharded = ranks(2, f"{CASES}:scores", directory=tmp_path, tensor=2, sequence_parallel=True)[0]
    assert sharded["apart"] == pytest.approx(found["alone"], rel=1e-5)
