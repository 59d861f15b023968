"""Room for a checkpoint, told before it is begun."""

import ctypes
import errno
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.config import UserError
from pipelines.trainer import checkpoints, room


def test_room_is_told_by_what_is_free(tmp_path: Path) -> None:
    room.refuse_without_room(tmp_path, 1 << 20)
    with pytest.raises(UserError, match=r"of about 1,000,000,000,000\.0 MB, found .* MB free. Nothing was written"):
        room.refuse_without_room(tmp_path, 10**18)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("code", "refused"), [(errno.EDQUOT, True), (errno.ENOSPC, True), (errno.EOPNOTSUPP, False)])
def test_a_quota_is_asked_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, refused: bool) -> None:
    """A system call that says what a full quota would."""

    def fallocate(descriptor: int, mode: int, start: int, size: int) -> int:
        ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(room.ctypes, "CDLL", lambda *_, **__: SimpleNamespace(fallocate=fallocate))
    assert bool(room.missing(tmp_path, 1000)) == refused
    assert list(tmp_path.iterdir()) == []


def test_what_a_save_left_that_was_cut_short_takes_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill in the middle of a save must not end the run on a disk that holds one checkpoint more."""
    (tmp_path / "partial-step-0000007").mkdir()
    seen: list[list[Path]] = []
    monkeypatch.setattr(checkpoints, "refuse_without_room", lambda directory, _: seen.append(list(directory.iterdir())))
    sizes = {"interval": 1, "keep": 1, "best": 0, "steps": 1, "bytes_per_value": 1}
    at_once = {"asynchronous": False, "writes": lambda: False}
    saving = checkpoints.Checkpoints(tmp_path, **sizes, stops=lambda: False, validation=dict, **at_once)
    saving._expected = 1
    saving._refuse_without_room()
    assert seen == [[]]
