"""The line that says what models are built from, with stand-ins for what only GPUs have."""

import os
import subprocess
import sys
import types
from pathlib import Path

import megatron.core
import pytest

from pipelines.model import adam, cpu_runtime, engine
from pipelines.processes import environment_outside_ranks


def test_on_a_cpu_everything_is_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_runtime, "_installed", True)
    found = engine.description()
    assert "layers: plain torch; optimizer: torch AdamW; Apex: none" in found
    assert f"Megatron-Core {megatron.core.__version__}" in found


@pytest.mark.parametrize("package", ["transformer_engine", "apex"])
def test_what_is_there_is_taken_and_told(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """On a GPU: Transformer Engine before Apex before torch."""
    monkeypatch.setattr(cpu_runtime, "_installed", False)
    monkeypatch.setattr(engine, "uses_transformer_engine", lambda: package == "transformer_engine")
    assert "optimizer: torch AdamW, fused" in engine.description()
    module = types.ModuleType(adam.FUSED["apex"])
    module.FusedAdam = type("FusedAdam", (), {"__module__": adam.FUSED["apex"]})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, adam.FUSED["apex"], module)
    assert "optimizer: apex.optimizers.FusedAdam" in engine.description()
    if package == "transformer_engine":
        other = types.ModuleType(adam.FUSED[package])
        other.FusedAdam = type("FusedAdam", (), {"__module__": adam.FUSED[package]})  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, adam.FUSED[package], other)
        monkeypatch.setattr(engine, "_version", lambda name: "2.9.0")
        found = engine.description()
        assert "layers: Transformer Engine 2.9.0; optimizer: transformer_engine.pytorch.optimizers.FusedAdam" in found


def test_megatron_is_the_one_that_was_asked_for() -> None:
    """make test-image-versions puts the version of NVIDIA's image in front of the installed one."""
    asked = os.environ.get("STILLHOUSE_MEGATRON")
    if asked is None:
        pytest.skip("no version was asked for: make test-image-versions does")
    assert megatron.core.__version__ == asked


def test_a_stage_on_ranks_says_it_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines", "stage=verify", "parallel=tp1", "parallel.device=cpu"]
    environment = environment_outside_ranks()
    done = subprocess.run([*command, f"run.directory={tmp_path}"], capture_output=True, text=True, env=environment)
    assert done.stdout.count("engine  Megatron-Core ") == 1, done.stdout + done.stderr
