"""What was planned beside what was measured."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines import plan_check, planning
from pipelines.compose import compose
from pipelines.config import Layout
from pipelines.families import ModelShape
from pipelines.report import training
from pipelines.report.record import read_run
from tests.stages.sample_run import write_sample_run
from tests.stages.test_report import make

TEACHER = ModelShape(100, 32, 48, 4, 4, 2, 12)
STUDENT = TEACHER.replace(hidden_size=24)
CPU = Layout(2, 2, 1, 1, 1, "cpu", False)


def left_behind(directory: Path) -> Path:
    """What a training leaves in its directory."""
    rows: list[dict[str, Any]] = [
        {"step": step, "split": "train", "tokens_per_second": speed} for step, speed in enumerate((1, 90, 110, 100))
    ]
    rows.append({"step": 4, "split": "validation", "tokens_per_second": 9e9})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step, size in ((2, 7), (10, 1000)):
        (directory / "checkpoints" / f"step-{step:07d}" / "weights").mkdir(parents=True)
        (directory / "checkpoints" / f"step-{step:07d}" / "weights" / "0.distcp").write_bytes(bytes(size))
    return directory


def compared(directory: Path, ranks: Layout, name: str, *overrides: str) -> dict[str, dict[str, Any]]:
    config = compose(list(overrides))
    found = plan_check.compare(config, ranks, TEACHER, STUDENT, directory, held_bytes=5_000, device_name=name)
    return {entry["what"]: entry for entry in found}


def test_on_a_cpu_speed_has_no_plan(tmp_path: Path) -> None:
    found = compared(left_behind(tmp_path), CPU, "2 cores of some processor")
    assert found["training speed"]["planned"] is None
    assert found["training speed"]["measured"] == 95, "the median of training, without validation"
    assert found["a checkpoint"]["planned"] == 12 * STUDENT.parameters()
    assert found["a checkpoint"]["measured"] == 1000, "the newest"
    assert found["memory of a device"]["measured"] == 5_000
    assert "libraries" in found["memory of a device"]["note"]


def test_on_a_gpu_the_plan_is_a_share_of_the_peak(tmp_path: Path) -> None:
    ranks = replace(CPU, device="cuda")
    settings = ["distil.precision=bf16", "plan.share_of_peak=0.5"]
    found = compared(left_behind(tmp_path), ranks, "NVIDIA H100 80GB HBM3", *settings)
    length = compose(settings).distil.sequence_length
    flops = planning.distillation_flops(TEACHER, STUDENT, length).total
    assert found["training speed"]["planned"] == pytest.approx(0.5 * 989e12 * 2 / flops, rel=1e-6)
    unknown = compared(tmp_path, ranks, "NVIDIA H20", *settings)
    assert unknown["training speed"]["planned"] is None


def test_without_steps_or_checkpoints_nothing_is_made_up(tmp_path: Path) -> None:
    found = compared(tmp_path, CPU, "2 cores")
    assert found["training speed"]["measured"] is None and found["a checkpoint"]["measured"] is None
    text = plan_check.as_text(list(found.values()), "distil")
    assert text.count("not known") == 3 and all(line.startswith("distil  ") for line in text.splitlines())


def test_the_report_shows_both_and_older_runs_neither(tmp_path: Path) -> None:
    run = write_sample_run(tmp_path / "runs" / "quickstart")
    config = compose([f"run.directory={tmp_path / 'runs'}"])
    assert training.planned(read_run(config)) is None
    assert "of the plan" not in make(tmp_path / "runs")[0].text
    manifest = json.loads((run / "distil" / "manifest.json").read_text())
    entries = list(compared(left_behind(tmp_path), CPU, "2 cores").values())
    (run / "distil" / "manifest.json").write_text(json.dumps(manifest | {"figures": {"plan": entries}}))
    shutil.rmtree(run / "report")
    document, *_ = make(tmp_path / "runs")
    assert "of the plan" in document.text and "95 tokens/s" in document.text and plan_check.NO_PEAK in document.text
