"""One real step of the sharded pair against the unsharded float64 reference, at every kind of layout."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import device_memory
from pipelines.activations import layer_numbers
from pipelines.compose import compose
from pipelines.config import Layout
from pipelines.core.divergence import Telemetry
from tests.model.cases_step import STUDENT, TEACHER
from tests.ranks import RankPools

CASES = "tests.model.cases_step"

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "tp2_sequence_parallel": (2, {"tensor": 2, "sequence_parallel": True}),
    "dp2": (2, {}),
    "dp2_distributed_optimizer": (2, {"distributed_optimizer": True}),
    "pp2": (2, {"pipeline": 2}),
    "pp2_tied": (2, {"pipeline": 2, "tied": True}),
    "tp4": (4, {"tensor": 4}),
    "tp2_pp2_sequence_parallel": (4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}),
    "tp2_dp2": (4, {"tensor": 2}),
}


def check(errors: dict[str, float], tolerance: float, term_tolerance: float) -> None:
    assert sum(name.endswith(".weight") for name in errors) >= 20, "every gradient is compared"
    for name, error in errors.items():
        assert error < (tolerance if name.endswith(".weight") else term_tolerance), name


def continuous(errors: dict[str, float]) -> dict[str, float]:
    """Without what a rounding moves by a whole token: agreement, bands and bins."""
    terms = ("loss", "kd", "ce", "tokens", "overlap", "teacher_entropy")
    return {n: e for n, e in errors.items() if n.endswith(".weight") or n.removeprefix("evaluation ") in terms}


@pytest.mark.parametrize("world, layout", LAYOUTS.values(), ids=LAYOUTS)
def test_values_and_gradients(ranks: RankPools, tmp_path: Path, world: int, layout: dict[str, Any]) -> None:
    errors = ranks(world, f"{CASES}:step_errors", directory=tmp_path, **layout)[0]
    for mode in ("", "evaluation "):
        assert {f"{mode}{name}" for name in ("loss", "kd", "ce", "agreement", "tokens")} <= set(errors)
    for name in ("overlap", "teacher_entropy", "student_calibration_error", "teacher_calibration_error"):
        assert f"evaluation {name}" in errors and name not in errors, "training steps do not pay for it"
    check(errors, 5e-6, 1e-6)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_gradient_accumulation(ranks: RankPools, tmp_path: Path, micro_batches: int) -> None:
    check(ranks(2, f"{CASES}:step_errors", directory=tmp_path, pipeline=2, micro_batches=micro_batches)[0], 5e-6, 1e-6)


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}], ids=["tp2", "pp2"])
def test_plain_language_model_training(ranks: RankPools, tmp_path: Path, layout: dict[str, int]) -> None:
    """No teacher: the same code with cross-entropy alone."""
    errors = ranks(2, f"{CASES}:step_errors", directory=tmp_path, kd_weight=0.0, ce_weight=1.0, **layout)[0]
    assert "kd" not in errors and "evaluation kd" not in errors
    check(errors, 5e-6, 1e-6)


def test_bf16(ranks: RankPools, tmp_path: Path) -> None:
    """No layout costs accuracy: at most twice the error of one process in bf16, which is a few roundings of 2^-8.

    Layouts that see the same tokens. The terms are sums in fp32: not rounded to bf16 on their way out.
    """

    def measured(world: int, **layout: Any) -> dict[str, float]:
        found = ranks(world, f"{CASES}:step_errors", directory=tmp_path, precision="bf16", **layout)[0]
        # A token near a bound lies in another band or bin; the teacher's entropy is of another size than the losses.
        return {n: e for n, e in found.items() if "entropy" not in n and "calibration" not in n}

    unsharded = measured(1)
    check(unsharded, 0.05, 0.005)
    for name in ("tp2", "tp2_sequence_parallel", "pp2"):
        errors = measured(2, **LAYOUTS[name][1])
        check(errors, 0.05, 0.005)
        for weight in (weight for weight in errors if weight.endswith(".weight")):
            assert errors[weight] <= 2 * unsharded[weight], f"{name}: {weight}"


@pytest.mark.parametrize(
    "layout",
    [{"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}],
    ids=["tp2_sequence_parallel", "pp2"],
)
@pytest.mark.parametrize(
    ("precision", "teacher"), [("fp32", "bf16"), ("bf16", "fp32")], ids=["bf16_teacher", "fp32_teacher"]
)
def test_a_teacher_in_another_precision(
    ranks: RankPools, tmp_path: Path, layout: dict[str, Any], precision: str, teacher: str
) -> None:
    """Near a float64 reference of the same rounded weights; pipeline stages round nothing of a teacher's states."""
    options = {"precision": precision, "teacher_precision": teacher}
    whole = continuous(ranks(1, f"{CASES}:step_errors", directory=tmp_path / "whole", **options)[0])
    check(whole, 0.05, 0.01)
    errors = continuous(ranks(2, f"{CASES}:step_errors", directory=tmp_path / "cut", **options, **layout)[0])
    check(errors, 0.05, 0.01)
    if precision == "fp32" and "pipeline" in layout:
        assert all(errors[name] == pytest.approx(error, abs=1e-6) for name, error in whole.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_teacher_keeps_its_own_dtype_under_every_wrapper(ranks: RankPools, tmp_path: Path, precision: str) -> None:
    """Float16Module casts whole modules. In memory the teacher has the bytes that `plan` tells."""
    teacher = "bf16" if precision == "fp32" else "fp32"
    options = {"precision": precision, "teacher_precision": teacher}
    dtypes = {"fp32": {torch.float32}, "bf16": {torch.bfloat16}}
    settings = compose([f"distil.precision={precision}", f"distil.teacher_precision={teacher}"]).distil
    planned = device_memory.bytes_per_device(TEACHER, STUDENT, Layout(2, 2, 1, 1, 1, "cpu", False), settings)
    for result in ranks(2, f"{CASES}:teacher_stays_as_it_was", directory=tmp_path, **options):
        assert result["dtypes"] == {"student": dtypes[precision], "teacher": dtypes[teacher]}
        assert result["unchanged"] and result["teacher_gradients"] == []
        assert result["teacher_bytes"] == planned["teacher_weights"]


@pytest.mark.parametrize(
    ("world", "options"),
    [(2, {"layers": 3}), (1, {"layers": 2, "precision": "bf16"}), (2, {"layers": 2, "pipeline": 2})],
    ids=["tp2_3_layers", "bf16_2_layers", "pp2_one_layer_each"],
)
def test_a_teacher_in_host_memory_gives_the_same_bits(
    ranks: RankPools, tmp_path: Path, world: int, options: dict[str, Any]
) -> None:
    for found in ranks(world, f"{CASES}:offloaded_teacher", directory=tmp_path, **options):
        assert found["equal"] and len(found["offloaded"]["states"]) == 6
        assert found["offloaded"]["means"] == found["resident"]["means"]
        assert found["at home"], "afterwards the device holds no layer's weights but the two buffers"
        assert 2 * found["layer"] <= found["on device"] < 2 * (found["layer"] + 7 * 256)


def test_a_model_that_is_trained_stays_on_the_device(ranks: RankPools, tmp_path: Path) -> None:
    assert "frozen" in ranks(1, f"{CASES}:refused_offload", directory=tmp_path)[0]


def test_vocabularies_padded_differently(ranks: RankPools, tmp_path: Path) -> None:
    """The teacher knows 80 ids, the student 67 of them: other shards on every rank."""
    check(ranks(2, f"{CASES}:step_errors", directory=tmp_path, tensor=2, teacher_vocab_size=80)[0], 5e-6, 1e-6)


def test_teacher_stays_as_it_was(ranks: RankPools, tmp_path: Path) -> None:
    for result in ranks(2, f"{CASES}:teacher_stays_as_it_was", directory=tmp_path):
        assert result["student_training"] and not result["teacher_training"]
        assert result["unchanged"] and result["teacher_gradients"] == []
        assert result["state"] == result["student_parameters"], "a checkpoint is a plain GPTModel of the student"
        assert len(result["sharded_state"]) == len(result["student_parameters"])
        assert not [name for name in result["sharded_state"] if "teacher" in name or "student" in name]


def test_weights_of_zero_cost_nothing_in_training(ranks: RankPools, tmp_path: Path) -> None:
    everything = ["token_loss", "kd", "ce", "agreement", "teacher ran 1"]
    watched = [*everything[:-1], *Telemetry._fields, everything[-1]]
    for result in ranks(2, f"{CASES}:terms_returned", directory=tmp_path):
        assert result == {
            "1.0 0.0 train": ["token_loss", "kd", "agreement", "teacher ran 1"],
            "1.0 0.0 eval": watched,
            "0.5 0.5 train": everything,
            "0.5 0.5 eval": watched,
            "0.0 1.0 train": ["token_loss", "ce", "teacher ran 0"],
            "0.0 1.0 eval": watched,
        }


@pytest.mark.parametrize("recompute", [False, True])
def test_a_layer_keeps_what_the_plan_estimates(ranks: RankPools, recompute: bool) -> None:
    """In plain torch, which fuses neither SwiGLU nor the rotary embedding and keeps their parts too."""
    (found,) = ranks(1, f"{CASES}:kept_by_a_layer", recompute=recompute)
    one = Layout(1, 1, 1, 1, 1, "cpu", False)
    estimate = 4 * (STUDENT.hidden_size if recompute else layer_numbers(STUDENT, one))
    assert estimate <= found <= (1.01 if recompute else 1.1) * estimate
