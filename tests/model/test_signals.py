"""One real step with losses on hidden states, relations and attention against the float64 oracle, at every layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from pipelines.device_memory import projections_per_device
from pipelines.families import ModelShape
from pipelines.model.projections import build_projections
from pipelines.signals import FeatureLoss
from tests.ranks import RankPools

CASES = "tests.model.cases_signals"

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "tp2_sequence_parallel": (2, {"tensor": 2, "sequence_parallel": True}),
    "dp2_distributed_optimizer": (2, {"distributed_optimizer": True}),
    "pp2": (2, {"pipeline": 2}),
    "tp2_each_head": (2, {"tensor": 2, "each": True, "hidden": False}),
    "tp2_pp2_sequence_parallel": (4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}),
    "tp4": (4, {"tensor": 4}),
}


def check(errors: dict[str, float], tolerance: float, term_tolerance: float) -> None:
    assert sum(name.endswith(".weight") for name in errors) >= 20, "every gradient is compared"
    for name, error in errors.items():
        gradient = name.endswith(".weight") or name.startswith("projections ")
        assert error < (tolerance if gradient else term_tolerance), name


@pytest.mark.parametrize("world, layout", LAYOUTS.values(), ids=LAYOUTS)
def test_values_and_gradients(ranks: RankPools, tmp_path: Path, world: int, layout: dict[str, Any]) -> None:
    errors = ranks(world, f"{CASES}:step_errors", directory=tmp_path, **layout)[0]
    if layout.get("hidden", True):
        assert {"hidden_mse_0_0", "hidden_cosine_2_4", "hidden_relational_1_2", "loss"} <= set(errors)
        assert "projections hidden_cosine_2_4 1" in errors, "low rank has two factors"
    assert {"attention_kl_1_2", "attention_mse_2_4", "evaluation attention_scores_1_2"} <= set(errors)
    check(errors, 1e-5, 1e-5)


@pytest.mark.parametrize("layout", [{"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}], ids=["tp2_sp", "pp2"])
def test_hidden_losses_under_activation_recompute(ranks: RankPools, tmp_path: Path, layout: dict[str, Any]) -> None:
    options = {"attention": False, "recompute": True}
    check(ranks(2, f"{CASES}:step_errors", directory=tmp_path, **options, **layout)[0], 1e-5, 1e-5)


def test_a_factor_scales_them_all(ranks: RankPools, tmp_path: Path) -> None:
    for factor in (0.25, 0.0):
        errors = ranks(2, f"{CASES}:step_errors", directory=tmp_path, tensor=2, factor=factor)[0]
        check(errors, 1e-5, 1e-5)


def test_bf16(ranks: RankPools, tmp_path: Path) -> None:
    check(ranks(2, f"{CASES}:step_errors", directory=tmp_path, pipeline=2, precision="bf16")[0], 0.15, 0.1)


def test_a_teacher_in_bf16_beside_a_student_in_fp32(ranks: RankPools, tmp_path: Path) -> None:
    options = {"precision": "fp32", "teacher_precision": "bf16"}
    for layout in ({"pipeline": 2}, {"tensor": 2, "sequence_parallel": True}):
        check(ranks(2, f"{CASES}:step_errors", directory=tmp_path, **options, **layout)[0], 0.1, 0.05)


def test_projections_are_drawn_alike_at_every_layout(ranks: RankPools, tmp_path: Path) -> None:
    whole = ranks(1, f"{CASES}:drawn_projections", directory=tmp_path)[0]
    assert set(whole) == {"hidden_mse_0_0", "hidden_mse_1_2", "hidden_mse_2_4", "hidden_cosine_2_4"}
    assert not torch.equal(whole["hidden_mse_1_2"][0], whole["hidden_mse_2_4"][0]), "each its own"
    for layout in ({"tensor": 2}, {"pipeline": 2}):
        for found in ranks(2, f"{CASES}:drawn_projections", directory=tmp_path, **layout):
            assert all(torch.equal(a, b) for name in whole for a, b in zip(whole[name], found[name], strict=True))


def test_projections_are_in_checkpoints_and_in_no_export(ranks: RankPools, tmp_path: Path) -> None:
    for result in ranks(2, f"{CASES}:states_of_checkpoints", directory=tmp_path):
        assert set(result["projections"]) <= set(result["sharded"]) and result["loaded"]
        assert len(result["projections"]) == 5 and result["plain"] == []


def test_pairs_that_cannot_be_compared_are_refused(ranks: RankPools, tmp_path: Path) -> None:
    apart = {"student_layer": 1, "teacher_layer": 3, "kind": "mse", "weight": 1.0}
    for message in ranks(2, f"{CASES}:refusal", directory=tmp_path, loss=apart, pipeline=2):
        assert "student layer 1 on stage 0 and teacher layer 3 on stage 1" in message
    inside = {"student_layer": 1, "teacher_layer": 1, "kind": "kl", "weight": 1.0, "heads": "mean"}
    for message in ranks(2, f"{CASES}:refusal", directory=tmp_path, loss=inside, recompute=True):
        assert "distil.recompute=false" in message


def test_the_plan_counts_the_projections_that_are_trained() -> None:
    config = TransformerConfig(num_layers=2, hidden_size=24, num_attention_heads=2, use_cpu_initialization=True)
    teacher = ModelShape(99, 32, 48, 2, 4, 2, 12)
    kinds: list[dict[str, Any]] = [
        {"kind": "mse"},
        {"kind": "cosine", "rank": 4},
        {"kind": "relational"},
        {"kind": "kl", "heads": "mean"},
    ]
    losses = [FeatureLoss(1, 1, weight=1.0, **kind) for kind in kinds]
    trained = build_projections(config, losses, teacher_width=32, seed=1)
    counted = projections_per_device(teacher, teacher.replace(hidden_size=24), 1, losses)
    assert sum(parameter.numel() for parameter in trained.parameters()) == counted == 24 * 32 + 4 * (24 + 32)
