"""What needs an NVIDIA GPU: `pytest -m gpu`."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.config import gpu_count

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(gpu_count() == 0, reason="needs an NVIDIA GPU, and this machine has none"),
]


@pytest.mark.parametrize("layout", ["parallel=tp1", "parallel=tp2", "parallel=tp2_sp", "parallel=pp2", "parallel=dp2"])
def test_verify_proves_the_step_on_gpus(layout: str) -> None:
    needed = 1 if layout == "parallel=tp1" else 2
    if gpu_count() < needed:
        pytest.skip(f"needs {needed} GPUs, and this machine has {gpu_count()}")
    command = [sys.executable, "-m", "pipelines", "stage=verify", "parallel.device=cuda", layout]
    result = subprocess.run([*command, f"parallel.processes={needed}"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
