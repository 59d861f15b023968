"""The prune stage end to end: from a teacher and a corpus on disk to a student, its scores and its kept indices."""

import json
import random

import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from pipelines.choices import Aggregation, DepthMethod, Importance
from pipelines.core.selection import Kept
from pipelines.families import ModelShape, read_shape
from pipelines.model.slicing import sliced_shape
from pipelines.prune_settings import PRUNED_SIZES, OfLayerConfig, ProtectConfig
from pipelines.text.indexed import Writer
from tests.model.teachers import random_case, random_weights, silence, write_teacher

RUN, ERROR = "tests.stages.cases_prune:run", "tests.stages.cases_prune:error"
SHAPE = ModelShape(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=4,
)


def write_corpus(directory, vocab_size: int, tokens: int = 600, used: int | None = None, ids=None):
    writer = Writer(directory / "data" / "calibration" / "text", numpy.dtype(numpy.uint16))
    if ids is None:
        ids = numpy.random.default_rng(1).integers(0, used or vocab_size, tokens)
        ids[-1] = 0  # ends the document
    writer.add(ids, numpy.array([len(ids)]))
    writer.finish()
    entry = {"prefix": "data/calibration/text", "weight": 1.0}
    blend = {"splits": {"calibration": [entry]}, "vocab_size": vocab_size, "eod": 0}
    (directory / "blend.json").write_text(json.dumps(blend))
    return directory


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("prune")
    teacher = write_teacher(root / "teacher", SHAPE, random_weights(SHAPE))
    return {"teacher": str(teacher), "corpus": str(write_corpus(root / "corpus", SHAPE.vocab_size))}


def logits(directory, tokens):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32)(tokens).logits


def target(student: ModelShape) -> dict[str, int]:
    return {f"student.{name}": getattr(student, name) for name in PRUNED_SIZES}


@pytest.mark.parametrize("seed", range(6))
def test_what_does_nothing_is_found_and_removed_at_tensor_parallel_2(ranks, tmp_path, seed):
    shape, kept = random_case(seed, tensor=2)
    weights = random_weights(shape, seed)
    silence(weights, shape, kept)
    teacher = write_teacher(tmp_path / "teacher", shape, weights)
    corpus = write_corpus(tmp_path / "corpus", shape.vocab_size)
    student = sliced_shape(shape, kept)
    settings = {**target(student), "parallel.tensor": 2, "parallel.sequence_parallel": seed % 2 == 1}
    arguments = {"directory": str(tmp_path / "run"), "teacher": str(teacher), "corpus": str(corpus)}
    figures = ranks(2, RUN, settings=settings, **arguments)[0]
    found = json.loads((tmp_path / "run" / "prune" / "kept.json").read_text())
    assert found["hidden"] == kept.hidden
    assert found["layers"] == kept.layers
    assert found["ffn"] == {str(number): indices for number, indices in kept.ffn.items()}
    assert found["heads"] == {str(number): indices for number, indices in kept.heads.items()}
    assert found["groups"] == {str(number): indices for number, indices in kept.groups.items()}
    assert (found["teacher"], found["student"]) == (shape.to_hugging_face(), student.to_hugging_face())
    assert figures["parameters_before"] == shape.parameters()
    assert figures["parameters_after"] == student.parameters()
    assert read_shape(tmp_path / "run" / "prune" / "hf") == student
    tokens = torch.randint(0, shape.vocab_size, (3, 20), generator=torch.Generator().manual_seed(seed))
    expected = logits(teacher, tokens)
    assert (logits(tmp_path / "run" / "prune" / "hf", tokens) - expected).norm() < 1e-5 * expected.norm()


def widened(shape: ModelShape, kept: Kept, draw: random.Random, protect: bool) -> tuple[Kept, ProtectConfig]:
    """`kept` with some of what does nothing: with protect any, named; else those of the lowest index, as ties go."""

    def more(size: int, left: dict[int, list[int]]) -> tuple[dict[int, list[int]], list[OfLayerConfig]]:
        extra = draw.randint(0, size - len(left[kept.layers[0]]))
        wider, named = {}, []
        for number, indices in left.items():
            silent = [index for index in range(size) if index not in indices]
            chosen = draw.sample(silent, extra) if protect else silent[:extra]
            wider[number] = sorted(indices + chosen)
            named.append(OfLayerConfig(layer=number, indices=chosen))
        return wider, named if protect else []

    per_group = shape.num_attention_heads // shape.num_key_value_heads
    in_group = len(kept.heads[kept.layers[0]]) // len(kept.groups[kept.layers[0]])
    ffn, neurons = more(shape.intermediate_size, kept.ffn)
    groups, kv_groups = more(shape.num_key_value_heads, kept.groups)
    heads = {  # a group without values ties all its heads at 0
        number: [
            head
            for group in groups[number]
            for head in (
                [head for head in kept.heads[number] if head // per_group == group]
                or range(group * per_group, group * per_group + in_group)
            )
        ]
        for number in kept.layers
    }
    protected = ProtectConfig(layers=kept.layers[:1] * protect, ffn=neurons, kv_groups=kv_groups)
    return Kept(hidden=kept.hidden, ffn=ffn, heads=heads, layers=kept.layers, groups=groups), protected


@pytest.mark.parametrize("seed", range(10, 14))
@pytest.mark.parametrize("protect", [False, True])
def test_of_what_does_nothing_the_protected_stays_else_the_lowest_index(ranks, tmp_path, seed, protect):
    shape, live = random_case(seed, tensor=2)
    weights = random_weights(shape, seed)
    silence(weights, shape, live)
    teacher = write_teacher(tmp_path / "teacher", shape, weights)
    corpus = write_corpus(tmp_path / "corpus", shape.vocab_size)
    kept, protected = widened(shape, live, random.Random(seed), protect)
    settings = {**target(sliced_shape(shape, kept)), "parallel.tensor": 2, "prune.protect": protected}
    arguments = {"directory": str(tmp_path / "run"), "teacher": str(teacher), "corpus": str(corpus)}
    ranks(2, RUN, settings=settings, **arguments)
    found = json.loads((tmp_path / "run" / "prune" / "kept.json").read_text())
    assert found["ffn"] == {str(number): indices for number, indices in kept.ffn.items()}
    assert found["groups"] == {str(number): indices for number, indices in kept.groups.items()}
    assert found["heads"] == {str(number): indices for number, indices in kept.heads.items()}
    tokens = torch.randint(0, shape.vocab_size, (3, 20), generator=torch.Generator().manual_seed(seed))
    expected = logits(teacher, tokens)
    assert (logits(tmp_path / "run" / "prune" / "hf", tokens) - expected).norm() < 1e-5 * expected.norm()


def test_the_artifact_does_not_depend_on_the_layout(ranks, tmp_path, paths):
    settings = {"student.hidden_size": 8, "student.intermediate_size": 14, "student.num_attention_heads": 4}
    found = {}
    for name, world, layout in (
        ("tp1", 1, {"parallel.tensor": 1}),
        ("tp2", 2, {"parallel.tensor": 2}),
        ("dp2", 2, {"parallel.tensor": 1, "prune.micro_batch_size": 5}),
        ("pp2", 2, {"parallel.tensor": 1, "parallel.pipeline": 2}),
    ):
        figures = ranks(world, RUN, directory=str(tmp_path / name), settings={**settings, **layout}, **paths)[0]
        assert (figures["calibration_samples"], figures["calibration_tokens"]) == (12, 12 * 16)
        stage = tmp_path / name / "prune"
        found[name] = load_file(stage / "scores.safetensors"), (stage / "kept.json").read_text()
        with safe_open(stage / "scores.safetensors", framework="np") as file:
            provenance = json.loads(file.metadata()["provenance"])
        assert (provenance["teacher"], provenance["samples"]) == (paths["teacher"], 12)
        assert provenance["importance"] == "activation" and provenance["sample_aggregation"] == "l2"
        assert figures["scores"] == "measured"
    arrays, kept = found["tp1"]
    layers = range(1, 5)
    assert set(arrays) == {"hidden", "block_influence"} | {
        f"{a}.{n}" for a in ("ffn", "heads", "kv_groups") for n in layers
    }
    for name in ("tp2", "dp2", "pp2"):
        assert found[name][1] == kept
        for array, expected in arrays.items():
            numpy.testing.assert_allclose(found[name][0][array], expected, rtol=2e-5, err_msg=f"{name} {array}")


def test_documents_apart_are_scored_alike_at_every_layout(ranks, tmp_path, paths):
    """Id 0 ends a document; what follows it does not count."""
    settings = {"student.hidden_size": 8, "prune.document_mask": True, "prune.micro_batch_size": 1}
    found = {}
    for name, layout in (
        ("dp2", {"parallel.tensor": 1}),
        ("tp2_sp", {"parallel.tensor": 2, "parallel.sequence_parallel": True}),
        ("pp2", {"parallel.tensor": 1, "parallel.pipeline": 2}),
    ):
        figures = ranks(2, RUN, directory=str(tmp_path / name), settings={**settings, **layout}, **paths)[0]
        assert figures["calibration_samples"] == 12 and figures["calibration_tokens"] < 12 * 16
        found[name] = load_file(tmp_path / name / "prune" / "scores.safetensors")
    for name in ("tp2_sp", "pp2"):
        for array, expected in found["dp2"].items():
            numpy.testing.assert_allclose(found[name][array], expected, rtol=2e-5, err_msg=f"{name} {array}")


def test_given_layers_are_dropped_without_scores_or_calibration_data(ranks, tmp_path, paths):
    settings = {"student.drop_layers": [2, 3], "prune.depth_method": DepthMethod.layers, "parallel.tensor": 2}
    arguments = {"teacher": paths["teacher"], "corpus": str(tmp_path / "none"), "directory": str(tmp_path / "run")}
    figures = ranks(2, RUN, settings=settings, **arguments)[0]
    assert (figures["dropped_layers"], figures["calibration_samples"]) == ([2, 3], 0)
    stage = tmp_path / "run" / "prune"
    assert json.loads((stage / "kept.json").read_text())["layers"] == [1, 4]
    assert load_file(stage / "scores.safetensors") == {}
    assert read_shape(stage / "hf") == SHAPE.replace(num_hidden_layers=2)


def test_scores_are_taken_again_for_another_target_and_not_of_another_teacher(ranks, tmp_path, paths):
    stage = tmp_path / "prune"
    stage.mkdir()
    arguments = {"directory": str(tmp_path), **paths}
    settings = {"student.hidden_size": 8}
    assert ranks(1, RUN, settings=settings, **arguments)[0]["scoring_seconds"] > 0
    first = (stage / "kept.json").read_text()
    (stage / "kept.json").unlink()
    (stage / "hf" / "config.json").unlink()
    again = ranks(1, RUN, settings=settings, **arguments)[0]
    assert (again["scoring_seconds"], again["scores"]) == (0, str(stage / "scores.safetensors"))
    assert (stage / "kept.json").read_text() == first
    other = ranks(2, RUN, settings={"student.intermediate_size": 10, "student.num_hidden_layers": 3}, **arguments)[0]
    assert (other["scoring_seconds"], other["calibration_samples"]) == (0, 12)
    assert read_shape(stage / "hf") == SHAPE.replace(intermediate_size=10, num_hidden_layers=3)
    for changed in ({"prune.calibration_samples": 11}, {"prune.sample_aggregation": Aggregation.max}):
        assert ranks(1, RUN, settings=settings | changed, **arguments)[0]["scores"] == "measured"
    teacher = write_teacher(tmp_path / "other", SHAPE, random_weights(SHAPE, 2))
    assert ranks(1, RUN, settings=settings, **{**arguments, "teacher": str(teacher)})[0]["scores"] == "measured"


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"student.hidden_size": 32}, ["student.hidden_size", "at most the teacher's 16", "found 32"]),
        ({"student.intermediate_size": 25}, ["student.intermediate_size", "at most the teacher's 24", "found 25"]),
        ({"student.num_attention_heads": 5}, ["multiple of the teacher's 2 KV groups", "found 5", "4 or 6"]),
        ({"student.num_hidden_layers": 3, "student.drop_layers": [1, 2]}, ["disagree", "found num_hidden_layers=3"]),
        (
            {"student.num_hidden_layers": 3, "prune.depth_method": DepthMethod.layers},
            ["expected student.drop_layers with 1 layers", "block_influence"],
        ),
        (
            {"student.hidden_size": 4, "prune.protect": ProtectConfig(hidden=[0, 3, 5, 7, 9])},
            ["at most the 4 of student.hidden_size", "found 5 that stay"],
        ),
        (
            {"student.hidden_size": 8, "prune.calibration_samples": 39},
            ["expected 39 sequences of 16 tokens", "found 38"],
        ),
    ],
)
def test_impossible_settings_are_one_message(ranks, tmp_path, paths, settings, parts):
    message = ranks(1, ERROR, directory=str(tmp_path), settings=settings, **paths)[0]
    for part in parts:
        assert part in message
    assert list((tmp_path / "prune").iterdir()) == []


def test_a_corpus_of_another_vocabulary_is_refused(ranks, tmp_path, paths):
    settings = {"student.hidden_size": 8}
    larger = write_corpus(tmp_path / "larger", SHAPE.vocab_size + 1, used=10)
    arguments = {"directory": str(tmp_path / "run"), "settings": settings, "teacher": paths["teacher"]}
    message = ranks(1, ERROR, corpus=str(larger), **arguments)[0]
    assert f"at most the 50 ids of the model {paths['teacher']}, found 51" in message
    teacher = write_teacher(tmp_path / "teacher", SHAPE, random_weights(SHAPE))
    other = write_corpus(tmp_path / "other", SHAPE.vocab_size)
    (other / "tokenizer").mkdir()
    for directory, token in ((teacher, "a"), (other / "tokenizer", "b")):
        (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {token: 0}}}))
    message = ranks(1, ERROR, corpus=str(other), **{**arguments, "teacher": str(teacher)})[0]
    assert f"data.tokenizer={teacher}" in message


def test_an_empty_calibration_split_is_refused(ranks, tmp_path, paths):
    empty = write_corpus(tmp_path / "empty", SHAPE.vocab_size, tokens=5)
    arguments = {"directory": str(tmp_path / "run"), "settings": {"student.hidden_size": 8}}
    message = ranks(1, ERROR, corpus=str(empty), teacher=paths["teacher"], **arguments)[0]
    assert f"in the calibration split of {empty}, found 1" in message
    message = ranks(1, ERROR, corpus=str(tmp_path / "none"), teacher=paths["teacher"], **arguments)[0]
    assert "Run stage=corpus first" in message
    blend = {"splits": {"train": [], "calibration": []}, "vocab_size": SHAPE.vocab_size, "eod": 0}
    (empty / "blend.json").write_text(json.dumps(blend))
    message = ranks(1, ERROR, corpus=str(empty), teacher=paths["teacher"], **arguments)[0]
    assert "data.calibration_fraction above 0" in message


def test_a_disk_failure_on_the_first_rank_ends_every_rank_with_its_message(ranks, tmp_path, paths):
    spoilt = write_teacher(tmp_path / "teacher", SHAPE, random_weights(SHAPE.replace(num_hidden_layers=3)))
    settings = {"student.drop_layers": [1], "parallel.tensor": 2}
    arguments = {"directory": str(tmp_path / "run"), "settings": settings, "corpus": paths["corpus"]}
    messages = ranks(2, ERROR, teacher=str(spoilt), **arguments)
    assert "missing 9 of" in messages[0]
    assert messages[0] == messages[1]
    assert not (tmp_path / "run" / "prune" / "hf").exists()


def test_a_random_start_has_the_shape_and_nothing_of_the_teacher(ranks, tmp_path, paths):
    given = {"student.hidden_size": 8, "student.num_hidden_layers": 2, "prune.random_weights": True}
    given |= {"prune.importance": Importance.random, "prune.depth_method": DepthMethod.random}
    weights = {}
    for name, more in (("first", {}), ("again", {}), ("other", {"prune.random_seed": 7})):
        ranks(1, RUN, directory=str(tmp_path / name), settings=given | more, **paths)
        (file,) = (tmp_path / name / "prune" / "hf").glob("*.safetensors")
        weights[name] = load_file(file)
    assert read_shape(tmp_path / "first" / "prune" / "hf") == SHAPE.replace(hidden_size=8, num_hidden_layers=2)
    norms, key = "model.norm.weight", "model.embed_tokens.weight"
    assert (weights["first"][norms] == 1).all() and weights["first"][key].std() < 0.05
    assert (weights["first"][key] == weights["again"][key]).all()
    assert not (weights["first"][key] == weights["other"][key]).any()
