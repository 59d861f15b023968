"""The trial of a machine: its parts by the real command, and what it makes of what they find."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts import StageContext
from pipelines.compose import compose
from pipelines.config import UserError
from pipelines.model import identity
from pipelines.processes import environment_outside_ranks
from pipelines.site_settings import AcceptPart
from pipelines.stages import accept
from pipelines.validation import validate

SMALL = ["accept.steps=2", "accept.sequence_length=32", "accept.bandwidth_bytes=[65536]"]


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> accept.Trial:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = compose([f"run.directory={tmp_path}", "parallel.device=cpu", *SMALL])
    return accept.Trial(StageContext(config, "accept", tmp_path))


@pytest.mark.slow
def test_parts_of_a_trial_by_the_real_command(tmp_path: Path) -> None:
    """All of them take three minutes on idle cores: `python -m pipelines stage=accept`."""
    command = [sys.executable, "-m", "pipelines", "stage=accept", "parallel.device=cpu", f"run.directory={tmp_path}"]
    environment = environment_outside_ranks()
    shape = ["model.shape.hidden_size=64", "model.shape.intermediate_size=128", "model.shape.vocab_size=300"]
    small = [*shape, "student.hidden_size=32", "student.intermediate_size=64", *SMALL]
    parts = "accept.parts=[node,bandwidth,steps]"
    done = subprocess.run([*command, *small, parts], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "accept" / "accept.json").read_text())
    assert found["accepted"] is False and "nothing is accepted yet" in done.stdout
    assert found["node"]["fit"] and len(found["bandwidth"]) == 4
    assert found["steps"]["sequence_length"] == 32 and found["steps"]["seconds"] > 0
    header, line, row = done.stdout.splitlines()[-4:-1]
    assert header.count("|") == line.count("|") == row.count("|") == 13
    assert "all_reduce" in row and found["machine"]["versions"]["torch"] in row


def test_every_layout_of_eight_processes_is_verified() -> None:
    found = list(accept.layouts(8))
    assert len(found) == len(set(found)) == 10 and {(8, 1), (1, 8), (2, 2), (1, 1), (4, 2)} <= set(found)
    assert list(accept.layouts(2)) == [(1, 1), (1, 2), (2, 1)]


@pytest.mark.parametrize(("processes", "each"), [(1, 1), (2, 2), (3, 1), (6, 6), (18, 6), (40, 8), (128, 8)])
def test_the_run_that_is_killed_fits_any_number_of_processes(
    processes: int, each: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.validation.layouts.check_processes", lambda ranks: None)  # of this machine alone
    here = [f"run.directory={tmp_path}", "parallel.device=cpu", f"parallel.processes={processes}"]
    stages = ["corpus", "teacher", "prune", "distil", "export"]
    validate(compose([*accept.small_run(processes, each), *here]), stages)


def test_verify_asks_for_each_layout_by_name(trial: accept.Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def run(*overrides: str) -> str:
        asked.append(overrides)
        validate(compose([*overrides, "parallel.device=cpu"]), ["verify"])
        return "engine  Megatron-Core 1\nverify  9 tensors compared: all within tolerance\nverify  1.0 s"

    monkeypatch.setattr(trial, "run", run)
    found = accept.verify(trial)
    assert list(found) == ["TP 1 x PP 1 x DP 2", "TP 1 x PP 2 x DP 1", "TP 2 x PP 1 x DP 1"] and len(asked) == 3
    assert found["TP 2 x PP 1 x DP 1"]["engine"] == "Megatron-Core 1"
    assert "parallel.sequence_parallel=true" in asked[2] and "distil.distributed_optimizer=true" in asked[0]


def test_a_part_that_fails_ends_with_its_command_and_message(trial: accept.Trial) -> None:
    with pytest.raises(
        UserError,
        match=r"`python -m pipelines stage=plan parallel.tensor=0` to end well, found exit code 2:\nparallel.tensor",
    ):
        trial.run("stage=plan", "parallel.tensor=0")


# A killed and continued training in small: it appends losses, makes a checkpoint after three, and ends at six.
TRAINING = """
import json, os, subprocess, sys, time
from pathlib import Path
stage, change = Path(sys.argv[1]), float(sys.argv[2])
if "RANK" not in os.environ:
    sys.exit(subprocess.run([sys.executable, *sys.orig_argv[1:]], env=os.environ | {"RANK": "0"}).returncode and 1)
stage.mkdir(parents=True, exist_ok=True)
first = 3 if (stage / "checkpoints").is_dir() else 0
with open(stage / "metrics.jsonl", "a") as rows:
    for step in range(first + 1, 7):
        print(json.dumps({"step": step, "loss": 10 / step + (change if first else 0)}), file=rows, flush=True)
        if step == 3:
            (stage / "checkpoints" / "step-0000003").mkdir(parents=True)
            time.sleep(60)
"""


@pytest.mark.parametrize("change", [0.0, 1e-6])
def test_a_killed_run_must_end_with_the_losses_of_one_left_alone(
    trial: accept.Trial, monkeypatch: pytest.MonkeyPatch, change: float
) -> None:
    runs = trial.directory / "runs"
    (runs / "whole" / "distil").mkdir(parents=True)
    rows = [json.dumps({"step": step, "loss": 10 / step}) for step in range(1, 7)]
    (runs / "whole" / "distil" / "metrics.jsonl").write_text("\n".join(rows))
    (runs / "whole" / "export").mkdir()
    (runs / "whole" / "export" / "manifest.json").write_text('{"figures": {"relative_difference": 1e-7}}')
    script = trial.directory / "training.py"
    script.write_text(TRAINING)
    stage = str(runs / "killed" / "distil")
    monkeypatch.setattr(trial, "arguments", lambda *_: [str(script), stage, str(change)])
    monkeypatch.setattr(accept.Trial, "run", _run_but_whole)
    if change:
        with pytest.raises(UserError, match="left alone, found them .* apart"):
            accept.resume(trial)
        return
    found = accept.resume(trial)
    assert found == {"steps": 6, "killed_after": 3, "losses_apart": 0.0, "export_difference": 1e-7}


def _run_but_whole(trial: accept.Trial, *overrides: str) -> str:
    """The run that is left alone is there already."""
    if "run.name=whole" in overrides:
        return ""
    return subprocess.run(
        [sys.executable, *trial.arguments(*overrides)], capture_output=True, text=True, check=True
    ).stdout


def found_of(**parts: Any) -> dict[str, Any]:
    versions = {"torch": "2.9.0", "megatron-core": "0.15.0", "transformer-engine": "2.9.0", "numpy": "1.26"}
    here = {"date": "2026-01-02", "git": "0123456789abcdef", "image": "nvcr.io/nvidia/nemo:25.11", "processes": 8}
    here |= {
        "device": "NVIDIA H100 80GB HBM3",
        "driver": "580.65.06",
        "interconnect": "NVLink NV18",
        "versions": versions,
    }
    return {"machine": here, "seconds": 1.0, **parts}


def test_the_row_names_what_identifies_a_machine() -> None:
    rates = [
        {"kind": "all_reduce", "bytes_per_second": 1e9},
        {"kind": "all_reduce", "bytes_per_second": 4e11},
        {"kind": "send_recv", "bytes_per_second": 2e10},
    ]
    step = {"seconds": 0.5, "tokens_per_second": 16384.0}
    resumed = {"losses_apart": 0.0, "export_difference": 2e-4}
    row = accept.row(found_of(verify={"TP 8 x PP 1 x DP 1": {}}, bandwidth=rates, steps=step, resume=resumed))
    assert row == (
        "| 2026-01-02 | 0123456789ab | nvcr.io/nvidia/nemo:25.11 | 8 x NVIDIA H100 80GB HBM3 | 580.65.06 | torch "
        "2.9.0, megatron-core 0.15.0, transformer-engine 2.9.0 | NVLink NV18 | TP 8 x PP 1 x DP 1 | all_reduce 400.00, "
        "send_recv 20.00 | 0.500 s, 16,384 tokens/s | losses 0.0e+00 apart | 2.0e-04 |"
    )
    assert accept.row(found_of()).count("| -") == 5, "what was not asked for is a dash"
    assert len(re.findall(r"(?<=\|)[^|]+", accept.HEADER.splitlines()[0])) == 12


def test_the_interconnect_is_read_from_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nprintf 'GPU0 GPU1\\nGPU0 X NV18\\nGPU1 NV18 X\\nNVL NV#\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    port = tmp_path / "infiniband" / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(identity.preflight, "INFINIBAND", tmp_path / "infiniband")
    assert identity.interconnect() == "NVLink NV18; mlx5_0 400 Gb/sec (4X NDR)"
    monkeypatch.setattr(identity.preflight, "INFINIBAND", tmp_path / "none")
    monkeypatch.setenv("PATH", "/nowhere")
    assert identity.interconnect() == "none"


def test_a_machine_without_nvidia_smi_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert identity.main(["cuda", str(tmp_path)]) == 2
    assert "accept: expected nvidia-smi to tell the GPUs, found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "sign"),
    [
        (["accept.parts=[]"], "accept.parts: expected some of node, verify"),
        (["accept.bandwidth_bytes=[]"], "accept.bandwidth_bytes: expected some sizes"),
        (["accept.steps=0"], "accept.steps: expected 1 or more"),
        (["accept.bandwidth_bytes=[0]"], "accept.bandwidth_bytes: expected 1 or more"),
    ],
)
def test_settings_are_refused_at_once(overrides: list[str], sign: str) -> None:
    with pytest.raises(UserError, match=re.escape(sign)):
        validate(compose(overrides), ["accept"])


def test_inside_of_ranks_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="stage=accept: expected one process"):
        validate(compose([]), ["accept"])


def test_every_part_is_done_in_its_order() -> None:
    assert list(accept.PARTS) == list(AcceptPart)
