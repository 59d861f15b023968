"""The shipped recipes: what their headers promise is what the plan says, on the machines that they name."""

import re
import shlex

import pytest

from pipelines import planning
from pipelines.compose import compose, conf_directory, group_options
from pipelines.stages.plan import plan
from pipelines.validation import validate

RECIPES = [name for name in group_options("experiment") if name.startswith("llama")]


def header(name: str) -> dict[str, str]:
    text = (conf_directory() / "experiment" / f"{name}.yaml").read_text()
    return dict(re.findall(r"^# (\w+): +(\S.*)$", text, re.M))


@pytest.mark.parametrize("name", RECIPES)
def test_hours_and_parameters_of_the_header_are_the_plans(name: str) -> None:
    told, figures = header(name), plan(compose([f"experiment={name}"]))
    prediction = figures["prediction"]
    hours, device_hours = re.match(r"([\d.,]+) h, ([\d.,]+) device hours", told["time"]).groups()
    assert float(hours.replace(",", "")) == pytest.approx(prediction["hours"], rel=0.01, abs=0.005)
    assert float(device_hours.replace(",", "")) == pytest.approx(prediction["device_hours"], rel=0.01)
    assert f"{figures['student']['parameters']:,}" in told["number"]
    assert "experiment=" + name in told["command"]


@pytest.mark.parametrize("kind", ["width", "depth", "corrected"])
def test_the_papers_figures_on_32_machines_and_the_same_on_one(kind: str) -> None:
    experiment = f"experiment=llama31_8b_to_4b_{kind}"
    many, one = compose([experiment]), compose([experiment, "parallel.processes=8"])
    for config, data in ((many, 32), (one, 1)):
        assert planning.planned_layout(config).data == data and planning.planned_layout(config).tensor == 8
        assert validate(config, ["plan"]) == []
        training = config.distil
        assert (training.global_batch_size, training.sequence_length, training.warmup_steps) == (1152, 8192, 40)
        assert training.steps * training.global_batch_size * training.sequence_length == 93_994_352_640
        assert (training.learning_rate, training.min_learning_rate) == (1e-4, 1e-5)
        assert config.prune.calibration_samples == 1024


def test_the_corrected_teacher_is_planned_before_its_student() -> None:
    figures = plan(compose(["experiment=llama31_8b_to_4b_corrected"]))["teacher_training"]
    assert figures["tokens"] == pytest.approx(100e9, rel=1e-3)
    assert figures["device_hours"] == pytest.approx(3600, rel=0.01)
    assert "teacher_training" not in plan(compose(["experiment=llama31_8b_to_4b_width"]))


def test_the_3b_teacher_and_its_student() -> None:
    figures = plan(compose(["experiment=llama32_3b_to_1b"]))
    assert figures["teacher"]["parameters"] == 3_212_749_824, "as its model card's 3.21B"
    assert figures["student"]["parameters"] == pytest.approx(1e9, rel=0.04)
    assert figures["bytes_per_device"]["total"] < 40e9
    shape = planning.teacher_shape(compose(["experiment=llama32_3b_to_1b"]))
    assert shape.tie_word_embeddings and shape.rope_scaling and shape.rope_scaling["factor"] == 32


def test_the_corpora_that_are_named() -> None:
    for experiment, option in (("llama31_8b_to_4b_width", "fineweb_edu"), ("llama31_8b_to_4b_tutorial", "wikitext103")):
        config = compose([f"experiment={experiment}"])
        assert config.data == compose([f"data={option}"]).data
        (source,) = config.data.sources
        assert source.kind.value == "parquet" and source.text_key == "text"


@pytest.mark.parametrize("name", ["fineweb_edu", "wikitext103"])
def test_a_data_set_is_read_where_its_command_fetches_it_to(name: str) -> None:
    text = (conf_directory() / "data" / f"{name}.yaml").read_text()
    (command,) = re.findall(r"^# +python -m pipelines (stage=fetch .*)$", text, re.M)
    assert command in (conf_directory().parent / "docs" / "recipe.md").read_text()
    fetched = compose(shlex.split(command))
    assert validate(fetched, ["fetch"]) == []
    (repository,), (pattern,) = fetched.fetch.datasets, fetched.fetch.files
    (source,) = compose([f"data={name}"]).data.sources
    assert source.path == f"{fetched.fetch.directory}/datasets/{repository}/{pattern.rpartition('/')[0]}"
