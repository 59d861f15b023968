"""A checkpoint's files where the file system fails, or shows late what another node has written."""

import errno
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipelines import files, stopping
from pipelines.config import UserError
from pipelines.failures import of_the_machine
from pipelines.trainer import checkpoints
from pipelines.trainer.background_write import Write


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "step-0000010"
    path.mkdir()
    (path / "__0_0.distcp").write_bytes(b"weights")
    (path / "sizes.json").write_text(json.dumps({"__0_0.distcp": 7}))
    return path


def fails(code: int) -> Any:
    def read(*_: Any, **__: Any) -> Any:
        raise OSError(code, "as told", "sizes.json")

    return read


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO])
def test_a_file_system_that_fails_says_nothing_of_the_checkpoint(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def read(*_: Any, **__: Any) -> Any:
        raise OSError(code, {errno.ESTALE: "Stale file handle", errno.EIO: "Input/output error"}[code])

    assert checkpoints.whole_checkpoints(checkpoint.parent) == [checkpoint]
    monkeypatch.setattr(Path, "read_text", read)
    for reads in (lambda: checkpoints.whole_checkpoints(checkpoint.parent), lambda: files.read_json(checkpoint / "x")):
        with pytest.raises(OSError) as found:
            reads()
        assert of_the_machine(found.value) == "a file system", "the stage starts again"
    monkeypatch.setattr(files, "crc32", read)
    with pytest.raises(OSError) as found:
        checkpoints._crc32(checkpoint / "__0_0.distcp")
    assert of_the_machine(found.value)
    monkeypatch.setattr(files, "crc32", fails(errno.EACCES))
    with pytest.raises(UserError, match="damaged-"):
        checkpoints._crc32(checkpoint / "__0_0.distcp")


def test_a_record_that_is_no_text_is_a_damaged_checkpoint(checkpoint: Path) -> None:
    (checkpoint / "sizes.json").write_bytes(b"\xff\xfe{")
    assert checkpoints.whole_checkpoints(checkpoint.parent) == []


def test_files_of_another_node_are_waited_for(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_SEEN", 0.5)
    late = checkpoint / "__1_0.distcp"
    with pytest.raises(OSError, match="not seen here") as found:
        checkpoints._wait_for({late: 3})
    assert of_the_machine(found.value) == "a file system"
    late.write_bytes(b"ab")  # as a listing that is not the newest has it
    threading.Timer(0.2, lambda: late.write_bytes(b"abc")).start()
    monkeypatch.setattr(checkpoints, "_SEEN", 30)
    checkpoints._wait_for({late: 3})
    assert late.read_bytes() == b"abc"


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


class Results(list[Any]):
    put = list.append


def request(path: Path, results: Results) -> Any:
    """Of one file, as Megatron makes it."""

    def write(rank: int, buckets: Any, own: Any) -> None:
        path.write_bytes(b"weights")
        own.put({0: "found"})

    arguments = [0, [(str(path), path.name, ([], []))], results]
    return SimpleNamespace(async_fn=write, async_fn_args=arguments, finalize_fns=[lambda: results.pop()])


@pytest.mark.usefixtures("no_gpu")
def test_a_write_that_fails_leaves_nothing_to_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's queue of results is one for the whole process."""
    results = Results()
    with monkeypatch.context() as patched:
        patched.setattr(files, "crc32", fails(errno.EIO))
        failed = Write(request(tmp_path / "one", results), tmp_path, copies=False)
        failed.wait()
    assert "OSError" in failed.error and results == []
    good = Write(request(tmp_path / "two", results), tmp_path, copies=False)
    good.wait()
    assert good.error == "" and good.written == {"two": (7, files.crc32(tmp_path / "two"))} and good.seconds > 0
    good.record()
    assert results == []


@pytest.mark.usefixtures("no_gpu")
def test_an_error_of_one_rank_does_not_wait_for_a_file_system_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_LEAVES", 0.2)
    hangs = threading.Event()
    monkeypatch.setattr(files, "sync_files", lambda paths: hangs.wait(60))
    saving = object.__new__(checkpoints.Checkpoints)
    write = Write(request(tmp_path / "one", Results()), tmp_path, copies=False)
    saving._begun = checkpoints._Begun(3, None, write, time.monotonic())
    started = time.monotonic()
    saving.on_exception(None, None, RuntimeError("CUDA error: unspecified launch failure"))
    assert time.monotonic() - started < 20 and write.goes_on()
    hangs.set()


@pytest.mark.parametrize(("grace", "told"), [("480", False), ("200", False), ("199", True), ("", False)])
@pytest.mark.usefixtures("no_gpu")
def test_the_first_save_is_held_to_the_time_that_a_job_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], grace: str, told: bool
) -> None:
    monkeypatch.setenv(stopping.GRACE, grace)
    clock = SimpleNamespace(monotonic=lambda: 1100.0)
    sizes = {"interval": 1, "keep": 1, "best": 0, "steps": 3, "bytes_per_value": 1}
    at_once = {"asynchronous": False, "writes": lambda: False}
    saving = checkpoints.Checkpoints(tmp_path, **sizes, stops=lambda: False, validation=dict, **at_once)
    for step in (1, 2):
        partial = tmp_path / f"partial-step-{step:07}"
        partial.mkdir()
        write = Write(request(partial / "one", Results()), partial, copies=False)
        write.wait()
        with monkeypatch.context() as patched:
            patched.setattr(checkpoints, "time", clock)
            saving._finish(checkpoints._Begun(step, None, write, started=1000.0), {})
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("a checkpoint took 100.0 s, and the job leaves 199 s") == told, "once at the most"
    assert ("Set cluster.grace_seconds to 200 or more" in said) == told
    assert [path.name for path in checkpoints.whole_checkpoints(tmp_path)] == ["step-0000002"]
