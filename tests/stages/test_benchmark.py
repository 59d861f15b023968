"""The benchmark measures what it says, for every contender that is here, and keeps its rows."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.compose import compose
from pipelines.config import UserError
from pipelines.model.head_benchmark import Measurement
from pipelines.model.measure import Unavailable
from pipelines.processes import environment_outside_ranks
from pipelines.report import benchmark as table
from pipelines.report.benchmark import HEADS
from pipelines.validation import validate
from tests.ranks import RankPools

CASES = "tests.stages.cases_benchmark"
HERE = ["stillhouse", "nemo", "modelopt", "torch"]
FIGURES = {
    *("name", "tokens", "vocabulary", "tensor_parallel", "dtype"),
    *("peak_bytes_beyond_gradients", "seconds", "relative_error"),
}


def rows(directory: Path, kind: table.Kind = table.HEADS) -> list[dict[str, Any]]:
    return json.loads((directory / kind.file).read_text())


@pytest.mark.slow
def test_every_contender_is_right_at_tp_1_and_2_and_ours_needs_a_fraction_of_the_memory(
    ranks: RankPools, tmp_path: Path
) -> None:
    sizes = {"tokens": [1024], "vocabularies": [16384], "student_hidden": 32, "teacher_hidden": 48}
    for tensor in (1, 2):
        ranks(tensor, f"{CASES}:run", directory=str(tmp_path), contenders=HERE, tensor=tensor, **sizes)
    found = rows(tmp_path)
    assert [(row["tensor_parallel"], row["name"]) for row in found] == [(tp, name) for tp in (1, 2) for name in HERE]
    for row in found:
        assert row.keys() >= FIGURES and row["seconds"] >= row["fastest_seconds"] > 0
        assert 0 < row["relative_error"] < 1e-5 and row["loss_error"] < 1e-5, row
        flops = 2 * 1024 * 16384 * (3 * 32 + 48) / row["tensor_parallel"]
        assert row["share_of_ceiling"] == pytest.approx(flops / row["seconds"] / row["matrix_ceiling"])
        assert row["matrix_ceiling"] > 1e8
    for tensor in (1, 2):
        memory = {r["name"]: r["peak_bytes_beyond_gradients"] for r in found if r["tensor_parallel"] == tensor}
        logits = 1024 * 16384 * 4 / tensor
        assert min(memory["nemo"], memory["modelopt"]) > 5 * logits, "the peers hold many copies of the logits"
        assert memory["stillhouse"] < min(logits, 0.2 * memory["nemo"])
    page = (tmp_path / table.PAGE).read_text()
    assert page.count("| stillhouse |") == 2 and (tmp_path / "memory_tp2.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2])
def test_both_whole_steps_do_the_same_work(ranks: RankPools, tmp_path: Path, tensor: int) -> None:
    sizes = {"micro_batch_sizes": [1, 2], "micro_batches": 2, "sequence_length": 32}
    arguments = {"directory": str(tmp_path), "contenders": ["stillhouse", "nemo"], "tensor": tensor, **sizes}
    ranks(tensor, f"{CASES}:run", **arguments)
    found = rows(tmp_path, table.STEPS)
    assert [(row["micro_batch_size"], row["name"]) for row in found] == [
        (size, name) for size in (1, 2) for name in ("stillhouse", "nemo")
    ]
    for ours, theirs in (found[:2], found[2:]):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4) and ours["loss"] > 0
        assert ours["tokens_per_second"] == pytest.approx(ours["tokens"] / ours["seconds"])
        assert ours["tokens"] == 2 * 32 * ours["micro_batch_size"]
    assert found[2]["peak_bytes_beyond_state"] > found[0]["peak_bytes_beyond_state"] > 0
    assert not (tmp_path / "models").exists(), "the random weights are removed again"


def test_scoring_stands_beside_forward_passes_of_the_same_tokens(ranks: RankPools, tmp_path: Path) -> None:
    sizes = {"scoring_micro_batch_sizes": [2], "scoring_batches": 2, "sequence_length": 32}
    for tensor in (1, 2):
        ranks(tensor, f"{CASES}:run", directory=str(tmp_path), contenders=["stillhouse"], tensor=tensor, **sizes)
    found = rows(tmp_path, table.SCORING)
    assert [row["name"] for row in found] == 2 * ["scoring", "forward", "forward with head"]
    for row in found:
        assert row["tokens"] == 2 * 2 * 32 and row["tokens_per_second"] == pytest.approx(128 / row["seconds"])
    assert (tmp_path / table.PAGE).read_text().count("| scoring |") == 2
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_wrong_gradient_a_wasteful_contender_and_one_that_does_not_fit_show(ranks: RankPools, tensor: int) -> None:
    found = ranks(tensor, f"{CASES}:measured")[0]
    good, twice, wasteful = (found[name] for name in ("torch", "twice", "wasteful"))
    assert isinstance(good, Measurement) and good.relative_error < 1e-5 and good.loss_error < 1e-5
    assert twice.relative_error == pytest.approx(1, rel=1e-4) and twice.loss_error == pytest.approx(1, rel=1e-4)
    waste = wasteful.peak_bytes_beyond_gradients - good.peak_bytes_beyond_gradients
    # The profiler orders what happens in one moment as it likes: a logits tensor may count a little too long.
    assert 9_000_000 < waste < 10_100_000
    assert isinstance(found["too_large"], Unavailable)


def test_peak_memory_is_what_is_held_at_a_time(ranks: RankPools) -> None:
    assert ranks(1, f"{CASES}:peaks") == [[1000, 1000, 2000, 0]]


def test_the_cpu_runtime_steps_aside_and_comes_back(ranks: RankPools) -> None:
    assert ranks(1, f"{CASES}:suspended") == [(False, True, True)]


@pytest.mark.slow
def test_the_command_adds_rows_tells_who_is_not_here_and_writes_the_page_where_asked(
    ranks: RankPools, tmp_path: Path
) -> None:
    directory = tmp_path / "runs" / "benchmark"
    directory.mkdir(parents=True)
    contenders = ["stillhouse", "torch", "liger"]
    sizes = {"tokens": [8, 16], "vocabularies": [64]}
    ranks(1, f"{CASES}:run", directory=str(directory), contenders=contenders, tensor=1, **sizes)
    command = [sys.executable, "-m", "pipelines", "stage=benchmark", f"run.directory={tmp_path / 'runs'}"]
    command += ["run.name=any", "parallel=tp1", f"benchmark.docs={tmp_path / 'docs'}"]
    command += ["benchmark.tokens=[16,24]", "benchmark.vocabularies=[64]", "benchmark.micro_batch_sizes=[]"]
    command += ["benchmark.rounds=1", f"benchmark.contenders=[{','.join(contenders)}]"]
    environment = environment_outside_ranks()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "not run: liger: ModuleNotFoundError" in done.stdout
    found = rows(directory)
    assert sorted((row["tokens"], row["name"]) for row in found) == [
        (tokens, name) for tokens in (8, 16, 24) for name in ("liger", "stillhouse", "torch")
    ], "a case that is measured again takes the place of the row before"
    absent = next(row for row in found if row["name"] == "liger")
    assert absent["seconds"] is None and "liger_kernel" in absent["reason"] and absent.keys() >= FIGURES
    page = (tmp_path / "docs" / table.PAGE).read_text()
    assert page == (directory / table.PAGE).read_text() and "| 64 | 24 | 768 | 1,024 | stillhouse |" in page
    assert (tmp_path / "docs" / "seconds_tp1.png").stat().st_size > 1000


def test_ratios_are_of_nemos_row() -> None:
    work = {"tokens": 8, "tensor_parallel": 1}
    ours = {
        "name": "stillhouse",
        HEADS.memory: 1e6,
        "seconds": 0.5,
        "share_of_ceiling": 0.4,
        "relative_error": 1e-6,
        **work,
    }
    nemo = {"name": "nemo", HEADS.memory: 4e6, "seconds": 2.0, "relative_error": 1e-6, **work}
    shown = ["stillhouse", "1.0 MB", "0.250", "0.5000", "0.250", "40%", "1.0e-06"]
    assert table.cells(ours, [ours, nemo], HEADS) == shown
    assert table.cells(ours, [ours], HEADS)[2] == ""
    assert table.cells(ours, [ours, nemo | {"tensor_parallel": 2}], HEADS)[2] == "", "other work is no measure"
    gone = {"name": "nemo", HEADS.memory: None, "seconds": None, "reason": "none here", **work}
    assert table.cells(ours, [ours, gone], HEADS)[2] == ""
    assert table.cells(gone, [ours, gone], HEADS)[1] == "not run"
    assert table.reasons([ours, gone, gone]) == ["nemo: none here"]


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("parallel=pp2", "parallel.pipeline: expected 1 in stage benchmark"),
        ("benchmark.vocabularies=[8001]", "multiples of parallel.tensor=2"),
        ("benchmark.vocabularies=[]", "some beside benchmark.tokens"),
        ("benchmark.tokens=[0]", "benchmark.tokens: expected 1 or more"),
        ("benchmark.rounds=0", "benchmark.rounds: expected 1 or more"),
        ("benchmark.warmup=-1", "benchmark.warmup: expected 0 or more"),
        ("benchmark.contenders=[]", "benchmark.contenders: expected some"),
        ("benchmark.sequence_length=4096", "benchmark.sequence_length: expected at most max_position_embeddings"),
        ("student.intermediate_size=255", "255 ffn neurons"),
    ],
)
def test_refuses(setting: str, told: str) -> None:
    with pytest.raises(UserError) as refusal:
        validate(compose(["stage=benchmark", "parallel=tp2", setting]), ["benchmark"])
    assert told in str(refusal.value)


def test_needs_no_layout_of_the_models_where_no_step_is_asked_for() -> None:
    nothing = [f"benchmark.{name}=[]" for name in ("micro_batch_sizes", "scoring_micro_batch_sizes")]
    validate(compose(["stage=benchmark", "parallel=tp4", *nothing]), ["benchmark"])
    for left in nothing:
        with pytest.raises(UserError, match="KV groups"):
            validate(compose(["stage=benchmark", "parallel=tp4", left]), ["benchmark"])
    with pytest.raises(UserError, match="KV groups"):
        validate(compose(["stage=benchmark", "parallel=tp4"]), ["benchmark"])


def test_names_no_other_contender() -> None:
    with pytest.raises(UserError, match="stillhouse"):
        compose(["benchmark.contenders=[apex]"])
