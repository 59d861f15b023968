"""What the prune stage is said to cost, against counts taken by hand."""

import json
from pathlib import Path

import pytest

from pipelines import planning
from pipelines.choices import DepthMethod
from pipelines.compose import compose
from pipelines.config import layout
from pipelines.plan_text import as_text
from pipelines.prune_costs import prune_cost, removals
from pipelines.stages.plan import plan

TOKENS = 1024 * 8192


def cost(*overrides: str) -> dict:
    config = compose(["parallel.device=cpu", *overrides, "parallel.processes=8"])
    teacher, student = planning.teacher_shape(config), planning.student_shape(config)
    return prune_cost(config, teacher, student, layout(config.parallel))


def test_scoring_the_8b_is_one_forward_pass_without_the_head() -> None:
    found = cost("experiment=llama31_8b_to_4b_width")
    norms = (2 * 32 + 1) * 4096
    per_token = 2 * (6_979_588_096 - norms) + 2 * 8192 * 32 * 128 * 32
    (scoring,) = found["passes"]
    assert (scoring["what"], scoring["passes"], scoring["flops"]) == ("scoring", 1, TOKENS * per_token)
    assert found["seconds"]["scoring"] == pytest.approx(TOKENS * per_token / (8 * 0.4 * 989e12), abs=0.01)
    assert found["bytes_read"] == 2 * 8_030_261_248 and found["bytes_written"] == 2 * 4_512_746_496
    assert found["minutes"] == pytest.approx(sum(found["seconds"].values()) / 60, abs=0.01)


@pytest.mark.parametrize("name", ["width", "depth"])
def test_the_8b_recipes_are_pruned_in_less_than_ten_minutes_on_eight_gpus(name: str) -> None:
    config = compose([f"experiment=llama31_8b_to_4b_{name}"])
    assert (config.prune.calibration_samples, config.prune.sequence_length) == (1024, 8192)
    assert 1 < cost(f"experiment=llama31_8b_to_4b_{name}")["minutes"] < 10


def test_layers_that_are_named_cost_no_pass_and_those_that_are_found_do() -> None:
    depth = ["experiment=llama31_8b_to_4b_depth"]
    assert cost(*depth)["passes"] == [] and cost(*depth)["bytes_read"] == 0
    free = [*depth, "student.drop_layers=null"]
    scoring = cost(*free)["passes"]
    assert [entry["what"] for entry in scoring] == ["scoring"]
    contiguous = cost(*free, "prune.depth_method=contiguous")
    (left_out,) = contiguous["passes"]
    assert (left_out["what"], left_out["passes"]) == ("layers left out", 18)
    assert 8 * scoring[0]["flops"] < left_out["flops"] < 12 * scoring[0]["flops"]
    assert contiguous["minutes"] < 10
    fewer = cost(*free, "prune.depth_method=contiguous", "prune.depth_samples=256")["passes"][0]["flops"]
    assert left_out["flops"] == 4 * fewer


def test_what_is_not_passed_over_is_not_counted(tmp_path: Path) -> None:
    free = ["experiment=llama31_8b_to_4b_depth", "student.drop_layers=null"]
    assert cost(*free, f"prune.scores={tmp_path / 'scores.safetensors'}")["passes"] == []
    by_task = cost(*free, "prune.depth_method=contiguous", "prune.depth_measure=task")
    assert by_task["passes"] == [] and by_task["not_counted"] == ["questions of prune.task"]
    assert by_task["bytes_read"] == 2 * 8_030_261_248
    contiguous = [*free, "prune.depth_method=contiguous"]
    assert cost(*contiguous, "prune.depth_samples=99999")["passes"] == cost(*contiguous)["passes"]


def test_taylor_runs_backward_too() -> None:
    width = "experiment=llama31_8b_to_4b_width"
    forward, taylor = cost(width)["passes"][0], cost(width, "prune.importance=taylor")["passes"][0]
    assert taylor["what"] == "taylor"
    assert taylor["flops"] == 3 * (forward["flops"] + 2 * TOKENS * 128_256 * 4096)
    assert cost(width, "prune.importance=random")["passes"] == []


def test_removals_are_counted_as_each_method_makes_them() -> None:
    assert removals(DepthMethod.loss, 6, 2) == [(1, 6), (6, 5), (1, 4)]
    assert removals(DepthMethod.loss, 6, 1) == [(1, 6), (6, 5)]
    assert removals(DepthMethod.contiguous, 6, 2) == [(1, 6), (5, 4)]
    assert removals(DepthMethod.greedy, 6, 2) == [(1, 6), (6, 5), (5, 4)]


def test_the_plan_shows_it_unless_the_student_is_given() -> None:
    config = compose(["experiment=llama31_8b_to_4b_width", "parallel.processes=8"])
    figures = plan(config)
    text = as_text(figures)
    assert f"{figures['pruning']['minutes']} min at this layout" in text and "an assumption" in text
    assert "scoring 42.7 s (1 of 8,388,608 tokens)" in text
    assert json.loads(json.dumps(figures))["pruning"] == figures["pruning"]
    assert "pruning" not in plan(compose(["experiment=quickstart_ce"]))
