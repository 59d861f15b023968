"""A teacher in FP8 or in host memory: what Megatron is asked for, and on a GPU what comes of it."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipelines.config import gpu_count
from tests.ranks import RankPools

CASES = "tests.model.cases_frozen_teacher"
ROOT = Path(__file__).resolve().parents[2]


def test_fp8_is_asked_of_megatron_without_a_history(ranks: RankPools) -> None:
    (settings,) = ranks(1, f"{CASES}:fp8_settings")
    assert settings["fp8"] == "hybrid" and settings["fp8_recipe"] == "tensorwise" and settings["fp8_param"]
    assert not settings["fp8_dot_product_attention"] and not settings["fp8_multi_head_attention"]
    assert settings["params_dtype"] is settings["pipeline_dtype"] is torch.bfloat16


@pytest.mark.parametrize(
    ("engine", "expected"), [(False, "a GPU with Transformer Engine, found none"), (True, "8.9 or more, found 8.0")]
)
def test_fp8_is_refused_where_the_device_has_none(ranks: RankPools, engine: bool, expected: str) -> None:
    (message,) = ranks(1, f"{CASES}:fp8_refusal", engine=engine)
    assert (
        message.startswith("fp8: expected") and expected in message and message.endswith("Set the precision to bf16.")
    )


def test_weights_in_fp8_are_written_whole_and_once(ranks: RankPools, tmp_path: Path) -> None:
    """Scaled by the greatest value of the whole: query, key and value, or gate and up, cannot come one by one."""
    for found in ranks(2, f"{CASES}:written_whole", directory=tmp_path):
        assert found["equal"] and found["written"] == found["matrices"] and len(found["matrices"]) == 8


def on_a_gpu(what: str) -> dict[str, float]:
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(one.getsockname()[1])}
    command = [sys.executable, "-m", CASES, what]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | place, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.gpu
@pytest.mark.skipif(gpu_count() == 0, reason="needs an NVIDIA GPU, and this machine has none")
def test_a_teacher_in_host_memory_leaves_two_layers_on_the_gpu() -> None:
    found = on_a_gpu("offload")
    assert found["error"] == 0, "the same bits, in every forward pass"
    assert found["held"] == pytest.approx(found["expected"], rel=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(gpu_count() == 0, reason="needs an NVIDIA GPU, and this machine has none")
@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine")
def test_a_teacher_in_fp8_is_near_the_one_in_bf16_in_about_half_the_memory() -> None:
    found = on_a_gpu("fp8")
    assert found["error"] < 0.1
    assert found["held"] < 0.6 * found["whole"]
