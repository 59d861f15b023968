"""What a process skips at its start and end, and what it does not."""

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from pipelines import interpreter

ROOT = Path(__file__).resolve().parent.parent
ENDS = """
import sys
from pipelines.interpreter import QuickEnd
end = QuickEnd()
import atexit, threading, time

class Kept:
    def __del__(self):
        print("taken apart")

kept = Kept()
atexit.register(print, "at its end")
threading.Thread(target=lambda: (time.sleep(0.2), print("the thread is done"))).start()
end.code = {code}
sys.exit({code} or 0)
"""


@pytest.mark.parametrize(("code", "apart"), [(0, False), (3, False), (None, True)])
def test_a_process_ends_in_order_without_being_taken_apart(code: int | None, apart: bool) -> None:
    done = subprocess.run([sys.executable, "-c", ENDS.format(code=code)], cwd=ROOT, capture_output=True, text=True)
    told = ["the thread is done", "at its end"] + ["taken apart"] * apart
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (code or 0, told, "")


def test_a_module_is_loaded_without_looking_for_garbage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "loaded_once.py").write_text("import gc\nWAS_LOOKED_FOR = gc.isenabled()\n")
    (tmp_path / "broken_once.py").write_text("raise RuntimeError('broken')\n")
    found = interpreter.load("loaded_once")
    assert not found.WAS_LOOKED_FOR and gc.isenabled() and interpreter.load("loaded_once") is found
    with pytest.raises(RuntimeError, match="broken"):
        interpreter.load("broken_once")
    assert gc.isenabled()
    monkeypatch.delitem(sys.modules, "loaded_once")


def test_what_was_there_before_is_not_searched_again_until_the_end() -> None:
    class Ring:
        def __init__(self) -> None:
            self.itself = self

    def made() -> weakref.ref[Ring]:
        return weakref.ref(Ring())

    before = gc.get_freeze_count()
    with pytest.raises(RuntimeError, match="broken"), interpreter.settled():
        assert gc.get_freeze_count() > before + 10_000
        ring = made()
        gc.collect()
        assert ring() is None, "garbage of the body is found"
        raise RuntimeError("broken")
    assert gc.get_freeze_count() == before
