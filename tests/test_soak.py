"""The command line of launchers/soak.py; tests/test_pipeline.py runs a short one whole."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launchers import soak
from pipelines.processes import descendants

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--rounds", "0"], "--rounds: expected 1 or more, found 0"),
        (["--rounds", "-3"], "--rounds: expected 1 or more, found -3"),
        (["--kinds", "flood"], "invalid choice: 'flood'"),
        (["--seeds=2"], "--seeds=2: expected key=value of the distillation"),
        (["parallel"], "parallel: expected key=value of the distillation"),
    ],
)
def test_what_it_cannot_do_is_refused(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        soak.main(arguments)
    assert part in capsys.readouterr().err


def test_the_help_explains_every_kind_and_the_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        soak.main(["--help"])
    told = capsys.readouterr().out
    assert all(f"\n    {kind} " in told for kind in soak.KINDS)
    assert "OVERRIDES are settings of the distillation" in told


def test_sigterm_ends_the_training_and_leaves_no_mount(tmp_path: Path) -> None:
    command = [sys.executable, "launchers/soak.py", "--directory", str(tmp_path), "--rounds", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(descendants(process.pid)) < 3:  # the command, and a stage of it
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    left = descendants(process.pid)[1:]
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM
    while any(soak.is_running(pid) for pid in left):
        assert time.monotonic() < deadline, "the training went on"
        time.sleep(0.05)
    assert not (tmp_path / "disk").exists()


def test_sigterm_just_behind_the_mount_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounted = soak.mounted

    def stopped(directory: Path) -> bool:
        mounted(directory)  # where this user may
        soak.interrupt(signal.SIGTERM, None)
        return True

    monkeypatch.setattr(soak, "mounted", stopped)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # this process keeps its own
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        soak.main(["--directory", str(tmp_path), "--rounds", "1"])
    assert not (tmp_path / "disk").exists()


def test_what_a_killed_soak_has_left_is_no_hindrance(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    (disk / "runs").mkdir(parents=True)
    soak.mounted(disk)  # where this user may
    soak.cleared(disk)
    assert not disk.exists()
