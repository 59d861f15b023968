"""The dry run at true size: what hollow models hold against the plan, and that it names what does not agree."""

import copy
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pipelines import device_memory, dry_run, planning
from pipelines.compose import compose
from pipelines.config import Config, Layout, UserError, layout
from pipelines.families import ModelShape
from pipelines.processes import environment_outside_ranks
from pipelines.signals import FeatureLoss

ROOT = Path(__file__).resolve().parent.parent
# 99 ids are padded to 100; the head is the embedding, of which the last of three stages has a copy.
TEACHER = ModelShape(99, 32, 48, 6, 4, 2, 12, tie_word_embeddings=True)
STUDENT = TEACHER.replace(hidden_size=24, num_hidden_layers=3)
SHAPES = {"teacher": TEACHER, "student": STUDENT}
RANKS = Layout(12, 2, 3, 1, 2, "cpu", True)
LOSSES = [FeatureLoss(1, 2, "mse", 1.0)]


@pytest.fixture(scope="module")
def training() -> Any:
    return compose(["distil.precision=bf16", "distil.teacher_precision=fp32"]).distil


@pytest.fixture(scope="module")
def built() -> list[dict[str, Any]]:
    """What the child finds; one process for all tests of this file."""
    request = {
        "shapes": {who: asdict(shape) for who, shape in SHAPES.items()},
        "directories": {"teacher": None, "student": None},
        "precisions": {"teacher": "fp32", "student": "bf16"},
        "ranks": asdict(RANKS),
        "recompute": True,
        "sequence_length": 16,
        "losses": [asdict(loss) for loss in LOSSES],
    }
    return dry_run._build(request)


def found(built: list[dict[str, Any]], training: Any) -> list[str]:
    return list(dry_run.mismatches(built, SHAPES, RANKS, training, LOSSES))


def test_every_distinct_rank_is_built_and_agrees_with_the_plan(built: list[dict[str, Any]], training: Any) -> None:
    assert [(rank["rank"], rank["tensor"], rank["pipeline"]) for rank in built] == [
        (0, 0, 0),
        (1, 1, 0),
        (4, 0, 1),
        (5, 1, 1),
        (8, 0, 2),
        (9, 1, 2),
    ]
    assert found(built, training) == []
    largest = dry_run.largest_bytes(built, training)
    assert largest["teacher_weights"] == 4 * device_memory.parameters_per_device(TEACHER, 2, 3)
    assert largest["student_weights"] == 2 * device_memory.parameters_per_device(STUDENT, 2, 3)
    assert sum(built[0]["trained"].values()) - 24 * 32 == sum(n for n, _ in parameters(built, 0, "student").values())


def parameters(built: list[dict[str, Any]], place: int, who: str) -> dict[str, list[int]]:
    sizes: dict[str, list[int]] = built[place]["models"][who]["parameters"]
    return sizes


def changed(built: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return copy.deepcopy(built)


def test_a_parameter_of_another_size_is_named_by_rank_and_tensor(built: list[dict[str, Any]], training: Any) -> None:
    wrong, name = changed(built), "decoder.layers.2.mlp.linear_fc2.weight"
    parameters(wrong, 3, "teacher")[name][0] += 1
    first, *_ = found(wrong, training)
    assert first.startswith(f"rank 5 (tensor 1, pipeline 1), teacher, {name}: expected 768 values, found 769")


def test_a_parameter_too_many_is_named(built: list[dict[str, Any]], training: Any) -> None:
    wrong = changed(built)
    parameters(wrong, 0, "student")["decoder.final_layernorm.weight"] = [24, 2]
    assert "decoder.final_layernorm.weight: expected 0 values, found 24" in found(wrong, training)[0]


def test_a_gap_in_what_the_ranks_read_is_named(built: list[dict[str, Any]], training: Any) -> None:
    wrong, name = changed(built), "model.layers.0.mlp.up_proj.weight"
    wrong[1]["models"]["teacher"]["read"][name] = [0, 25, 48]
    lines = found(wrong, training)
    assert len(lines) == 1 and name in lines[0] and "without gap or overlap, found [(0, 24), (25, 48)]" in lines[0]


def test_a_tensor_that_nobody_reads_is_named(built: list[dict[str, Any]], training: Any) -> None:
    wrong = changed(built)
    for rank in wrong:
        rank["models"]["student"]["read"].pop("model.norm.weight", None)
    assert found(wrong, training) == [
        "student, model.norm.weight: expected 1 pipeline stage to read it, found []",
    ]


def test_a_teacher_with_gradients_and_bytes_beyond_the_plan_are_named(
    built: list[dict[str, Any]], training: Any
) -> None:
    wrong = changed(built)
    wrong[0]["trained"]["teacher.embedding.word_embeddings.weight"] = 0
    assert "expected a frozen teacher" in found(wrong, training)[0]
    wrong = changed(built)
    for rank in range(len(wrong)):
        for size in parameters(wrong, rank, "student").values():
            size[1] = 4
    lines = found(wrong, training)
    assert len(lines) == 1 and lines[0].startswith("fullest rank, student_weights: planned ")


def test_what_does_not_agree_ends_the_plan() -> None:
    dry_run.refuse_mismatches({"mismatches": []})
    with pytest.raises(UserError, match=r"(?s)found 14 mismatches:\n  line 0\n.*\n  and 2 more\n") as caught:
        dry_run.refuse_mismatches({"mismatches": [f"line {number}" for number in range(14)]})
    assert "line 12" not in str(caught.value)


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("pipeline", [1, 2])
def test_shards_of_the_table_add_up(tensor: int, pipeline: int) -> None:
    shape = ModelShape(99, 32, 48, 4, 4, 4, 12)
    stages = [sum(dry_run.shard_parameters(shape, tensor, pipeline, stage).values()) for stage in range(pipeline)]
    assert max(stages) == device_memory.parameters_per_device(shape, tensor, pipeline)
    if tensor == 1:
        assert sum(stages) == shape.parameters()


def plan(*overrides: str) -> "subprocess.CompletedProcess[str]":
    environment = environment_outside_ranks()
    return subprocess.run(
        [sys.executable, "-m", "pipelines", "stage=plan", *overrides],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        timeout=240,
    )


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["llama31_8b_to_4b_width", "llama31_8b_to_4b_depth"])
def test_the_recipe_is_built_at_true_size_on_256_ranks(experiment: str) -> None:
    settings = [f"experiment={experiment}", "parallel.processes=256", "dry_run=true", "format=json"]
    done = plan(*settings)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["dry_run"]
    assert found["mismatches"] == [] and found["processes"] == 256
    assert [rank["tensor"] for rank in found["ranks"]] == list(range(8))
    config: Config = compose(settings[:2])
    planned = planning.plan(config)["bytes_per_device"]
    assert found["largest"]["teacher_weights"] == planned["teacher_weights"] > 2 * 8_030_261_248 / 8
    assert found["largest"]["student_weights"] == planned["student_weights"]
    assert found["largest"]["trained_gradients"] == planned["student_gradients"]
    assert layout(config.parallel).data == 32


@pytest.mark.slow
def test_headers_of_a_given_model_that_lie_end_the_plan_with_their_name(tmp_path: Path) -> None:
    import torch

    from pipelines.model.hub_files import write_hub_files
    from pipelines.model.safetensors_stream import write_hollow

    shape = ModelShape(256, 32, 48, 2, 4, 2, 8)
    sizes = shape.tensor_shapes() | {"model.layers.1.mlp.up_proj.weight": (47, 32)}
    write_hollow(tmp_path, {name: (size, torch.bfloat16) for name, size in sizes.items()}, 20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 and (tmp_path / "model.safetensors.index.json").is_file()
    write_hub_files(tmp_path, shape, torch.bfloat16)
    done = plan("model=given", f"model.path={tmp_path}", "student=custom", "parallel=tp2", "plan.dry_run=true")
    assert done.returncode == 2, done.stderr
    assert "rank 0 (tensor 0, pipeline 0), teacher: expected a model that is built and read" in done.stderr
    assert "model.layers.1.mlp.up_proj.weight: expected [48, 32], found [47, 32]" in done.stderr
    assert "Traceback" not in done.stderr
