"""Who asks a run to stop, and what is left of its end."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import stopping


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (stopping.STOP_FILE, stopping.VERDICT, stopping.EXCHANGE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(stopping, "_received", False)
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


def test_a_file_asks_once_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(stopping.STOP_FILE, str(tmp_path / "stop"))
    assert not stopping.asked()
    (tmp_path / "stop").touch()
    assert stopping.asked()


def test_a_signal_asks_this_process_and_those_it_has_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopping.listen(tmp_path)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stopping.asked()
    monkeypatch.setattr(stopping, "_received", False)
    monkeypatch.setenv(stopping.EXCHANGE, str(tmp_path))
    assert stopping.asked(), "as one of those sees it"


@pytest.mark.parametrize(
    ("codes", "told"), [([1, 1], 0), ([1, 2], 1), ([2, 75], 0), ([75, 2], 0), ([1, 75, 2], 1), ([2, 1], 0)]
)
def test_the_first_verdict_stays_unless_a_reason_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes: list[int], told: int
) -> None:
    stopping.leave_verdict(1, "nobody asked", "distil")
    monkeypatch.setenv(stopping.VERDICT, str(tmp_path / "verdict.json"))
    for number, code in enumerate(codes):
        stopping.leave_verdict(code, f"{number}", "distil")
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert verdict == {"code": codes[told], "message": str(told), "stage": "distil"}
    assert [path.name for path in tmp_path.iterdir()] == ["verdict.json"]


def test_a_verdict_that_cannot_be_written_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(stopping.VERDICT, str(tmp_path / "nowhere" / "verdict.json"))
    stopping.leave_verdict(1, "told elsewhere", "distil")
    assert list(tmp_path.iterdir()) == []
