"""The verify stage passes at every layout as the code stands, and fails for each planted defect."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.processes import environment_outside_ranks
from pipelines.stages.verify import GROUPS, cases
from tests.ranks import RankPools

RUN = "tests.stages.cases_verify:run"

# (ranks, layout)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor": 2}),
    "tp2_sp": (2, {"tensor": 2, "sequence_parallel": True}),
    "dp2": (2, {"tensor": 1}),
    "dp2_distributed_optimizer": (2, {"tensor": 1, "distributed_optimizer": True}),
    "pp2": (2, {"tensor": 1, "pipeline": 2}),
    "tp2_sp_documents_apart": (2, {"tensor": 2, "sequence_parallel": True, "document_mask": True}),
    "dp2_documents_apart": (2, {"tensor": 1, "document_mask": True}),
    "pp2_documents_apart": (2, {"tensor": 1, "pipeline": 2, "document_mask": True}),
    "tp4": (4, {"tensor": 4}),
    "tp2_dp2": (4, {"tensor": 2}),
    "tp2_sp_dp2_distributed_optimizer": (4, {"tensor": 2, "sequence_parallel": True, "distributed_optimizer": True}),
    "tp2_pp2": (4, {"tensor": 2, "pipeline": 2}),
    "pp2_dp2_distributed_optimizer": (4, {"tensor": 1, "pipeline": 2, "distributed_optimizer": True}),
}


@pytest.mark.parametrize(("world", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_passes_and_compares_every_group(ranks: RankPools, tmp_path: Path, world: int, layout: dict[str, Any]) -> None:
    first, *others = ranks(world, RUN, directory=str(tmp_path), **layout)
    assert first["error"] == "" and all(other["error"] == "" for other in others)
    assert set(first["figures"]) == {"width", "depth_tied"}
    degrees = layout["tensor"], layout.get("pipeline", 1)
    for case in cases(*degrees):
        figures = first["figures"][case.name]
        expected = set(GROUPS) - ({"head"} if case.student.tie_word_embeddings else set())
        assert set(figures) == expected | {"loss", "kd", "ce", "agreement", "tokens"}
        assert all(figures[group]["values"] == 0 for group in expected), "fp32 weights come back bit for bit"
        assert all(0 < figures[group]["gradients"] <= 1e-5 for group in expected), "measured, and within the tolerance"
    compared = sum(len(case.student.tensors()) for case in cases(*degrees))
    assert f"{compared} tensors compared" in first["printed"]
    replicas = world // (degrees[0] * degrees[1])
    assert f"TP {degrees[0]} x PP {degrees[1]} x DP {replicas}" in first["printed"]
    assert first["printed"].count(" ok ") == len(first["figures"]["width"]) + len(first["figures"]["depth_tied"])
    assert not list(tmp_path.iterdir()), "the random models are removed again"


@pytest.mark.parametrize(
    "loss",
    [
        {"divergence": "reverse_kl"},
        {"divergence": "jensen_shannon", "divergence_parameter": 0.3},
        {"divergence": "skew_kl"},
        {"divergence": "total_variation"},
        {"top_k": 9},
    ],
    ids=lambda loss: "-".join(str(value) for value in loss.values()),
)
def test_passes_for_every_divergence(ranks: RankPools, tmp_path: Path, loss: dict[str, Any]) -> None:
    first, _ = ranks(2, RUN, directory=str(tmp_path), tensor=2, sequence_parallel=True, loss=loss)
    assert first["error"] == "" and "within tolerance" in first["printed"]
    assert all(0 < first["figures"][case.name]["fc1"]["gradients"] <= 1e-5 for case in cases(2, 1))


@pytest.mark.parametrize("name", ["tp2_sp", "dp2", "pp2", "tp2_pp2", "tp2_sp_dp2_distributed_optimizer"])
def test_losses_on_hidden_states_and_attention_are_verified(ranks: RankPools, tmp_path: Path, name: str) -> None:
    world, layout = LAYOUTS[name]
    first, *_ = ranks(world, RUN, directory=str(tmp_path), features=True, **layout)
    assert first["error"] == ""
    width, depth = first["figures"]["width"], first["figures"]["depth_tied"]
    assert 0 < width["projections"]["gradients"] <= 1e-5
    assert {"hidden_mse_0_0", "hidden_cosine_1_1", "hidden_relational_2_2", "attention_scores_1_1"} <= set(width)
    assert "attention_kl_1_2" in depth and "attention_kl_1_1" in width, "each layer with its teacher's"


def test_losses_across_tokens_are_refused_where_documents_stand_apart(ranks: RankPools, tmp_path: Path) -> None:
    first, second = ranks(2, RUN, directory=str(tmp_path), features=True, document_mask=True, tensor=2)
    assert "verify.document_mask" in first["error"] and first["error"] == second["error"]


FEATURE_DEFECTS = {
    "unsummed_projections": ({"tensor": 2, "sequence_parallel": True}, "width: gradient projections.hidden_mse"),
    "losses_not_carried": ({"tensor": 1, "pipeline": 2}, "width: gradient model.layers.0."),
}


@pytest.mark.parametrize("defect", FEATURE_DEFECTS)
def test_catches_in_losses_inside_the_models(ranks: RankPools, tmp_path: Path, defect: str) -> None:
    layout, sign = FEATURE_DEFECTS[defect]
    first, second = ranks(2, RUN, directory=str(tmp_path), defect=defect, features=True, **layout)
    assert sign in first["error"] and first["error"] == second["error"], first["error"]


DEFECTS = {
    "gradients_times_tp": ("tp2", "width: gradient model.layers.0.mlp.down_proj.weight: 1.0e+00"),
    "missing_temperature_squared": ("tp2", "width: term loss"),
    "local_normalization": ("tp2", "width: gradient model.layers.0.mlp.down_proj.weight"),
    "unmasked_padding": ("tp2", "width: term kd"),
    "shifted_label": ("tp2", "width: term ce"),
    "unreduced_gradients": ("tp2_dp2", "width: gradient model.layers.0.mlp.down_proj.weight"),
    "nan_gradient": ("tp2", "width: gradient model.layers.0.mlp.down_proj.weight: nan"),
    "attention_across_documents": ("tp2_sp_documents_apart", "width: term kd"),
    "counted_end_of_document": ("tp2_sp_documents_apart", "width: term tokens"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_catches(ranks: RankPools, tmp_path: Path, defect: str) -> None:
    name, sign = DEFECTS[defect]
    world, layout = LAYOUTS[name]
    first, *others = ranks(world, RUN, directory=str(tmp_path), defect=defect, **layout)
    assert sign in first["error"], first["error"]
    assert all(other["error"] == first["error"] for other in others), "every rank ends with the same message"
    assert "FAILED" in first["printed"] and "within tolerance" not in first["printed"]


def test_command_line_fails_above_tolerance(tmp_path: Path) -> None:
    """The real command: a table, then one message without a traceback, and an exit code that stops a script."""
    command = [sys.executable, "-m", "pipelines", "stage=verify", "parallel=tp2", f"run.directory={tmp_path}"]
    environment = environment_outside_ranks()
    ended = subprocess.run([*command, "verify.tolerance=1e-9"], capture_output=True, text=True, env=environment)
    assert ended.returncode == 2
    assert "FAILED" in ended.stdout and "within tolerance" not in ended.stdout
    assert "gradient lm_head.weight" in ended.stderr and "Traceback" not in ended.stderr


def test_refuses_context_parallelism_by_name(ranks: RankPools, tmp_path: Path) -> None:
    first, _ = ranks(2, RUN, directory=str(tmp_path), tensor=1, context=2)
    assert "parallel.context=1" in first["error"]


def test_refuses_more_ids_than_there_are(ranks: RankPools, tmp_path: Path) -> None:
    first, _ = ranks(2, RUN, directory=str(tmp_path), tensor=2, loss={"top_k": 200})
    assert "verify.top_k: expected fewer than the 97 ids" in first["error"]


def test_shapes_are_awkward() -> None:
    for tensor in (1, 2, 3, 4, 8):
        for case in cases(tensor, 2):
            for shape in (case.teacher, case.student):
                assert tensor == 1 or shape.vocab_size % tensor
                assert shape.head_dim * shape.num_attention_heads != shape.hidden_size
                assert shape.num_key_value_heads < shape.num_attention_heads or tensor == 1
            assert case.student.parameters() < case.teacher.parameters()
