"""A disk that fills while a stage trains: a real file system of a few megabytes, and the real command."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SETTINGS = {
    "stage": "teacher",
    "experiment": "quickstart",
    "parallel": "tp1",
    "run.name": "full",
    "model.shape.vocab_size": 600,
    "model.shape.hidden_size": 48,
    "model.shape.intermediate_size": 80,
    "model.shape.num_hidden_layers": 2,
    "model.shape.num_attention_heads": 4,
    "model.shape.num_key_value_heads": 2,
    "model.shape.head_dim": 16,
    "teacher.sequence_length": 32,
    "teacher.micro_batch_size": 2,
    "teacher.global_batch_size": 2,
    "teacher.warmup_steps": 2,
    "teacher.steps": 500,
    "teacher.validation_interval": 500,
    "teacher.validation_batches": 1,
    "teacher.checkpoint_interval": 100,
}

pytestmark = pytest.mark.slow


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """32 MiB of memory as a file system of its own."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", mount], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)


def start(disk: Path, corpus: Path, **settings: int) -> subprocess.Popen[str]:
    given = SETTINGS | {"run.directory": disk, "data.corpus": corpus}
    given |= {f"teacher.{name}": value for name, value in settings.items()}
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines", *(f"{name}={value}" for name, value in given.items())],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def fill_after(disk: Path, process: subprocess.Popen[str], step: int, leave: int) -> tuple[int, str]:
    """Fill the disk but for `leave` bytes once that checkpoint is there. The command's exit code and stderr."""
    checkpoint = disk / "full" / "teacher" / "checkpoints" / f"step-{step:07d}"
    deadline = time.monotonic() + 300
    while not checkpoint.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - leave
    with open(disk / "filler", "wb", buffering=0) as file:
        try:
            file.write(bytes(free))
        except OSError:
            assert not leave
    _, error = process.communicate(timeout=300)
    (disk / "filler").unlink()
    return process.returncode, error


def test_a_training_goes_on_after_a_full_disk(disk: Path, made: Path) -> None:
    directory = disk / "full" / "teacher"
    # No room for a row of metrics, then room for rows but for no checkpoint.
    for step, leave, log_interval in ((100, 0, 1), (200, 200_000, 1000)):
        code, error = fill_after(disk, start(disk, made, log_interval=log_interval), step, leave)
        assert code == 2, error
        assert "expected room" in error and "the same command again" in error and "Traceback" not in error
        assert len(error.strip().splitlines()) == 1, error
        assert not (directory / "complete").exists()
        assert not list((directory / "checkpoints").glob("partial-*"))
    finished = start(disk, made, log_interval=100)
    output, error = finished.communicate(timeout=300)
    assert finished.returncode == 0, error
    assert "continues from" in output and (directory / "complete").exists()
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "validation"] == [500]
    steps = [row["step"] for row in rows if row["split"] == "train"]
    assert steps == sorted(set(steps)) and steps[-3:] == [300, 400, 500]
