"""Checkpoints whose files are written while the training goes on."""

from pathlib import Path

import pytest

from pipelines.compose import compose
from pipelines.config import layout as layout_of
from pipelines.families import ModelShape
from pipelines.storage import host_memory
from tests.ranks import RankPool, RankPools
from tests.trainer.cases_runs import STUDENT
from tests.trainer.cases_training import SHAPE
from tests.trainer.test_runs import CASE, SHORT, Run, Whole, rows, run, whole  # noqa: F401 two of them fixtures

BACKGROUND = {"save_asynchronous": True, "late": True}

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("layout", [{"distributed_optimizer": True}, {"tensor": 2}], ids=["dp2", "tp2"])
def test_steps_are_taken_meanwhile_and_nothing_else_changes(run: Run, layout: dict[str, int], tmp_path: Path) -> None:  # noqa: F811
    (at_once, other), (meanwhile, second) = run("at-once", **layout), run("meanwhile", **BACKGROUND, **layout)
    assert rows(meanwhile) == rows(at_once) and meanwhile["figures"] == at_once["figures"]
    assert meanwhile["states"] == at_once["states"] and second["states"] == other["states"]
    assert at_once["writing"] == [] and {4, 7} <= set(meanwhile["writing"])
    assert meanwhile["checkpoints"] == at_once["checkpoints"] == ["step-0000009", "step-0000010"]
    assert meanwhile["forks"] == 0
    training, shape = compose(["distil.distributed_optimizer=true"]).distil, ModelShape(**SHAPE).replace(**STUDENT)
    gathered, _ = host_memory(training, 0, shape.parameters(), layout_of(compose(["parallel=tp2"]).parallel))
    for rank in (meanwhile, second):
        planned = gathered if "distributed_optimizer" in layout else 0
        assert rank["gathered"] == pytest.approx(planned, rel=5e-3), "as the plan says; Megatron aligns each weight"
    for step in meanwhile["checkpoints"]:
        names = [
            {str(file.relative_to(tmp_path / name)) for file in (tmp_path / name / "checkpoints" / step).rglob("*")}
            for name in ("at-once", "meanwhile")
        ]
        assert names[0] == names[1]


def test_a_kill_while_files_are_written_goes_back_to_the_checkpoint_before(
    ranks: RankPools,
    run: Run,  # noqa: F811
    whole: Whole,  # noqa: F811
    tmp_path: Path,
    made: Path,
) -> None:
    doomed = RankPool(2)
    arguments = {"directory": str(tmp_path), "corpus": str(made), "name": "killed", "fault": "kill", "at": 9}
    with pytest.raises(RuntimeError, match="died"):
        doomed(CASE, arguments | BACKGROUND | SHORT | {"stuck": 6}, timeout=300)
    checkpoints = tmp_path / "killed" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["partial-step-0000006", "step-0000003"]
    (continued, _) = run("killed", **BACKGROUND)
    assert min(continued["states"]) == 4, "from what was written while later steps changed the tensors"
    assert rows(continued) == rows(whole[1])
    assert continued["checkpoints"] == ["step-0000009", "step-0000010"]


def test_a_disk_that_fills_meanwhile_ends_every_rank_with_one_message(run: Run) -> None:  # noqa: F811
    results = run("full", full=6, **BACKGROUND)
    assert len({result["message"] for result in results}) == 1
    told = results[0]["message"]
    assert "expected room for a checkpoint, found: No space left on device. Free some space" in told
    assert results[0]["checkpoints"] == ["step-0000003"]
    assert 7 in results[0]["states"], "a later step has found it"
    (continued, _) = run("full", **BACKGROUND)
    assert continued["checkpoints"] == ["step-0000009", "step-0000010"]


@pytest.mark.parametrize(
    ("fault", "at", "told", "kept"),
    [
        ("asked", 4, "stopped as asked at step 4", ["step-0000003", "step-0000004"]),
        ("gradient", 4, "a gradient norm that is not at step 4", ["step-0000003"]),
    ],
)
def test_a_run_that_ends_early_waits_for_what_is_being_written(
    run: Run,  # noqa: F811
    fault: str,
    at: int,
    told: str,
    kept: list[str],
) -> None:
    for result in run("ended", fault=fault, at=at, **BACKGROUND):
        assert told in result["message"] and result["checkpoints"] == kept
