"""The grid of student shapes: against brute force, what it refuses, the speeds that bound it; the capacity advice."""

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from pipelines import capacity, device_memory, grid, planning, speeds
from pipelines.compose import compose
from pipelines.config import Config, Layout, UserError
from pipelines.families import ModelShape
from pipelines.plan_text import as_text
from pipelines.prune_settings import OfLayerConfig
from pipelines.stages import plan
from pipelines.validation import validate
from pipelines.validation.shapes import check_target

pytestmark = pytest.mark.usefixtures("machine_without_gpu")

TEACHER = ModelShape(97, 48, 96, 6, 12, 4, 8)
TARGETS = (
    {"parameters": 50_000.0},
    {"ratio": 0.55},
    {"bytes_per_gpu": 60_000.0},
    {"ratio": 0.8, "tokens_per_second": 2.0e9},
    {"seconds": 3e-7, "bytes_per_gpu": 80_000.0},
)


def ranks(tensor: int = 1, pipeline: int = 1) -> Layout:
    return Layout(tensor * pipeline, tensor, pipeline, 1, 1, "cpu", False)


def configure(target: dict[str, float], **search: Any) -> Config:
    config = Config()
    for group, values in ((config.prune.target, target), (config.prune.search, search)):
        for name, value in values.items():
            assert hasattr(group, name)
            setattr(group, name, value)
    return config


@pytest.mark.parametrize("seed", range(len(TARGETS)))
def test_every_candidate_keeps_the_limits_and_none_is_missed(seed: int) -> None:
    draw = random.Random(seed)
    layout, config = ranks(draw.choice((1, 2)), draw.choice((1, 2, 3))), configure(TARGETS[seed], smallest=0.3)
    config.prune.multiples.hidden_size, config.prune.multiples.intermediate_size = draw.choice((1, 8)), 6
    if seed % 2:
        config.prune.search.num_hidden_layers = [6]
    if seed == 2:
        config.student.hidden_size = 40
    least = 1
    if seed == 1:  # two heads of one group
        config.prune.protect.heads = [OfLayerConfig(1, [3, 4])]
        config.prune.protect.hidden, least = list(range(30)), 2
    found, values = grid.candidates(config, layout, TEACHER)
    assert found and [c.parameters for c in found] == sorted((c.parameters for c in found), reverse=True)
    expected = {}
    for sizes in itertools.product(*values.values()):
        shape = TEACHER.replace(**dict(zip(values, sizes, strict=True)))
        heads, groups = shape.num_attention_heads, shape.num_key_value_heads
        if heads % groups or not least <= heads // groups <= 3:
            continue
        shares = (shape.parameters(), 2 * device_memory.parameters_per_device(shape, layout.tensor, layout.pipeline))
        seconds = speeds.Device(989e12, 3.35e12, layout.tensor, 256, 256)
        outer, layer = seconds.parts(shape)
        time = outer + layer * shape.num_hidden_layers
        target = {name: value or math.inf for name, value in vars(config.prune.target).items()}
        size = min(target["parameters"], target["ratio"] * TEACHER.parameters())
        most = min(target["seconds"], 256 / target["tokens_per_second"] if target["tokens_per_second"] < 1e99 else 9)
        if shares[0] <= size and shares[1] <= target["bytes_per_gpu"] and time <= most:
            expected[grid.shape_name(shape)] = (*shares, pytest.approx(time))
    assert {c.name: (c.parameters, c.bytes_per_gpu, c.seconds) for c in found} == expected
    for axis, sizes in values.items():
        unit = grid.unit(config, layout, axis)
        assert all(0 < size <= getattr(TEACHER, axis) and size % unit == 0 for size in sizes)
    if seed == 1:
        assert values["hidden_size"][0] >= 30
    for candidate in found:
        candidate.shape.check("")
        check_target(config, layout, TEACHER, candidate.shape)
        assert candidate.shape.num_hidden_layers % layout.pipeline == 0
        assert candidate.shape.num_key_value_heads % layout.tensor == 0


def test_steps_are_about_a_sixteenth_in_the_multiples() -> None:
    llama = planning.teacher_shape(compose(["experiment=llama31_8b_to_4b_width"]))
    config = configure({"parameters": 4.5e9})
    config.prune.multiples.intermediate_size = 512
    values = grid.axis_values(config, ranks(4), llama)
    assert values["hidden_size"] == tuple(range(2048, 4097, 256))
    assert values["intermediate_size"] == tuple(range(7168, 14337, 1024))
    assert values["num_attention_heads"] == tuple(range(16, 33, 4))
    assert values["num_key_value_heads"] == (4, 8)
    assert values["num_hidden_layers"] == tuple(range(16, 33, 2))


def refusal(*overrides: str, stages: tuple[str, ...] = ("corpus", "teacher", "prune")) -> str:
    with pytest.raises(UserError) as caught:
        validate(compose(["experiment=quickstart", "student=custom", "parallel=tp2", *overrides]), stages)
    return str(caught.value)


TARGET = "prune.target.ratio=0.6"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["prune.target.parameters=2e6"], ["prune.target.parameters", "the teacher's 1,443,456, found 2,000,000"]),
        (["prune.target.ratio=1"], ["prune.target.ratio", "fewer parameters than the teacher's"]),
        (["prune.target.ratio=0.1"], ["prune.target.ratio: expected at least the", "smallest candidate, h64-f192-a2-"]),
        (["prune.target.bytes_per_gpu=1000"], ["bytes of the lightest candidate, h64-f192", "found 1,000"]),
        (["prune.target.tokens_per_second=1e15"], ["prune.target.tokens_per_second", "of the fastest candidate, h64"]),
        (["prune.target.seconds=1e-12"], ["prune.target.seconds: expected at least the", "found 1e-12 s"]),
        (["prune.target.seconds=1", "plan.gpu=abacus"], ["plan.gpu: expected a GPU whose peak is known", "abacus"]),
        ([TARGET, "prune.search.hidden_size=[256]"], ["prune.search.hidden_size", "the teacher's 128, found 256"]),
        ([TARGET, "prune.search.intermediate_size=[129]"], ["multiples of 2", "found 129. Take 128"]),
        (
            [TARGET, "prune.multiples.hidden_size=64", "prune.search.hidden_size=[96]"],
            ["multiples of 64 (prune.multiples.hidden_size and the layout)", "found 96. Take 64"],
        ),
        ([TARGET, "prune.multiples.hidden_size=256"], ["prune.multiples.hidden_size: expected a multiple from 64"]),
        (
            [TARGET, "student.hidden_size=96", "prune.search.hidden_size=[96]"],
            ["prune.search.hidden_size: expected none where the student's size is given, 96"],
        ),
        (
            [
                TARGET,
                *("student.hidden_size=96", "student.intermediate_size=256", "student.num_attention_heads=4"),
                *("student.num_key_value_heads=2", "student.num_hidden_layers=6"),
            ],
            ["prune.target: expected a size to search, found one value on every axis"],
        ),
        ([TARGET, "prune.depth_method=layers", "prune.search.num_hidden_layers=[3]"], ["none with prune.depth_method"]),
        (
            [TARGET, "prune.search.candidates=20"],
            ["prune.search.candidates: expected at most prune.search.measured=16"],
        ),
        ([TARGET, "prune.search.by=task"], ["prune.search.by: expected loss without prune.task"]),
        ([TARGET, "prune.search.speed=nowhere.json"], ["modelled, measured or a table's file, found nowhere.json"]),
        (
            [TARGET, "prune.search.distil_tokens=1e4", "distil.warmup_steps=300"],
            ["distil.warmup_steps: expected fewer than distil.steps=280"],
        ),
        (
            [TARGET, "prune.search.distil_tokens=1e4", "distil.hidden=[{student_layer: 5, teacher_layer: 5}]"],
            ["distil.hidden[0].student_layer: expected a layer from 0 to", "found 5", "(Of the candidate h"],
        ),
    ],
)
def test_what_cannot_be_searched_is_one_message_at_once(overrides: list[str], parts: list[str]) -> None:
    message = refusal(*overrides)
    for part in parts:
        assert part in message


def test_the_plan_says_the_limits_the_candidates_and_the_largest(capsys: pytest.CaptureFixture[str]) -> None:
    config = compose(["experiment=llama31_8b_to_4b_width", "student=custom", "prune.target.parameters=4.5e9"])
    assert validate(config, ["plan"]) == []
    figures = plan.plan(config)
    found = figures["search"]
    assert found["limits"] == {"parameters": 4.5e9}
    assert found["candidates"] > 1000 and 4.45e9 < found["largest"][0]["parameters"] <= 4.5e9
    assert figures["student"]["parameters"] == found["largest"][0]["parameters"]
    assert found["largest"][0]["tokens_per_second"] > 1000 and found["speeds"] == "modelled for H100 in bf16"
    forward = 2 * 16 * found["passes"] * 8e9  # about 2 per weight
    tokens = config.prune.calibration_samples * config.prune.sequence_length
    assert (
        found["passes"] == 1 + 8 + 8 + 2 + 8 + 16 + 4 and forward * tokens / 16 < found["flops"] < forward * tokens / 8
    )
    text = as_text(figures)
    assert f"{found['passes']} passes over the calibration sequences, " in text
    assert "at most 4,500,000,000 parameters" in text and found["largest"][0]["name"] in text
    assert f"{found['candidates']:,} candidates; 16 are measured, 4 compared again" in text


def table(path: Path, config: Config, layout: Layout, **changes: Any) -> Path:
    head = speeds.table_head(config, layout, TEACHER) | {"machine": "a test"} | changes
    rows = [
        dict(zip(speeds.WIDTH, speeds.width_of(shape), strict=True))
        | {"outer_seconds": 1.0, "layer_seconds": shape.hidden_size / 48}
        for shape in grid.widths(TEACHER, grid.axis_values(config, layout, TEACHER), config.prune.protect)
    ]
    path.write_text(json.dumps(head | {"rows": rows}))
    return path


def test_a_table_of_speeds_bounds_the_search_and_another_layouts_is_refused(tmp_path: Path) -> None:
    config = configure({"seconds": 4.0})
    config.prune.search.speed = str(table(tmp_path / "speed.json", config, ranks()))
    found, _ = grid.candidates(config, ranks(), TEACHER)
    assert max(c.seconds or 0 for c in found) <= 4
    assert any(c.shape.num_hidden_layers == 6 and c.shape.hidden_size == 24 for c in found)
    assert all(c.shape.num_hidden_layers < 6 for c in found if c.shape.hidden_size == 48)
    with pytest.raises(UserError, match="expected layout .*'tensor': 2.*found .*'tensor': 1"):
        grid.candidates(config, ranks(2), TEACHER)
    config.prune.sequence_length = 128
    with pytest.raises(UserError, match="expected sequence_length 128, found 256"):
        grid.candidates(config, ranks(), TEACHER)
    config.prune.sequence_length = 256
    config.prune.search.smallest = 0.25
    with pytest.raises(UserError, match="expected a row of hidden_size=.*measured"):
        grid.candidates(config, ranks(), TEACHER)
    (tmp_path / "speed.json").write_text(json.dumps(speeds.table_head(config, ranks(), TEACHER) | {"rows": [{}]}))
    with pytest.raises(UserError, match="expected rows of hidden_size.*row 1"):
        grid.candidates(config, ranks(), TEACHER)
    row = dict.fromkeys(speeds.WIDTH, 48)
    for rows, expected in (
        (5, "expected a list of rows, found 5"),
        ([row | {"outer_seconds": 1, "layer_seconds": -1}], "row 1: expected outer_seconds and .*found 1 and -1"),
        ([row | {"outer_seconds": 1, "layer_seconds": float("nan")}], "row 1: expected .*found 1 and nan"),
        ([row | {"outer_seconds": 0, "layer_seconds": 0}], "row 1: expected .*found 0 and 0"),
    ):
        head = speeds.table_head(config, ranks(), TEACHER)
        (tmp_path / "speed.json").write_text(json.dumps(head | {"rows": rows}))
        with pytest.raises(UserError, match=expected):
            grid.candidates(config, ranks(), TEACHER)


def test_speeds_yet_to_be_measured_bound_nothing_before_they_are() -> None:
    found, _ = grid.candidates(configure({"seconds": 1e-9}, speed="measured"), ranks(), TEACHER)
    assert found[0].seconds is None and found[0].parameters == TEACHER.parameters()


def test_beyond_a_ratio_of_4_sizes_between_are_proposed() -> None:
    config, large = Config(), TEACHER.replace(hidden_size=480, intermediate_size=960)
    assert capacity.advice(config, ranks(), large, large.replace(hidden_size=240)) is None
    small = large.replace(hidden_size=48, intermediate_size=96, num_hidden_layers=3)
    found = capacity.advice(config, ranks(2), large, small)
    assert found is not None
    ratio = large.parameters() / small.parameters()
    assert found["distillations"] == math.ceil(math.log(ratio, 4)) == len(found["between"]) + 1
    sizes = [large.parameters(), *(entry["parameters"] for entry in found["between"]), small.parameters()]
    for above, below in itertools.pairwise(sizes):
        assert above / below == pytest.approx(ratio ** (1 / found["distillations"]), rel=1e-3)
    for entry in found["between"]:
        assert small.parameters() < entry["shape_parameters"] < large.parameters()
    other = small.replace(intermediate_size=2000)  # somebody else's
    beside = capacity.advice(config, ranks(), large, other)
    assert beside and beside["between"][0]["shape"] is None


def test_validation_and_plan_advise_of_hand_picked_shapes_too() -> None:
    config = compose(
        ["experiment=quickstart", "student=custom", "student.hidden_size=16", "student.num_hidden_layers=2"]
    )
    (warning,) = validate(config, ["plan"])
    assert "times smaller than the teacher; beyond 4 a model between them teaches better" in warning
    figures = plan.plan(config)
    assert figures["capacity"]["distillations"] == 2 or figures["capacity"]["distillations"] == 3
    assert "capacity" in as_text(figures)


def test_search_settings_without_a_target_are_told() -> None:
    (warning,) = validate(compose(["experiment=quickstart", "prune.search.measured=8"]), ["plan"])
    assert warning == "prune.search has no effect without prune.target"
