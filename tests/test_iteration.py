"""A run in steps: what it expands to, and what is refused before its first step."""

import functools
import json
from pathlib import Path

import numpy
import pytest

from pipelines import artifacts, iteration, planning
from pipelines import config as configuration
from pipelines.compose import compose
from pipelines.config import UserError
from pipelines.iteration import Part, expand
from pipelines.plan_text import as_text
from pipelines.stages import PIPELINE, STAGES
from pipelines.stages.plan import steps_plan
from pipelines.text.indexed import Writer
from pipelines.validation import validate

pytestmark = pytest.mark.usefixtures("machine_without_gpu")

BASE = ["experiment=quickstart", "student=custom", "parallel=tp2"]
TWO = "iterate.students=[{hidden_size: 112, num_hidden_layers: 5, steps: 50}, {hidden_size: 96, learning_rate: 2e-3}]"


@functools.cache
def composed(*overrides: str) -> configuration.Config:
    return compose([*BASE, TWO, *overrides])


def parts(*overrides: str) -> list[tuple[Part, configuration.Config]]:
    """The parts that belong to a step, each with the configuration that its own process composes."""
    found = expand(composed(*overrides), ("prune", "distil"))
    return [(part, composed(*overrides, *part.overrides)) for part in found]


def test_without_students_a_run_is_its_stages() -> None:
    assert expand(compose(["experiment=quickstart"]), PIPELINE) == [Part(stage) for stage in PIPELINE]


def test_steps_stand_in_the_place_of_prune_and_distil() -> None:
    def places(*stages: str) -> list[str]:
        return [f"{part.stage}{part.step or ''}" for part in expand(composed(), stages)]

    inner = ["prune1", "distil1", "prune2", "distil2"]
    assert places(*PIPELINE) == ["corpus", "teacher", *inner, "evaluate", "export", "report"]
    assert places("distil") == ["distil2"] and places("prune") == inner[:3]
    names = [config.run.name for _, config in parts()]
    assert names == ["quickstart/step1", "quickstart/step1", "quickstart", "quickstart"]


@pytest.mark.parametrize("teaches", ["first", "previous"])
def test_each_student_is_what_the_next_step_prunes(teaches: str) -> None:
    found = parts(f"iterate.teacher={teaches}")
    first, student = Path("runs/quickstart/teacher/hf"), Path("runs/quickstart/step1/distil/hf")
    read = [Path(str(config.model.path)) for _, config in found]
    last = student if teaches == "previous" else first
    assert read == [first, first, student, last]
    starts = [artifacts.student_start_directory(config) for part, config in found if part.stage == "distil"]
    assert starts == [Path("runs/quickstart/step1/prune/hf"), Path("runs/quickstart/prune/hf")]
    for _, config in found:
        assert artifacts.corpus_directory(config) == Path("runs/quickstart/corpus")
        assert config.iterate.students == [] and config.teacher.mode is configuration.TeacherMode.take
    assert [config.distil.steps for _, config in found] == [50, 50, 280, 280]
    assert [config.distil.learning_rate for _, config in found] == [4e-3, 4e-3, 2e-3, 2e-3]
    sizes = [(config.student.hidden_size, config.student.num_hidden_layers) for _, config in found]
    assert sizes == [(112, 5), (112, 5), (96, None), (96, None)]


def test_a_given_teacher_and_corpus_are_read_where_they_lie(tmp_path: Path) -> None:
    model = tmp_path / "it's a model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    given = [f'model.path="{model}"', "teacher=take", f'data.corpus="{tmp_path}/a corpus"']
    assert all(config.data.corpus == f"{tmp_path}/a corpus" for _, config in parts(*given))
    assert [config.model.path for part, config in parts(*given) if part.stage == "distil"] == [str(model)] * 2


def test_every_other_setting_is_the_runs_own() -> None:
    """What decides a step's result are the run's settings, but for those that the step gives."""
    for part, config in parts():
        before, after = (artifacts.settings(c, STAGES[part.stage]) for c in (composed(), config))
        changed = {key for key in before if before[key] != after[key]}
        assert changed <= {"student.hidden_size", "student.num_hidden_layers", "distil.steps", "distil.learning_rate"}


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        validate(compose([*BASE, *overrides]), ["prune", "distil"])
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["iterate.students=[{hidden_size: 96}, {hidden_size: 112}]"],
            ["iterate.students[1]: student.hidden_size", "at most the teacher's 96", "found 112"],
        ),
        (
            ["iterate.students=[{num_hidden_layers: 4}, {drop_layers: [5]}]"],
            ["iterate.students[1]: student.drop_layers", "layers from 1 to 4", "5"],
        ),
        (
            ["iterate.students=[{hidden_size: 96}, {num_attention_heads: 3}]"],
            ["iterate.students[1]: student.num_attention_heads", "3", "Take 2 or 4"],
        ),
        (
            ["iterate.students=[{hidden_size: 96, drop_layers: [1], num_hidden_layers: 3}, {}]"],
            ["iterate.students[0]: student.num_hidden_layers", "expected 5"],
        ),
        (
            ["iterate.students=[{steps: 5, hidden_size: 96}, {hidden_size: 64}]"],
            ["iterate.students[0]: distil.warmup_steps", "fewer than distil.steps=5"],
        ),
        (["iterate.students=[{hidden_size: 96, steps: 0}]"], ["iterate.students[0].steps", "1 or more"]),
        (["iterate.students=[{hidden_size: 96}]", "student.hidden_size=96"], ["student.hidden_size", "none beside"]),
        (["iterate.students=[{ratio: 0.5}]", "prune.target.ratio=0.5"], ["prune.target", "none beside", "ratio"]),
        (
            ["iterate.students=[{hidden_size: 96}, {hidden_size: 64}]", "prune.protect.hidden=[1]"],
            ["prune.protect", "numbered anew"],
        ),
        (["iterate.students=[{hiden_size: 96}]"], ["hiden_size", "Did you mean"]),
    ],
)
def test_a_step_that_cannot_work_is_refused_by_its_place(overrides: list[str], parts: list[str]) -> None:
    message = refusal(*overrides)
    assert all(part in message for part in parts), message


def test_what_distils_the_students_before_the_last_is_checked_with_prune_alone(tmp_path: Path) -> None:
    splits = {"calibration": [{"prefix": "data/text", "weight": 1.0}]}
    (tmp_path / "blend.json").write_text(json.dumps({"splits": splits, "vocab_size": 50, "eod": 0}))
    writer = Writer(tmp_path / "data" / "text", numpy.dtype(numpy.uint16))
    writer.add(numpy.ones(100_000, dtype=numpy.uint16), numpy.array([100_000]))
    writer.finish()

    def found(*overrides: str) -> str:
        with pytest.raises(UserError) as caught:
            validate(compose([*BASE, f"data.corpus={tmp_path}", *overrides]), ["prune"])
        return str(caught.value)

    assert "expected the train split, which stage distil reads" in found(TWO)
    slow = "iterate.students=[{hidden_size: 112, steps: 5}, {hidden_size: 96}]"
    assert "iterate.students[0]: distil.warmup_steps" in found(slow)
    assert (
        validate(compose([*BASE, f"data.corpus={tmp_path}", "iterate.students=[{hidden_size: 96}]"]), ["prune"]) == []
    )


def test_a_run_in_steps_may_be_named_like_any_other_and_its_name_has_no_slashes() -> None:
    assert "run.name" in refusal(TWO, "run.name=a/b")
    assert validate(composed(), list(PIPELINE)) == []


def test_shapes_follow_one_another_and_the_largest_stands_for_one_that_is_searched_for() -> None:
    config = compose([*BASE, "iterate.students=[{ratio: 0.7}, {ratio: 0.7, num_hidden_layers: 4}]"])
    teacher, first, second = iteration.shapes(config)
    assert 0.6 * teacher.parameters() < first.parameters() <= 0.7 * teacher.parameters()
    assert second.parameters() <= 0.7 * first.parameters() and second.num_hidden_layers == 4
    found = [compose([*BASE, *part.overrides]).prune.target for part in expand(config, ("prune",))]
    assert [target.ratio for target in found] == [0.7, 0.7, 0.7]


def test_the_plan_is_that_of_each_step_and_their_sum() -> None:
    config = composed()
    figures = steps_plan(config)
    first, second = figures["steps"]
    assert [step["student"]["hidden_size"] for step in (first, second)] == [112, 96]
    assert first["teacher"] == second["teacher"] == planning.counts(planning.teacher_shape(config))
    assert second["student"]["num_hidden_layers"] == 5
    assert (first["steps"], second["steps"]) == (50, 280)
    assert figures["sum"]["tokens"] == first["tokens"] + second["tokens"] == 330 * 16 * 128
    assert figures["sum"]["flops"] == first["flops"] + second["flops"]
    text = as_text(figures)
    assert "plan of quickstart, step 1 of 2" in text and "2 steps, the first model teaches: 675,840 tokens" in text
    assert steps_plan(composed("iterate.teacher=previous"))["steps"][1]["teacher"]["hidden_size"] == 112
