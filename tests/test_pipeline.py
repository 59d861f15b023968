"""The whole pipeline through its real entry: from text to a report, killed and resumed, at other layouts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "experiment=quickstart",
    "data.sources=[{kind: standard_library, limit_bytes: 1500000}]",
    "model.shape.vocab_size=600",
    "model.shape.hidden_size=64",
    "model.shape.intermediate_size=128",
    "model.shape.num_hidden_layers=2",
    "model.shape.num_attention_heads=4",
    "model.shape.num_key_value_heads=2",
    "model.shape.head_dim=16",
    "student.hidden_size=48",
    "student.intermediate_size=80",
    *(
        f"{stage}.{setting}"
        for stage in ("teacher", "distil")
        for setting in (
            "sequence_length=32",
            "micro_batch_size=2",
            "global_batch_size=8",
            "warmup_steps=2",
            "validation_interval=5",
            "validation_batches=2",
            "checkpoint_interval=5",
        )
    ),
    "teacher.steps=60",
    "teacher.learning_rate=1e-2",
    "distil.steps=15",
    "distil.kd_weight=1",
    "distil.ce_weight=0",
    "prune.sequence_length=32",
    "prune.calibration_samples=32",
    "evaluate.sequence_length=32",
    "evaluate.batches=4",
    "export.nemo=true",
    "export.new_tokens=4",
]

pytestmark = pytest.mark.slow


def start(directory: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines", *SMALL, f"run.directory={directory}", *overrides],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def run(directory: Path, *overrides: str) -> str:
    process = start(directory, *overrides)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(run.directory, output) of one uninterrupted run of every stage at TP 2."""
    directory = tmp_path_factory.mktemp("runs")
    return directory, run(directory, "stage=all", "run.name=whole")


def borrow(directory: Path) -> list[str]:
    """Distil alone, from the finished run's corpus, teacher and pruned student."""
    whole = directory / "whole"
    return [
        "stage=distil",
        f"data.corpus={whole / 'corpus'}",
        "teacher.mode=take",
        f"model.path={whole / 'teacher' / 'hf'}",
        f"student.path={whole / 'prune' / 'hf'}",
    ]


def rows(directory: Path, name: str) -> list[dict[str, float]]:
    """metrics.jsonl without what a clock decides."""
    lines = (directory / name / "distil" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("time", "tokens_per_second")} for line in lines]


def losses(directory: Path, name: str) -> dict[tuple[int, str], float]:
    return {(row["step"], row["split"]): row["loss"] for row in rows(directory, name)}  # type: ignore[misc]


def descendants(pid: int) -> list[int]:
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [*descendants(int(child)), int(child)]
    return found


def kill_after_checkpoint(directory: Path, name: str, *overrides: str) -> None:
    """Start distil and end all of its processes with SIGKILL once a step behind the first checkpoint is logged."""
    process = start(directory, f"run.name={name}", *overrides)
    metrics = directory / name / "distil" / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not (metrics.exists() and '"step": 7' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    for pid in [*descendants(process.pid), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert not (directory / name / "distil" / "complete").exists()
    assert not (directory / name / "distil" / "hf").exists()


def test_text_becomes_a_student_and_a_report(finished: tuple[Path, str]) -> None:
    directory, output = finished
    results = json.loads((directory / "whole" / "report" / "results.json").read_text())["models"]
    assert set(results) == {"teacher", "pruned", "student"}
    for name, figures in results.items():
        for key in ("parameters", "loss", "perplexity", "bits_per_byte", "kl", "agreement", "tokens_per_second"):
            assert isinstance(figures[key], int | float), (name, key)
    assert results["teacher"]["loss"] < 5.5  # random: log(600) = 6.4
    assert results["student"]["kl"] < results["pruned"]["kl"]
    assert results["pruned"]["parameters"] == results["student"]["parameters"] < results["teacher"]["parameters"]
    for line in ("tokens/s", "loss = 1.0 * T^2 * KL(teacher || student, T=1.0) + 0.0 * CE", "teacher's own loss"):
        assert line in output
    assert str(directory / "whole" / "report" / "index.html") in output
    assert str(directory / "whole" / "export" / "hf") in output
    for noise in ("[NeMo", "Warning", "INFO", "LOCAL_RANK", "Trainer"):
        assert noise not in output, noise
    for stage in ("corpus", "teacher", "prune", "distil", "evaluate", "export", "report"):
        assert (directory / "whole" / stage / "complete").is_file()


def test_the_exported_nemo_checkpoint_is_a_teacher(finished: tuple[Path, str]) -> None:
    directory, _ = finished
    whole = directory / "whole"
    run(
        directory,
        "stage=teacher",
        "run.name=from_nemo",
        "teacher.mode=take",
        f"model.path={whole / 'export' / 'nemo'}",
        f"data.corpus={whole / 'corpus'}",
    )
    converted = directory / "from_nemo" / "teacher" / "hf"
    for file in ("model.safetensors", "tokenizer.json"):
        assert (converted / file).read_bytes() == (whole / "export" / "hf" / file).read_bytes()


def test_a_finished_stage_is_left_alone_and_a_changed_setting_is_named(finished: tuple[Path, str]) -> None:
    directory, _ = finished
    hf = directory / "whole" / "distil" / "hf" / "model.safetensors"
    before = hf.stat().st_mtime_ns
    run(directory, "stage=distil", "run.name=whole")
    process = start(directory, "stage=distil", "run.name=whole", "distil.temperature=2")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "distil.temperature: 1.0 -> 2.0" in output and "overwrite=true" in output
    assert hf.stat().st_mtime_ns == before


def test_a_killed_run_continues_with_the_same_numbers(finished: tuple[Path, str]) -> None:
    directory, _ = finished
    kill_after_checkpoint(directory, "killed", *borrow(directory))
    output = run(directory, "run.name=killed", *borrow(directory))
    assert "continues from" in output
    assert rows(directory, "killed") == rows(directory, "whole")
    weights = Path("distil") / "hf" / "model.safetensors"
    assert (directory / "killed" / weights).read_bytes() == (directory / "whole" / weights).read_bytes()


def test_a_damaged_checkpoint_is_left_out(finished: tuple[Path, str]) -> None:
    directory, _ = finished
    kill_after_checkpoint(directory, "damaged", "distil.checkpoint_interval=3", *borrow(directory))
    newest = sorted((directory / "damaged" / "distil" / "checkpoints").glob("step-*"))[-1]
    largest = max(newest.rglob("*.distcp"), key=lambda file: file.stat().st_size)
    os.truncate(largest, 100)
    output = run(directory, "run.name=damaged", "distil.checkpoint_interval=3", *borrow(directory))
    assert f"leaves out {newest}" in output and "step-0000003" in output
    assert losses(directory, "damaged") == losses(directory, "whole")


def test_one_process_gives_the_losses_of_two(finished: tuple[Path, str]) -> None:
    directory, _ = finished
    run(directory, "run.name=single", "parallel=tp1", *borrow(directory))
    assert losses(directory, "single") == pytest.approx(losses(directory, "whole"), rel=2e-4)


def test_a_run_continues_at_another_layout(finished: tuple[Path, str]) -> None:
    directory, _ = finished
    overrides = ["distil.distributed_optimizer=true", *borrow(directory)]
    kill_after_checkpoint(directory, "moved", "parallel=dp2", *overrides)
    assert "continues from" in run(directory, "run.name=moved", "parallel=tp2", *overrides)
    assert losses(directory, "moved") == pytest.approx(losses(directory, "whole"), rel=2e-4)
