"""The evaluate stage against transformers, plain float64 arithmetic and decoded text, at several layouts."""

import functools
import itertools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.ranks import RankPools
from tests.stages import small_run

CASE = "tests.stages.cases_evaluate:run"
PLACES = {"teacher": "teacher/hf", "pruned": "prune/hf", "student": "distil/hf"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_small_run(tmp_path_factory.mktemp("evaluate") / "runs")


def pieces(stream: np.ndarray, length: int, end: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Inputs and labels that a model sees at a time: windows, or with `end` the documents in each."""
    for start in range(0, len(stream) - 1, length):
        labels = stream[start + 1 : start + length + 1]
        inputs = stream[start : start + len(labels)]
        places = [0, *(np.flatnonzero(inputs == end) + 1), len(inputs)]
        for begin, stop in itertools.pairwise(places):
            if stop > begin:
                yield inputs[begin:stop], labels[begin:stop]


@functools.cache
def plain_results(root: Path, length: int = 16, end: int | None = None) -> dict[str, dict[str, float]]:
    """Every figure from transformers' logits in float64, windows cut by hand, bytes from decoded text."""
    stream = small_run.ids_of_test_split(root)
    cut = list(pieces(stream, length, end))
    counted, labels = (np.concatenate(part) for part in ([i != end for i, _ in cut], [label for _, label in cut]))
    labels = torch.tensor(labels[counted])
    tokenizer = AutoTokenizer.from_pretrained(root / "small/corpus/tokenizer")
    # A byte-level token has a character for each byte, the end of a document none.
    text_bytes = sum(len(t) for t in tokenizer.convert_ids_to_tokens(labels) if t not in tokenizer.all_special_tokens)
    if end is None:
        text = tokenizer.decode(stream[1:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert text_bytes == len(text.encode())
    logs: dict[str, torch.Tensor] = {}
    figures = {}
    for name, place in PLACES.items():
        model = AutoModelForCausalLM.from_pretrained(root / "small" / place, dtype=torch.float32).eval()
        rows = []
        for inputs, _ in cut:
            with torch.no_grad():
                rows.append(model(torch.tensor(inputs)[None]).logits[0].double().log_softmax(-1))
        logs[name] = torch.cat(rows)[torch.tensor(counted)]
        p, q = logs["teacher"], logs[name]
        loss = -q.gather(1, labels[:, None]).mean().item()
        figures[name] = {
            "loss": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": loss * len(labels) / math.log(2) / text_bytes,
            "kl": (p.exp() * (p - q)).sum(-1).mean().item(),
            "agreement": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
    return figures


def read_results(root: Path, name: str = "small") -> dict[str, Any]:
    return json.loads((root / name / "evaluate" / "results.json").read_text())


@pytest.mark.parametrize(
    ("world", "settings"),
    [
        (1, {"parallel__tensor": 1}),
        (2, {"parallel__tensor": 2, "parallel__sequence_parallel": True}),
        (2, {"parallel__tensor": 1}),
        (2, {"parallel__tensor": 1, "parallel__pipeline": 2}),
    ],
)
def test_equals_transformers(ranks: RankPools, root: Path, world: int, settings: dict[str, Any]) -> None:
    stream = small_run.ids_of_test_split(root)
    windows = -(-(len(stream) - 1) // 16)
    assert (len(stream) - 1) % 16 and windows % 5 and windows % 10  # neither the last window nor the last round is full
    figures = ranks(world, CASE, stage="evaluate", root=str(root), **settings)
    assert "error" not in figures[0], figures[0]
    results, expected = read_results(root), plain_results(root)
    assert results["tokens"] == len(stream) - 1 and results["split"] == "test" and not results["missing"]
    assert expected["student"]["kl"] > 0.1
    for name, row in expected.items():
        for figure, value in row.items():
            assert results["models"][name][figure] == pytest.approx(value, rel=1e-5, abs=1e-7), (name, figure)
        assert results["models"][name]["tokens_per_second"] > 0


@pytest.mark.parametrize("settings", [{"parallel__tensor": 2}, {"parallel__pipeline": 2}], ids=["tp2", "pp2"])
def test_documents_apart_equal_transformers_document_by_document(
    ranks: RankPools, root: Path, settings: dict[str, Any]
) -> None:
    end = json.loads((root / "small/corpus/blend.json").read_text())["eod"]
    figures = ranks(2, CASE, stage="evaluate", root=str(root), distil__document_mask=True, **settings)
    assert "error" not in figures[0], figures[0]
    results, expected, stream = read_results(root), plain_results(root, end=end), small_run.ids_of_test_split(root)
    assert results["document_mask"] and results["tokens"] == (stream[:-1] != end).sum() < len(stream) - 1
    for name, row in expected.items():
        for figure, value in row.items():
            assert results["models"][name][figure] == pytest.approx(value, rel=1e-5, abs=1e-7), (name, figure)


def test_a_limit_takes_that_many_windows(ranks: RankPools, root: Path) -> None:
    ranks(1, CASE, stage="evaluate", root=str(root), evaluate__batches=2)
    results = read_results(root)
    assert results["windows"] == 10 and 144 < results["tokens"] <= 160


def test_without_a_student_the_others_are_evaluated(ranks: RankPools, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs/small/distil")
    ranks(1, CASE, stage="evaluate", root=str(tmp_path / "runs"))
    results = read_results(tmp_path / "runs")
    assert set(results["models"]) == {"teacher", "pruned"}
    assert "stage=distil has not finished" in results["missing"]["student"]


def test_user_mistakes_are_named(ranks: RankPools, root: Path, tmp_path: Path) -> None:
    def error(**settings: Any) -> str:
        return str(ranks(1, CASE, stage="evaluate", root=str(root), **settings)[0]["error"])

    assert "expected a split 'nowhere'" in error(evaluate__split="nowhere")
    assert "expected a teacher" in error(name="other")
    shutil.copytree(root, tmp_path / "runs")
    path = tmp_path / "runs/small/corpus/blend.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 302}))
    (found,) = ranks(1, CASE, stage="evaluate", root=str(tmp_path / "runs"))
    assert "expected a tokenizer of at most the 301 ids of the model" in found["error"]


def test_not_a_number_names_the_model(ranks: RankPools, root: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(root, tmp_path / "runs")
    (path,) = (tmp_path / "runs/small/distil/hf").glob("*.safetensors")
    weights = load_file(path)
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, path, {"format": "pt"})
    found = ranks(2, CASE, stage="evaluate", root=str(tmp_path / "runs"), parallel__tensor=2)
    assert all("UserError: student: expected a finite loss, found nan" in each["error"] for each in found)


def test_bits_per_byte_of_a_uniform_model_is_known() -> None:
    from pipelines.model.quality import Quality
    from pipelines.stages.evaluate import figures

    found = figures(Quality(tokens=10, loss=math.log(256), kl=None, agreement=None), text_bytes=20.0)
    assert found["bits_per_byte"] == pytest.approx(4.0) and found["perplexity"] == pytest.approx(256)
