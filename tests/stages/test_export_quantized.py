"""Quantized variants: their figures are those of transformers, and what cannot be made is a reason."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipelines.choices import Quantization
from tests.ranks import RankPools
from tests.stages import small_run

CASE = "tests.stages.cases_evaluate:run"
PLACES = {"teacher": "teacher", "student": "distil"}
METHODS = [Quantization.int8, Quantization.int4, Quantization.fp8]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_small_run(tmp_path_factory.mktemp("quantized") / "runs")


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "runs")
    return tmp_path / "runs"


def export(ranks: RankPools, root: Path, world: int, **settings: Any) -> dict[str, Any]:
    figures = ranks(world, CASE, stage="export", root=str(root), **settings)[0]
    assert "error" not in figures, figures
    return json.loads((root / "small/export/quantized.json").read_text())


def logs(directory: Path, root: Path) -> torch.Tensor:
    """(tokens, vocabulary) log-probabilities of every window of the test split, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    stream, rows = small_run.ids_of_test_split(root), []
    for start in range(0, len(stream) - 1, 16):
        with torch.no_grad():
            window = torch.tensor(stream[start : start + 16])[None][:, : len(stream) - 1 - start]
            rows.append(model(window).logits[0].double().log_softmax(-1))
    return torch.cat(rows)


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("world", [1, 2])
def test_figures_equal_those_of_transformers(ranks: RankPools, root: Path, world: int) -> None:
    found = export(ranks, root, world, export__quantize=METHODS, export__quantize_teacher=True, parallel__tensor=world)
    rows = {row["name"]: row for row in found["variants"]}
    assert list(rows) == ["int8", "int4", "fp8", "teacher-int8", "teacher-int4", "teacher-fp8"]
    labels = torch.tensor(small_run.ids_of_test_split(root)[1:])
    plain = {name: logs(root / "small" / place / "hf", root) for name, place in PLACES.items()}
    assert found["tokens"] == len(labels)
    for name in ("int8", "fp8", "teacher-int8", "teacher-fp8"):
        row, own = rows[name], logs(root / "small/export" / name, root)
        loss = -own.gather(1, labels[:, None]).mean().item()
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
        assert row["bits_per_byte"] == pytest.approx(loss * len(labels) / math.log(2) / found["bytes"], rel=1e-3)
        assert row["kl"] == pytest.approx(divergence(plain["teacher"], own), rel=1e-4, abs=1e-7)
        assert row["agreement"] == pytest.approx(
            (plain["teacher"].argmax(-1) == own.argmax(-1)).double().mean().item(), abs=2.1 / len(labels)
        )
        if row["of"] == "student":
            assert row["kl_to_student"] == pytest.approx(divergence(plain["student"], own), rel=1e-3, abs=1e-7)
            assert 0 < row["kl_to_student"] < 0.1 * row["kl"]
        else:
            assert row["kl_to_student"] is None and 0 < row["kl"] < 0.1
        assert row["directory"] == str(root / "small/export" / name) and row["library"].startswith("compressed-tensors")
        assert row["bytes"] == (root / "small/export" / name / "model.safetensors").stat().st_size
        before = found["before"][row["of"]]
        assert before["loss"] != row["loss"]
        assert row["intervals"]["loss"][0] < row["loss"] < row["intervals"]["loss"][1]
        difference = row["differences"][0]
        assert (difference["model"], difference["other"], difference["figure"]) == (name, row["of"], "loss")
        assert difference["difference"] == pytest.approx(row["loss"] - before["loss"], abs=1e-9)
    student = -plain["student"].gather(1, labels[:, None]).mean().item()
    assert found["before"]["student"]["loss"] == pytest.approx(student, rel=1e-5)
    for name in ("int4", "teacher-int4"):
        assert "multiples of 32" in rows[name]["refused"] and not (root / "small/export" / name).exists()


def test_without_a_teacher_the_student_is_still_scored(ranks: RankPools, root: Path) -> None:
    shutil.rmtree(root / "small/teacher")
    found = export(ranks, root, 1, export__quantize=[Quantization.int8], export__quantize_teacher=True)
    own, teacher = found["variants"]
    assert own["kl"] is None and own["agreement"] is None and own["kl_to_student"] > 0 and own["loss"] > 0
    assert "expected a teacher in" in teacher["refused"]


def test_weights_are_cut_into_files_of_the_size_asked_for(ranks: RankPools, root: Path) -> None:
    figures = ranks(1, CASE, stage="export", root=str(root), export__shard_bytes=20_000.0)[0]
    assert "error" not in figures, figures
    target = root / "small/export/hf"
    sizes = [file.stat().st_size for file in target.glob("*.safetensors")]
    assert len(sizes) > 1 and max(sizes) < 25_000 and not (target / "model.safetensors").exists()
    assert torch.equal(logs(target, root), logs(root / "small/distil/hf", root))
