"""What the models cost to use: every figure from times that are counted, in the stage and by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipelines.config import UserError
from pipelines.evaluation import efficiency
from pipelines.evaluation.efficiency import Request, Times
from pipelines.evaluation_settings import EfficiencyConfig
from tests.ranks import RankPools
from tests.stages import small_run

CASE = "tests.stages.cases_evaluate:run"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_small_run(tmp_path_factory.mktemp("efficiency") / "runs")


def prompts(batch: int, length: int) -> torch.Tensor:
    return torch.arange(batch * length).view(batch, length) % small_run.VOCABULARY


def test_figures_follow_from_the_times() -> None:
    times = [Times(0.5, (0.1, 0.1, 0.4)), Times(0.4, (0.1, 0.1, 0.1)), Times(9.0, (0.2, 0.2, 0.2))]
    found = efficiency.row("student", Request(4, 100, 4), times)
    assert found["time_to_first_token_ms"] == pytest.approx(500)
    assert found["prefill_tokens_per_second"] == pytest.approx(400 / 0.5)
    assert found["decode_tokens_per_second"] == pytest.approx(4 / 0.1)
    assert found["latency_ms"] == pytest.approx({"p50": 100, "p90": 240, "p99": 384})


def test_an_answer_is_the_greedy_continuation(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(root / "small/teacher/hf").eval()
    asked: list[torch.Tensor] = []
    forward = model.forward

    def watched(**arguments: Any) -> Any:
        asked.append(arguments["input_ids"])
        return forward(**arguments)

    monkeypatch.setattr(model, "forward", watched)
    ids = prompts(3, 12)
    times = efficiency.answer(model, ids, 6)
    assert times.first > 0 and len(times.between) == 5 and min(times.between) > 0
    assert [tuple(each.shape) for each in asked] == [(3, 12)] + 5 * [(3, 1)]
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, forward(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(torch.cat(asked, dim=1), ids)


def test_models_take_turns_and_the_first_round_does_not_count(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []
    seconds = {1: 2.0, 2: 1.0}

    def answer(model: Any, ids: torch.Tensor, new_tokens: int) -> Times:
        layers = model.config.hidden_size // 16  # the teacher's is twice the student's
        order.append(layers)
        return Times(99.0 if len(order) <= 2 else seconds[layers], (99.0 if len(order) <= 2 else layers,) * 3)

    monkeypatch.setattr(efficiency, "answer", answer)
    directories = {"teacher": root / "small/teacher/hf", "student": root / "small/distil/hf"}
    found = efficiency.compare(directories, prompts, [Request(2, 8, 4)], precision="fp32", device=CPU, rounds=3)
    assert order[:8] == [2, 1] * 4
    teacher, student = found["rows"]
    assert student["time_to_first_token_ms"] == 2000 and student["ratio"]["time_to_first_token_ms"] == 2.0
    assert student["ratio"]["decode_tokens_per_second"] == 2.0 and student["ratio"]["latency_ms"]["p99"] == 0.5
    assert teacher["ratio"]["prefill_tokens_per_second"] == 1.0


def test_memory_and_size_are_those_of_the_weights_and_more(root: Path) -> None:
    directories = {"teacher": root / "small/teacher/hf", "student": root / "small/distil/hf"}
    for precision, item in (("fp32", 4), ("bf16", 2)):
        found = efficiency.compare(
            directories, prompts, [Request(1, 8, 3), Request(16, 32, 3)], precision=precision, device=CPU, rounds=1
        )
        for name, shape in (("teacher", small_run.TEACHER), ("student", small_run.STUDENT)):
            sizes = found["models"][name]
            assert sizes["parameters"] == shape.parameters()
            assert sizes["bytes_on_disk"] == (directories[name] / "model.safetensors").stat().st_size
            cache = 2 * 16 * 34 * shape.num_key_value_heads * shape.head_dim * shape.num_hidden_layers * item
            assert shape.parameters() * item + cache < sizes["peak_bytes"] < 30 * (shape.parameters() * item + cache)
        assert found["dtype"] == precision and found["form"].startswith("transformers 4") and found["threads"] >= 1


@pytest.mark.parametrize("world", [1, 2])
def test_the_stage_measures_every_kind_of_request(ranks: RankPools, root: Path, world: int) -> None:
    settings = EfficiencyConfig(batch_sizes=[1, 3], prompt_tokens=[5, 9], new_tokens=3, rounds=2)
    settings.threads = world
    figures = ranks(world, CASE, stage="evaluate", root=str(root), evaluate__efficiency=settings)[0]
    assert "error" not in figures, figures
    results = json.loads((root / "small/evaluate/results.json").read_text())
    found = results["efficiency"]
    assert not results["missing"] and found["threads"] == world
    kinds = [(row["batch"], row["prompt_tokens"], row["model"]) for row in found["rows"]]
    models = ("teacher", "pruned", "student")
    assert kinds == [(batch, length, model) for length in (5, 9) for batch in (1, 3) for model in models]
    for row in found["rows"]:
        assert all(math.isfinite(row[name]) and row[name] > 0 for name in efficiency.FIGURES)
        assert 0 < row["latency_ms"]["p50"] <= row["latency_ms"]["p90"] <= row["latency_ms"]["p99"]


def test_what_cannot_be_measured_is_a_gap_with_its_reason(ranks: RankPools, root: Path) -> None:
    settings = EfficiencyConfig(batch_sizes=[1], prompt_tokens=[2040], new_tokens=9, rounds=1)
    figures = ranks(1, CASE, stage="evaluate", root=str(root), evaluate__efficiency=settings)[0]
    assert "error" not in figures, figures
    results = json.loads((root / "small/evaluate/results.json").read_text())
    assert (
        "efficiency" not in results and "within the 2048 positions of the teacher" in results["missing"]["efficiency"]
    )


def test_too_little_memory_is_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> Times:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(efficiency, "answer", full)
    with pytest.raises(UserError, match="teacher to fit into one device.*batch of 7.*batch_sizes"):
        efficiency.compare(
            {"teacher": root / "small/teacher/hf"}, prompts, [Request(7, 8, 4)], precision="fp32", device=CPU, rounds=1
        )
