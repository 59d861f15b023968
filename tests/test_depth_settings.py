"""Settings of the choice of layers by measurement: what is refused before anything starts, and what has no effect."""

import json
from pathlib import Path

import pytest

from pipelines.compose import compose
from pipelines.config import UserError
from pipelines.families import ModelShape
from pipelines.model.random_model import write_random_model
from pipelines.validation import validate

pytestmark = pytest.mark.usefixtures("machine_without_gpu")

BASE = [
    "experiment=quickstart",
    "student=custom",
    "parallel=tp1",
    "model.shape.num_hidden_layers=6",
    "student.num_hidden_layers=4",
]


@pytest.fixture
def task(tmp_path: Path) -> str:
    path = tmp_path / "task.jsonl"
    path.write_text(json.dumps({"query": "q", "choices": ["a", "b"], "gold": 0}) + "\n")
    return str(path)


def warned(*overrides: str) -> list[str]:
    return validate(compose([*BASE, *overrides]), ["corpus", "teacher", "prune"])


@pytest.mark.parametrize("method", ["loss", "contiguous", "greedy"])
def test_measuring_methods_take_a_number_of_layers(method: str, task: str) -> None:
    assert warned(f"prune.depth_method={method}") == []
    assert warned(f"prune.depth_method={method}", "prune.depth_measure=task", f"prune.task={task}") == []
    with pytest.raises(UserError) as error:
        warned(f"prune.depth_method={method}", "student.num_hidden_layers=null")
    assert (
        f"student.num_hidden_layers: expected the number of layers that stay with prune.depth_method={method}"
        in str(error.value)
    )


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["prune.depth_measure=task"], ["prune.task: expected questions with prune.depth_method=contiguous by task"]),
        (["prune.depth_measure=task", "prune.task=none.jsonl"], ["prune.task=none.jsonl", "found nothing"]),
        (
            ["prune.protect.layers=[2,4,6]"],
            ["2 neighbouring layers that it does not name", "found at most 1", "greedy"],
        ),
        (["prune.protect.ffn=[{layer: 3, indices: [0]}]", "student.num_hidden_layers=2"], ["4 neighbouring layers"]),
        (
            ["student.num_hidden_layers=null", "prune.target.ratio=0.6", "prune.protect.layers=[2,4]"],
            ["3 neighbouring layers that it does not name", "found at most 2"],
        ),
        (["prune.depth_samples=0"], ["prune.depth_samples: expected 1 or more, found 0"]),
    ],
)
def test_what_cannot_be_measured_is_told_at_once(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        warned("prune.depth_method=contiguous", *overrides)
    for part in parts:
        assert part in str(error.value)


def test_a_broken_line_of_the_task_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "task.jsonl").write_text("{")
    with pytest.raises(UserError, match="line 1: expected JSON"):
        warned("prune.depth_method=loss", "prune.depth_measure=task", f"prune.task={tmp_path / 'task.jsonl'}")


def test_a_task_without_the_models_tokenizer_is_told_at_once(tmp_path: Path, task: str) -> None:
    write_random_model(tmp_path / "teacher", ModelShape(50, 16, 24, 6, 8, 2, 4), 1)
    (tmp_path / "blend.json").write_text(json.dumps({"splits": {}, "vocab_size": 50, "eod": 0}))
    given = ["model=given", f"model.path={tmp_path / 'teacher'}", "teacher=take", f"data.corpus={tmp_path}"]
    by_task = ["prune.depth_method=loss", "prune.depth_measure=task", f"prune.task={task}"]
    with pytest.raises(UserError, match="prune.task: expected a tokenizer.json in the teacher's directory"):
        validate(compose([*BASE, *given, *by_task]), ["prune"])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["prune.depth_method=contiguous", "student.num_hidden_layers=6"], "no effect: every layer stays"),
        (["prune.depth_method=greedy", "student.drop_layers=[2,3]"], "no effect with student.drop_layers"),
        (["prune.depth_measure=task"], "prune.depth_measure=task has no effect without"),
        (["prune.depth_samples=4"], "prune.depth_samples has no effect where no removal's loss is measured"),
        (["prune.depth_method=loss", "prune.depth_samples=100000"], "no effect beyond calibration_samples="),
        (["prune.depth_method=loss", "prune.task=TASK"], "prune.task has no effect without prune.depth_measure=task"),
        (["prune.task_normalised=true"], "prune.task_normalised has no effect without prune.task"),
    ],
)
def test_settings_without_effect_are_told(overrides: list[str], expected: str, task: str) -> None:
    assert any(expected in line for line in warned(*(text.replace("TASK", task) for text in overrides)))
