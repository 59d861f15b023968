"""NeMo's trainer takes the step that verify proves: same gradients, same norm, same averages."""

import json
import math
from pathlib import Path

import pytest

from pipelines.report.record import OF_THE_MACHINE
from tests.ranks import RankPools
from tests.trainer import cases_training

CASES = "tests.trainer.cases_training"


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "distributed_optimizer"), [(2, False), (1, False), (1, True)])
def test_first_step_has_the_gradients_of_the_plain_step(
    ranks: RankPools, tmp_path: Path, made: Path, tensor: int, distributed_optimizer: bool
) -> None:
    results = ranks(
        2,
        f"{CASES}:first_step",
        directory=str(tmp_path),
        corpus=str(made),
        tensor=tensor,
        distributed_optimizer=distributed_optimizer,
    )
    assert len(results[0]["differences"]) == 2 + 1 + 2 * 6  # embedding, head, final norm, and six of each layer
    for result in results:
        assert max(result["differences"].values()) < 1e-6, result["differences"]
        assert result["data"][1] == 2 // tensor
    row = json.loads(results[0]["row"])
    for name in ("loss", "kd", "ce"):
        assert row[name] == pytest.approx(results[0]["means"][name], rel=1e-6)
    assert row["tokens"] == cases_training.GLOBAL * cases_training.SEQUENCE


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "teacher"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_the_teacher_keeps_its_precision_beside_nemos(
    ranks: RankPools, tmp_path: Path, made: Path, precision: str, teacher: str
) -> None:
    """Two pipeline stages, whose messages have the dtype that NeMo's mixed precision writes into the configuration."""
    results = ranks(
        2,
        f"{CASES}:first_step",
        directory=str(tmp_path),
        corpus=str(made),
        tensor=1,
        pipeline=2,
        distributed_optimizer=False,
        precision=precision,
        teacher_precision=teacher,
    )
    for result in results:
        assert result["teacher"] == {{"fp32": "torch.float32", "bf16": "torch.bfloat16"}[teacher]}
        assert max(result["differences"].values()) < 1e-6, result["differences"]
    row = json.loads(results[0]["row"])
    for name in ("loss", "kd", "ce"):
        assert row[name] == pytest.approx(results[0]["means"][name], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", [1, 2], ids=["dp2", "pp2"])
def test_documents_apart_in_the_trainer_as_in_the_plain_step(
    ranks: RankPools, tmp_path: Path, made: Path, pipeline: int
) -> None:
    """Micro batches become one row each, also between pipeline stages; padding by the same token hides no end."""
    results = ranks(
        2,
        f"{CASES}:first_step",
        directory=str(tmp_path),
        corpus=str(made),
        tensor=1,
        pipeline=pipeline,
        distributed_optimizer=False,
        document_mask=True,
    )
    rows, row = cases_training.GLOBAL * pipeline // 2, json.loads(results[0]["row"])
    for result in results:
        assert max(result["differences"].values()) < 1e-6, result["differences"]
        assert result["shapes"] == {(1, cases_training.MICRO * cases_training.SEQUENCE)}
        # A row begins a document, and so does what follows an end, but for an end at the end of a row.
        assert rows <= result["documents"] <= rows + result["ends"]
    ends = sum(result["ends"] for result in results[: 2 // pipeline])
    counted = cases_training.GLOBAL * cases_training.SEQUENCE - ends
    assert ends > 0 and any(result["documents"] > rows for result in results)
    assert row["tokens"] == results[0]["means"]["tokens"] == counted
    for name in ("loss", "kd", "ce"):
        assert row[name] == pytest.approx(results[0]["means"][name], rel=1e-6)


@pytest.mark.slow
def test_gradient_norm_counts_every_shard_once(ranks: RankPools, tmp_path: Path, made: Path) -> None:
    norms = {}
    for tensor in (1, 2):
        (result, _) = ranks(
            2,
            f"{CASES}:first_step",
            directory=str(tmp_path),
            corpus=str(made),
            tensor=tensor,
            distributed_optimizer=False,
        )
        norms[tensor] = json.loads(result["row"])["gradient_norm"]
    assert norms[2] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.slow
def test_a_teacher_of_random_weights_stops_the_run(ranks: RankPools, tmp_path: Path, made: Path) -> None:
    messages = ranks(2, f"{CASES}:distil_from_random_teacher", directory=str(tmp_path), corpus=str(made))
    bound = 0.9 * math.log(600)
    assert all(f"{bound:.3f}" in message and "random" in message for message in messages), messages


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"tensor": 1, "pipeline": 1}, {"tensor": 1, "pipeline": 2}], ids=["dp2", "pp2"])
def test_projections_schedules_and_taid_continue_where_they_were(
    ranks: RankPools, tmp_path: Path, made: Path, layout: dict[str, int]
) -> None:
    found = ranks(2, f"{CASES}:course_stopped_and_continued", directory=str(tmp_path), corpus=str(made), **layout)
    rows = {name: [json.loads(row) for row in found[0][name]] for name in ("whole", "stopped")}
    for row in rows["whole"] + rows["stopped"]:
        for name in OF_THE_MACHINE:
            row.pop(name, None)
    assert rows["stopped"] == rows["whole"]
    assert all(result["equal"] for result in found)
    train = [row for row in rows["whole"] if row["split"] == "train"]
    assert [round(row["ce_weight"], 12) for row in train[:3]] == [0.1, 0.166666666667, 0.233333333333]
    assert train[0]["features_factor"] == 1 and train[-1]["features_factor"] == 0.5
    shares = [row["taid_t"] for row in train]
    assert shares[:2] == pytest.approx([0.4, 0.4075], rel=1e-12), "after the first step there is no change of the loss"
    assert shares == sorted(shares) and shares[-1] > 0.4 + 0.6 * 9 / 80 + 0.01, "above the line"
    for row in train:
        total = 0.9 * 4 * row["kd"] + row["ce_weight"] * row["ce"]
        hidden = sum(row[f"hidden_mse_{layer}_{layer}"] for layer in (0, 1, 2)) / 3 + row["hidden_cosine_2_2"]
        assert row["loss"] == pytest.approx(total + row["features_factor"] * hidden, rel=1e-5)
    assert any("hidden_cosine_2_2" in row for row in rows["whole"] if row["split"] == "validation")
