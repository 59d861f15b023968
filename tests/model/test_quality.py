"""Quality of sharded models against transformers and plain float64 arithmetic on the same windows."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipelines.families import ModelShape
from tests.model import cases_quality
from tests.model.teachers import random_weights, write_teacher
from tests.ranks import RankPools

VOCABULARY = 51  # odd: padded at TP 2, and the second shard ends in padding
TEACHER = ModelShape(VOCABULARY, 32, 48, 4, 4, 2, 8)
STUDENT = TEACHER.replace(hidden_size=16, intermediate_size=24, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("quality")
    shapes = {"student": STUDENT, "teacher": TEACHER}
    for seed, (name, shape) in enumerate(shapes.items()):
        write_teacher(root / name, shape, random_weights(shape, seed))
    return {name: str(root / name) for name in shapes}


def plain_figures(directories: dict[str, str], count: int = 5, length: int = 12) -> dict[str, dict[str, float]]:
    """loss, kl and agreement over the masked tokens of all windows, from transformers' logits, in float64."""
    windows, mask = cases_quality.rows(VOCABULARY, count, length)
    kept = mask.bool()
    logs, figures = {}, {}
    for name in ("teacher", "student"):
        model = AutoModelForCausalLM.from_pretrained(Path(directories[name]), dtype=torch.float32).eval()
        with torch.no_grad():
            logs[name] = model(windows[:, :-1]).logits.double().log_softmax(-1)[kept]
        labels = windows[:, 1:][kept]
        p = logs["teacher"]
        figures[name] = {
            "loss": -logs[name].gather(1, labels[:, None]).mean().item(),
            "kl": (p.exp() * (p - logs[name])).sum(-1).mean().item(),
            "agreement": (p.argmax(-1) == logs[name].argmax(-1)).double().mean().item(),
            "overlap": torch.minimum(p.exp(), logs[name].exp()).sum(-1).mean().item(),
            "calibration_error": plain_calibration_error(logs[name].exp(), labels),
        }
    return figures


def plain_calibration_error(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """Fifteen bins of confidence, one after the other."""
    confidence, greatest = probabilities.max(-1)
    bins = (confidence * 15).ceil()
    gaps = [((greatest == labels).double() - confidence)[bins == number].sum().abs().item() for number in range(1, 16)]
    return sum(gaps) / len(labels)


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, {"tensor": 1}),
        (2, {"tensor": 2}),
        (2, {"tensor": 2, "sequence_parallel": True}),
        (2, {"tensor": 1}),  # two data-parallel ranks, three windows and two: the last batches differ
        (2, {"tensor": 1, "pipeline": 2}),
    ],
)
def test_equals_transformers_in_float64(
    ranks: RankPools, directories: dict[str, str], world: int, layout: dict[str, int]
) -> None:
    expected = plain_figures(directories)
    assert expected["student"]["kl"] > 0.05 and 0 < expected["student"]["agreement"] < 1
    results = ranks(world, "tests.model.cases_quality:evaluate", directories=directories, **layout)
    _, mask = cases_quality.rows(VOCABULARY, 5, 12)
    for found in results:
        for name, figures in expected.items():
            assert found[name]["tokens"] == int(mask.sum())
            for figure, value in figures.items():
                assert found[name][figure] == pytest.approx(value, rel=1e-5, abs=1e-7), (name, figure)
        assert found["teacher"]["overlap"] == pytest.approx(1) and found["teacher"]["kl"] == 0
        bands = found["student"]["kl_by_entropy"]
        assert min(bands.values()) <= found["student"]["kl"] <= max(bands.values())
        assert set(bands) == set(found["teacher"]["kl_by_entropy"])


def test_a_rank_without_a_batch_takes_part(ranks: RankPools, directories: dict[str, str]) -> None:
    expected = plain_figures(directories, count=1)["student"]
    results = ranks(2, "tests.model.cases_quality:evaluate", directories=directories, tensor=1, count=1)
    assert results[1]["seen"] == 0
    assert all(found["student"]["kl"] == pytest.approx(expected["kl"], rel=1e-5) for found in results)


def test_without_a_teacher_there_is_a_loss_alone(ranks: RankPools, directories: dict[str, str]) -> None:
    alone = {"student": directories["student"]}
    (found,) = ranks(1, "tests.model.cases_quality:evaluate", directories=alone)
    assert found["student"]["loss"] == pytest.approx(plain_figures(directories)["student"]["loss"], rel=1e-5)
    assert all(found["student"][name] is None for name in ("kl", "agreement", "overlap", "kl_by_entropy"))


def test_not_a_number_names_the_model(ranks: RankPools, directories: dict[str, str]) -> None:
    with pytest.raises(RuntimeError, match="UserError: student: expected a finite loss, found nan"):
        ranks(1, "tests.model.cases_quality:evaluate", directories=directories, poison="student")


@pytest.mark.parametrize(("pipeline", "tokens"), [(1, 24 * 2), (2, 24 * 8)])
def test_speed_counts_the_tokens_of_all_ranks(
    ranks: RankPools, directories: dict[str, str], pipeline: int, tokens: int
) -> None:
    arguments = {"directory": directories["teacher"], "tensor": 1, "pipeline": pipeline}
    real = ranks(2, "tests.model.cases_quality:speed", **arguments)
    assert real[0] == real[1] and real[0]["teacher"] > 0
    known = ranks(2, "tests.model.cases_quality:speed", seconds_per_pass=0.5, **arguments)
    assert known[0]["teacher"] == pytest.approx(tokens / 0.5)
