"""The command behind the published seconds and memory of slicing."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "launchers"))

from slicing_benchmark import main


def test_a_teacher_is_made_cut_and_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--directory", str(tmp_path), "experiment=quickstart"])
    printed = capsys.readouterr().out
    assert re.search(r"1,443,456 -> 861,408 parameters in [\d.]+ s, [\d.]+ GB/s of the student", printed)
    assert not list(tmp_path.iterdir())
