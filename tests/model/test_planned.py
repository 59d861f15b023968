"""What a step takes beside what is planned: bytes in memory and bytes between ranks, of real steps."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.compose import compose
from pipelines.config import DistilConfig, Layout
from pipelines.device_memory import bytes_per_device
from pipelines.traffic import communication
from tests.model.cases_planned import MICRO_BATCH, MICRO_BATCHES, SEQUENCE, STUDENT, TEACHER
from tests.ranks import RankPools

STEP = "tests.model.cases_planned:step"
TP2, TP2_SP, PP2 = {"tensor": 2}, {"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}


def settings(recompute: bool = False) -> DistilConfig:
    sizes = [MICRO_BATCH, MICRO_BATCH * MICRO_BATCHES, SEQUENCE, recompute]
    names = ("micro_batch_size", "global_batch_size", "sequence_length", "recompute")
    return compose([f"distil.{name}={size}" for name, size in zip(names, sizes, strict=True)]).distil


def at(options: dict[str, Any]) -> Layout:
    tensor, pipeline = options.get("tensor", 1), options.get("pipeline", 1)
    return Layout(tensor * pipeline, tensor, pipeline, 1, 1, "cpu", options.get("sequence_parallel", False))


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("options", [{}, TP2, PP2], ids=["tp1", "tp2", "pp2"])
def test_a_process_holds_what_is_planned(
    ranks: RankPools, tmp_path: Path, options: dict[str, Any], recompute: bool
) -> None:
    """Within 15 %, by torch's record of every allocation. Not under sequence parallelism: what its asynchronous
    collectives let go of is freed in threads that the record does not see."""
    layout = at(options)
    planned = bytes_per_device(TEACHER, STUDENT, layout, settings(recompute))
    found = ranks(layout.processes, STEP, directory=tmp_path, recompute=recompute, **options)
    held = max(rank["stays"] + rank["peak"] for rank in found)
    assert planned["activations"] > 0.3 * planned["total"], "most of what is estimated is there"
    assert planned["total"] == pytest.approx(held, rel=0.15)


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("options", [TP2, TP2_SP, PP2], ids=["tp2", "tp2_sequence_parallel", "pp2"])
def test_ranks_send_what_is_planned(ranks: RankPools, tmp_path: Path, options: dict[str, Any], recompute: bool) -> None:
    """Within a hundredth: numbers per token of the loss, norms and means are left out."""
    layout = at(options)
    (found, *_) = ranks(2, STEP, directory=tmp_path, recompute=recompute, **options)
    transfers = communication(TEACHER, STUDENT, layout, settings(recompute))["transfers"]
    kinds = {  # what a ring of two sends of a tensor
        "all-reduce": ("allreduce_", 1),
        "all-gather": ("_allgather_base_", 0.5),
        "reduce-scatter": ("_reduce_scatter_base_", 0.5),
        "point to point": ("send", 1),
    }
    assert transfers
    for kind, (name, share) in kinds.items():
        planned = sum(part["bytes"] for part in transfers if part["kind"] == kind)
        given = share * found["collectives"].get(name, 0)
        assert given == pytest.approx(planned, rel=0.01, abs=0 if planned else 2e5), kind
