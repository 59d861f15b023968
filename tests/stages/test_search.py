"""The search for a shape through the real prune stage: a known answer, the same at every layout, stopped and continued,
distilled, and with measured speeds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.choices import Aggregation, Measure
from pipelines.families import read_shape
from pipelines.grid import shape_name
from pipelines.model.slicing import sliced_shape
from tests.model.teachers import random_case, random_weights, silence, write_teacher
from tests.ranks import RankPools
from tests.stages import small_run
from tests.stages.test_prune import SHAPE, write_corpus

RUN, ERROR = "tests.stages.cases_search:run", "tests.stages.cases_search:error"
NARROW = {
    "prune.target.ratio": 0.7,
    "prune.search.hidden_size": [8, 12, 16],
    "prune.search.intermediate_size": [12, 24],
    "prune.search.num_hidden_layers": [2, 4],
    "prune.search.measured": 6,
    "prune.search.candidates": 3,
}


def searchable(corpus: Path) -> Path:
    """The corpus with its one split as every split."""
    blend = json.loads((corpus / "blend.json").read_text())
    entry = blend["splits"]["calibration"]
    blend["splits"] = dict.fromkeys(("train", "validation", "test", "calibration"), entry)
    (corpus / "blend.json").write_text(json.dumps(blend))
    return corpus


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("search")
    teacher = write_teacher(root / "teacher", SHAPE, random_weights(SHAPE))
    return {"teacher": str(teacher), "corpus": str(searchable(write_corpus(root / "corpus", SHAPE.vocab_size)))}


def written_by(teacher: Path, windows: int, length: int) -> np.ndarray:
    """Ids that the teacher draws itself, anew in each window: no other model knows better what comes."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher, torch_dtype=torch.float32)
    generator, ids = torch.Generator().manual_seed(1), [1]
    for _ in range(windows):
        for place in range(length):
            with torch.no_grad():
                logits = model(torch.tensor([ids[-1 - place :]])).logits[0, -1]
            ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
    return np.array(ids)


def content(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "prune" / "search.json").read_text())
    return found


def close(found: Any, expected: Any, path: str = "") -> None:
    """Equal within rounding, in everything."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            close(found[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=2e-5), path
    elif path.count("/") > 1 or not path.endswith(("why", "speeds")):
        assert found == expected, path


@pytest.mark.parametrize("seed", [0, 3])
def test_the_winner_is_the_shape_without_what_does_nothing(ranks: RankPools, tmp_path: Path, seed: int) -> None:
    """A teacher whose idle parts are known: no smaller shape has its loss, and no other shape of that size."""
    shape, kept = random_case(seed, tensor=2)
    shape = shape.replace(tie_word_embeddings=False)
    weights = random_weights(shape, seed)
    silence(weights, shape, kept)
    weights["lm_head.weight"] *= 4  # sure of what comes
    teacher = write_teacher(tmp_path / "teacher", shape, weights)
    corpus = write_corpus(tmp_path / "corpus", shape.vocab_size, ids=written_by(teacher, windows=12, length=16))
    searchable(corpus)
    expected = sliced_shape(shape, kept)
    neurons = expected.intermediate_size
    settings = {
        "prune.target.parameters": expected.parameters() * 1.3,
        "prune.search.smallest": 0.2,
        "prune.search.hidden_size": [expected.hidden_size - 2, expected.hidden_size, shape.hidden_size],
        "prune.search.intermediate_size": [neurons - 1, neurons, shape.intermediate_size],
        "prune.search.measured": 20,
        "parallel.tensor": 1,
    }
    arguments = {"directory": str(tmp_path / "run"), "teacher": str(teacher), "corpus": str(corpus)}
    figures = ranks(1, RUN, settings=settings, **arguments)[0]["figures"]
    assert figures["search"]["winner"] == shape_name(expected)
    stage = tmp_path / "run" / "prune"
    found = json.loads((stage / "kept.json").read_text())
    assert (found["hidden"], found["layers"]) == (kept.hidden, kept.layers)
    assert read_shape(stage / "hf") == expected
    entry = figures["search"]["candidate"]
    assert entry["measured"] == pytest.approx(content(tmp_path / "run")["teacher"]["loss"], abs=1e-5)


def test_every_layout_finds_the_same(ranks: RankPools, tmp_path: Path, paths: dict[str, str]) -> None:
    found = {}
    for name, world, layout in (
        ("tp1", 1, {"parallel.tensor": 1}),
        ("tp2", 2, {"parallel.tensor": 2, "parallel.sequence_parallel": True}),
        ("dp2", 2, {"parallel.tensor": 1, "prune.micro_batch_size": 5}),
        ("pp2", 2, {"parallel.tensor": 1, "parallel.pipeline": 2}),
    ):
        settings = {**NARROW, "student.num_key_value_heads": 2, "prune.search.num_attention_heads": [4, 8], **layout}
        ranks(world, RUN, directory=str(tmp_path / name), settings=settings, **paths)
        found[name] = content(tmp_path / name)
        for machine in ("source", "speeds"):
            found[name].pop(machine)
        for entry in found[name]["candidates"].values():
            entry.pop("bytes_per_gpu"), entry.pop("tokens_per_second")
    assert len(found["tp1"]["candidates"]) == 6
    for name in ("tp2", "dp2", "pp2"):
        found[name]["why"] = found["tp1"]["why"]
        close(found[name], found["tp1"])


def test_a_stopped_search_goes_on_candidate_by_candidate(
    ranks: RankPools, tmp_path: Path, paths: dict[str, str]
) -> None:
    settings = {**NARROW, "parallel.tensor": 2}
    whole = ranks(2, RUN, directory=str(tmp_path / "whole"), settings=settings, **paths)[0]["counts"]
    done, found = dict.fromkeys(whole, 0), {"stopped": True}
    attempts = 0
    while "stopped" in found:
        arguments = {"directory": str(tmp_path / "cut"), "settings": settings, **paths}
        found, attempts = ranks(2, RUN, stop_after=5, **arguments)[0], attempts + 1
        done = {name: done[name] + count for name, count in found["counts"].items()}
    assert attempts > 3
    assert (done["losses"], done["slices"]) == (whole["losses"], whole["slices"])
    assert content(tmp_path / "cut") == content(tmp_path / "whole") | {"source": content(tmp_path / "cut")["source"]}
    weights = [tmp_path / name / "prune" / "hf" / "model.safetensors" for name in ("cut", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    again = ranks(2, RUN, **arguments)[0]
    assert again["counts"]["losses"] == 0
    other = {**settings, "prune.sequence_aggregation": Aggregation.l2}
    again = ranks(2, RUN, **{**arguments, "settings": other})[0]
    assert again["counts"]["losses"] == whole["losses"]  # of other scores: anew


def test_a_search_within_other_limits_measures_what_is_new_alone(
    ranks: RankPools, tmp_path: Path, paths: dict[str, str]
) -> None:
    """And finds what a search of its own finds, at another layout too."""
    few = {"prune.search.measured": 3, "prune.search.candidates": 1}
    first, second = {**NARROW, **few, "parallel.tensor": 2}, {**NARROW, "prune.target.ratio": 0.5, "parallel.tensor": 1}
    taken = {"directory": str(tmp_path / "taken"), **paths}
    ranks(2, RUN, settings=first, **taken)
    before = content(tmp_path / "taken")
    again = ranks(1, RUN, settings=second, **taken)[0]
    alone = ranks(1, RUN, directory=str(tmp_path / "alone"), settings=second, **paths)[0]
    found, expected = content(tmp_path / "taken"), content(tmp_path / "alone")
    news = [set(expected[key]) - set(before[key]) for key in ("candidates", "sensitivities")]
    assert 0 < again["counts"]["losses"] < alone["counts"]["losses"] and news[0]
    assert set(found["candidates"]) == set(before["candidates"]) | set(expected["candidates"])
    found["candidates"] = {name: found["candidates"][name] for name in expected["candidates"]}
    found["sensitivities"] = {
        axis: {size: found["sensitivities"][axis][size] for size in sizes}
        for axis, sizes in expected["sensitivities"].items()
    }
    for content_ in (found, expected):
        content_.pop("why")
    close(found, expected)
    assert read_shape(tmp_path / "taken" / "prune" / "hf") == read_shape(tmp_path / "alone" / "prune" / "hf")


def test_kept_candidates_stay_beside_the_winner(ranks: RankPools, tmp_path: Path, paths: dict[str, str]) -> None:
    settings = {**NARROW, "prune.search.keep_candidates": True, "parallel.tensor": 1}
    found = ranks(1, RUN, directory=str(tmp_path), settings=settings, **paths)[0]
    stage = tmp_path / "prune"
    names = {path.parent.name for path in stage.glob("candidates/*/hf")}
    assert len(names) == found["counts"]["slices"] == 3 and found["figures"]["search"]["winner"] in names
    for name in names:
        assert shape_name(read_shape(stage / "candidates" / name / "hf")) == name
    winner = stage / "candidates" / found["figures"]["search"]["winner"] / "hf" / "model.safetensors"
    assert winner.read_bytes() == (stage / "hf" / "model.safetensors").read_bytes()
    (winner.parent.parent / "checkpoints" / "step_1").mkdir(parents=True)
    other = {**settings, "prune.sequence_aggregation": Aggregation.l2}
    ranks(1, RUN, directory=str(tmp_path), settings=other, **paths)
    assert len(list(stage.glob("candidates.2*/*/checkpoints/step_1"))) == 1  # of another source: moved aside
    assert not list(stage.glob("candidates/*/checkpoints"))


def test_measured_speeds_bound_the_search(ranks: RankPools, tmp_path: Path, paths: dict[str, str]) -> None:
    settings = {**NARROW, "prune.target.seconds": 60.0, "prune.search.speed": "measured", "parallel.tensor": 2}
    settings |= {"student.num_attention_heads": 4, "student.num_key_value_heads": 2}
    figures = ranks(2, RUN, directory=str(tmp_path / "one"), settings=settings, **paths)[0]["figures"]["search"]
    table = tmp_path / "one" / "prune" / "speed.json"
    held = json.loads(table.read_text())
    assert held["layout"] == {"tensor": 2, "pipeline": 1, "device": "cpu"} and held["sequence_length"] == 16
    assert len(held["rows"]) == len({tuple(list(row.values())[:4]) for row in held["rows"]}) > 4
    assert all(row["layer_seconds"] >= 0 and row["outer_seconds"] >= 0 for row in held["rows"])  # of a busy machine 0
    assert figures["candidate"]["tokens_per_second"] > 0
    again = {**settings, "prune.search.speed": str(table)}
    other = ranks(2, RUN, directory=str(tmp_path / "two"), settings=again, **paths)[0]["figures"]["search"]
    assert other["candidate"]["tokens_per_second"] == figures["candidate"]["tokens_per_second"]
    assert not (tmp_path / "two" / "prune" / "speed.json").exists()
    message = ranks(1, ERROR, directory=str(tmp_path / "three"), settings={**again, "parallel.tensor": 1}, **paths)[0]
    assert "expected layout {'tensor': 1" in message
    slow = {**settings, "prune.target.seconds": 1e-9}
    message = ranks(2, ERROR, directory=str(tmp_path / "four"), settings=slow, **paths)[0]
    assert "prune.target.seconds: expected at least the" in message and "of the fastest candidate" in message


def test_a_task_ranks_the_followed(ranks: RankPools, tmp_path: Path) -> None:
    root = small_run.write_small_run(tmp_path / "runs")
    words = small_run.WORDS
    questions = [
        {"query": f"{words[n]} {words[n + 1]}", "choices": [words[n + 2], words[n + 4], words[n + 5]], "gold": n % 3}
        for n in range(8)
    ]
    task = tmp_path / "task.jsonl"
    task.write_text("".join(json.dumps(question) + "\n" for question in questions))
    settings = {
        "prune.target.ratio": 0.8,
        "prune.search.hidden_size": [16, 24, 32],
        "prune.search.num_hidden_layers": [1, 2],
        "student.num_attention_heads": 4,
        "student.num_key_value_heads": 2,
        "prune.search.measured": 6,
        "prune.search.by": Measure.task,
        "prune.task": str(task),
        "parallel.tensor": 2,
    }
    arguments = {"corpus": str(root / "small" / "corpus"), "teacher": str(root / "small" / "teacher" / "hf")}
    figures = ranks(2, RUN, directory=str(tmp_path / "run"), settings=settings, **arguments)[0]["figures"]["search"]
    followed = {n: c for n, c in content(tmp_path / "run")["candidates"].items() if "task" in c}
    best = max(entry["task"] for entry in followed.values())
    smallest = min((e["parameters"], name) for name, e in followed.items() if e["task"] == best)
    assert len(followed) == 4 and figures["winner"] == smallest[1] and "task score" in figures["why"]


@pytest.mark.slow
def test_candidates_are_distilled_and_a_half_trained_one_goes_on(ranks: RankPools, tmp_path: Path) -> None:
    root = small_run.write_small_run(tmp_path / "runs")
    corpus, teacher = root / "small" / "corpus", root / "small" / "teacher" / "hf"
    settings = {
        "prune.target.ratio": 0.8,
        "prune.search.hidden_size": [16, 32],
        "prune.search.intermediate_size": [24, 48],
        "prune.search.num_attention_heads": [4],
        "prune.search.num_key_value_heads": [2],
        "prune.search.num_hidden_layers": [1, 2],
        "prune.search.candidates": 2,
        "prune.search.measured": 4,
        "prune.search.distil_tokens": 6 * 4 * 16,
        "parallel.tensor": 2,
    }
    arguments = {"teacher": str(teacher), "corpus": str(corpus), "settings": settings}
    whole = ranks(2, RUN, directory=str(tmp_path / "whole"), **arguments)[0]
    entry = whole["figures"]["search"]["candidate"]
    assert entry["distilled"]["steps"] == 6 and entry["distilled"]["tokens"] == 6 * 4 * 16
    stage = tmp_path / "whole" / "prune"
    assert read_shape(stage / "hf").parameters() == entry["parameters"]
    assert not list(stage.glob("candidates/*/hf")) and not list(stage.glob("candidates/*/checkpoints"))
    assert len(list(stage.glob("candidates/*/metrics.jsonl"))) == 2
    layers = {c["shape"]["num_hidden_layers"] for c in content(tmp_path / "whole")["candidates"].values()}
    assert layers == {1, 2}
    cut = {"directory": str(tmp_path / "cut"), **arguments}
    assert ranks(2, RUN, stop_step=5, **cut)[0]["stopped"]
    (half,) = (tmp_path / "cut" / "prune").glob("candidates/*/checkpoints")
    again = ranks(2, RUN, **cut)[0]
    assert again["counts"]["losses"] == again["counts"]["slices"] == 0
    first = [json.loads(line) for line in (half.parent / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in first if row["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert again["continued"] in (2, 4)  # the step of a whole checkpoint; that of step 4 may have been in flight
    left, right = (content(tmp_path / name) for name in ("cut", "whole"))
    assert left["candidates"] == right["candidates"] and left["winner"] == right["winner"]
    longer = {**arguments, "settings": settings | {"prune.search.distil_tokens": 8 * 4 * 16}}
    again = ranks(2, RUN, directory=str(tmp_path / "cut"), **longer)[0]
    assert again["counts"]["losses"] == 0 and again["figures"]["search"]["candidate"]["distilled"]["steps"] == 8
