"""Where the prune stage's scores come from: measured, taken from a file, or random."""

import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.choices import Aggregation, DepthMethod, Importance
from pipelines.config import Config, UserError
from pipelines.core.importance import Scores
from pipelines.families import read_shape
from pipelines.files import write_json
from pipelines.pruning import scores_file
from pipelines.pruning.scores import random_scores
from pipelines.scores_origin import asked
from pipelines.validation import data, scores
from tests.model.teachers import random_weights, write_teacher
from tests.stages.test_prune import ERROR, RUN, SHAPE, write_corpus


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("prune")
    teacher = write_teacher(root / "teacher", SHAPE, random_weights(SHAPE))
    return {"teacher": str(teacher), "corpus": str(write_corpus(root / "corpus", SHAPE.vocab_size))}


@pytest.fixture(scope="module")
def measured(ranks, tmp_path_factory, paths):
    """scores.safetensors of a run of the stage."""
    run = tmp_path_factory.mktemp("run")
    figures = ranks(2, RUN, directory=str(run), settings={"student.hidden_size": 8, "parallel.tensor": 2}, **paths)[0]
    assert figures["scores"] == "measured" and figures["scoring_seconds"] > 0
    return run / "prune" / "scores.safetensors"


def provenance(path) -> dict:
    return scores_file.read_notes(path)["provenance"]


# Another run's


def test_scores_of_another_run_need_no_calibration_data_and_no_passes(ranks, tmp_path, paths, measured):
    corpus = Path(shutil.copytree(paths["corpus"], tmp_path / "corpus"))
    blend = json.loads((corpus / "blend.json").read_text())
    write_json(corpus / "blend.json", blend | {"splits": {"train": blend["splits"]["calibration"]}})
    settings = {"prune.scores": str(measured), "student.num_attention_heads": 4, "student.num_hidden_layers": 3}
    arguments = {"teacher": paths["teacher"], "corpus": str(corpus)}
    figures = ranks(2, RUN, directory=str(tmp_path / "run"), settings=settings, **arguments)[0]
    assert (figures["scores"], figures["scoring_seconds"]) == (str(measured), 0)
    assert read_shape(tmp_path / "run/prune/hf") == SHAPE.replace(num_attention_heads=4, num_hidden_layers=3)
    assert (tmp_path / "run/prune/scores.safetensors").read_bytes() == measured.read_bytes()
    del settings["prune.scores"]
    ranks(1, RUN, directory=str(tmp_path / "direct"), settings=settings, **paths)
    kept = [(tmp_path / run / "prune/kept.json").read_text() for run in ("run", "direct")]
    assert kept[0] == kept[1]


def configuration(paths, **settings) -> Config:
    config = Config()
    config.model.path, config.data.corpus = paths["teacher"], paths["corpus"]
    config.student.hidden_size = 8
    for name, value in settings.items():
        setattr(config.prune, name, value)
    return config


def refusal(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        scores.check(config, ["prune"], read_shape(config.model.path))
    return str(caught.value)


def test_a_file_that_does_not_fit_is_refused_before_anything_starts(tmp_path, paths, measured):
    scores.check(configuration(paths, scores=str(measured)), ["prune"], SHAPE)
    missing, short, other = tmp_path / "none.safetensors", tmp_path / "short.safetensors", tmp_path / "o.safetensors"
    short.write_bytes(measured.read_bytes()[:-9])
    save_file({"hidden": torch.ones(16)}, other)
    assert f"{missing}: expected a file scores.safetensors of a prune stage, found none" in refusal(
        configuration(paths, scores=str(missing))
    )
    assert "truncated or corrupt" in refusal(configuration(paths, scores=str(short)))
    assert "a safetensors file without their provenance" in refusal(configuration(paths, scores=str(other)))
    notes, arrays = scores_file.read_notes(measured), load_file(measured)
    without = tmp_path / "without.safetensors"
    scores_file.update(without, {name: value for name, value in arrays.items() if name != "ffn.2"}, notes)
    assert "missing ffn.2. Leave prune.scores out" in refusal(configuration(paths, scores=str(without)))
    wrong = tmp_path / "wrong.safetensors"
    scores_file.update(wrong, arrays | {"heads.1": torch.ones(3)}, notes)
    assert "expected heads.1 of shape [8] in F64, found [3] in F32" in refusal(configuration(paths, scores=str(wrong)))
    given = configuration(paths, scores=str(measured), sample_aggregation=Aggregation.max)
    assert "another kind than asked for: sample_aggregation: l2, not max" in refusal(given)
    given = configuration(paths, scores=str(measured), importance=Importance.taylor)
    assert "importance: activation, not taylor" in refusal(given)
    given = configuration(paths, scores=str(measured), depth_method=DepthMethod.taylor)
    given.student.num_hidden_layers = 3
    assert "missing taylor_layers" in refusal(given)


def test_scores_of_another_model_are_refused_whatever_its_path(ranks, tmp_path, paths, measured):
    moved = Path(shutil.copytree(paths["teacher"], tmp_path / "moved"))
    scores.check(configuration({**paths, "teacher": str(moved)}, scores=str(measured)), ["prune"], SHAPE)
    other = write_teacher(tmp_path / "other", SHAPE, random_weights(SHAPE, 2))
    message = refusal(configuration({**paths, "teacher": str(other)}, scores=str(measured)))
    assert f"expected scores of the model in {other}" in message and f"those of {paths['teacher']}" in message
    settings = {"prune.scores": str(measured), "student.hidden_size": 8}
    arguments = {"directory": str(tmp_path / "run"), "corpus": paths["corpus"], "teacher": str(other)}
    messages = ranks(2, ERROR, settings=settings, **arguments)
    assert messages == [message, message]
    assert list((tmp_path / "run/prune").iterdir()) == []


def test_the_origin_says_what_scores_were_made_of(paths, measured):
    found = provenance(measured)
    config = configuration(paths, sequence_length=16, calibration_samples=12)
    assert {name: found[name] for name in asked(config)} == asked(config)
    assert (found["samples"], found["tokens"]) == (12, 12 * 16)
    assert found["versions"]["torch"] and "parallel" not in json.dumps(found)


def test_settings_of_scoring_without_effect_are_told(paths, measured):
    def told(**settings) -> list[str]:
        return list(scores.warnings(configuration(paths, **settings), ["prune"], SHAPE))

    assert told() == told(scores=str(measured)) == told(sequence_aggregation=Aggregation.max) == []
    (line,) = told(importance=Importance.taylor, sequence_aggregation=Aggregation.max)
    assert line == "prune.sequence_aggregation has no effect with prune.importance=taylor"
    assert "prune.sample_aggregation" in told(importance=Importance.random, sample_aggregation=Aggregation.max)[0]
    config = configuration(paths, importance=Importance.taylor, scores=str(measured))
    config.student.hidden_size, config.student.drop_layers = None, [1]
    lines = list(scores.warnings(config, ["prune"], SHAPE))
    assert [line.split(" has no effect")[0] for line in lines] == ["prune.scores", "prune.importance=taylor"]


# The gradient's


def test_layers_by_taylor_are_added_to_scores_by_activation(ranks, tmp_path, paths, measured):
    directory = tmp_path / "run"
    (directory / "prune").mkdir(parents=True)
    file = directory / "prune" / "scores.safetensors"
    scores_file.copy(measured, file)
    scores_file.update(file, {"removed_loss": torch.ones(2)}, {"removal": {"samples": 3}})
    settings = {"student.hidden_size": 8, "student.num_hidden_layers": 2, "prune.depth_method": DepthMethod.taylor}
    settings["parallel.tensor"] = 2
    assert ranks(2, RUN, directory=str(directory), settings=settings, **paths)[0]["scores"] == "measured"
    before, after = load_file(measured), load_file(file)
    assert after.keys() - before.keys() == {"taylor_layers", "removed_loss"}
    assert all((after[name] == before[name]).all() for name in before)
    assert scores_file.read_notes(file)["removal"] == {"samples": 3}
    kept = json.loads((directory / "prune/kept.json").read_text())
    assert kept["layers"] == sorted((after["taylor_layers"].topk(2).indices + 1).tolist())
    assert ranks(2, RUN, directory=str(directory), settings=settings, **paths)[0]["scoring_seconds"] == 0


def test_everything_by_taylor_is_the_same_at_every_layout(ranks, tmp_path, paths):
    settings = {"student.hidden_size": 8, "student.num_key_value_heads": 1, "student.num_hidden_layers": 3}
    settings["prune.importance"] = Importance.taylor
    found = {}
    for name, layout in (("dp2", {}), ("tp2", {"parallel.tensor": 2, "parallel.sequence_parallel": True})):
        ranks(2, RUN, directory=str(tmp_path / name), settings=settings | layout, **paths)
        found[name] = load_file(tmp_path / name / "prune/scores.safetensors")
        assert provenance(tmp_path / name / "prune/scores.safetensors")["importance"] == "taylor"
    assert "taylor_layers" in found["dp2"]
    for name, expected in found["dp2"].items():
        numpy.testing.assert_allclose(found["tp2"][name], expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
    kept = [json.loads((tmp_path / name / "prune/kept.json").read_text()) for name in found]
    assert kept[0] == kept[1]
    assert kept[0]["hidden"] == sorted(found["dp2"]["hidden"].topk(8).indices.tolist())
    assert kept[0]["groups"]["1"] == [int(found["dp2"]["kv_groups.1"].argmax())]


# Random


def test_random_is_the_same_at_every_layout_and_needs_no_data(ranks, tmp_path, paths):
    settings = {"student.hidden_size": 8, "student.intermediate_size": 10, "student.num_hidden_layers": 2}
    settings |= {"prune.importance": Importance.random, "prune.depth_method": DepthMethod.random}
    arguments = {"teacher": paths["teacher"], "corpus": str(tmp_path / "none")}
    kept = []
    for name, more in (("dp2", {}), ("tp2", {"parallel.tensor": 2}), ("other", {"prune.random_seed": 1})):
        figures = ranks(2, RUN, directory=str(tmp_path / name), settings=settings | more, **arguments)[0]
        assert (figures["scores"], figures["scoring_seconds"]) == ("random", 0)
        assert load_file(tmp_path / name / "prune/scores.safetensors") == {}
        kept.append(json.loads((tmp_path / name / "prune/kept.json").read_text()))
    assert kept[0] == kept[1] != kept[2]
    drawn = random_scores(SHAPE, 1234)
    assert kept[0]["hidden"] == sorted(drawn.hidden.topk(8).indices.tolist())
    assert isinstance(drawn, Scores) and drawn.kv_groups.shape == (4, 2)


def test_random_channels_stand_beside_layers_that_are_measured(ranks, tmp_path, paths, measured):
    settings = {"student.hidden_size": 8, "student.num_hidden_layers": 2, "prune.importance": Importance.random}
    assert ranks(1, RUN, directory=str(tmp_path), settings=settings, **paths)[0]["scores"] == "measured"
    kept = json.loads((tmp_path / "prune/kept.json").read_text())
    assert kept["hidden"] == sorted(random_scores(SHAPE, 1234).hidden.topk(8).indices.tolist())
    assert kept["layers"] == sorted((load_file(measured)["block_influence"].topk(2).indices + 1).tolist())


def test_only_what_is_measured_asks_for_a_calibration_split(paths, measured):
    def needed(layers: int | None = None, **settings) -> bool:
        config = configuration(paths, **settings)
        config.student.num_hidden_layers = layers
        return ("prune", "calibration") in data.needed_splits(config, ["prune"], SHAPE)

    random = {"importance": Importance.random}
    assert (
        needed()
        and needed(**random, layers=2)
        and needed(scores=str(measured), depth_method=DepthMethod.loss, layers=2)
    )
    assert not needed(**random) and not needed(scores=str(measured), layers=2)
    assert not needed(**random, depth_method=DepthMethod.random, layers=2)


# What cannot be scored


@pytest.mark.parametrize("importance", [Importance.activation, Importance.taylor])
def test_activations_that_are_not_finite_leave_nothing_behind(ranks, tmp_path, paths, importance):
    weights = random_weights(SHAPE)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    teacher = write_teacher(tmp_path / "teacher", SHAPE, weights)
    settings = {"student.hidden_size": 8, "prune.importance": importance}
    arguments = {"directory": str(tmp_path / "run"), "teacher": str(teacher), "corpus": paths["corpus"]}
    for message in ranks(2, ERROR, settings=settings, **arguments):
        assert "found NaN or infinity in layer 2 (from 1)" in message
    assert list((tmp_path / "run/prune").iterdir()) == []
