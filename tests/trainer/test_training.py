"""NeMo's trainer takes the step that verify proves: same gradients, same norm, same averages."""

import json
import math
from pathlib import Path

import pytest

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
