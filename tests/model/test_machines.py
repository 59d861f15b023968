"""Commands on several machines as the first of them asks: here each machine is a process of this one."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from pipelines.config import UserError
from pipelines.model import machines
from pipelines.model.machines import Machines
from pipelines.stopping import Stopped

FOLLOWER = """
import sys
import torch.distributed as dist
from pipelines.model import machines
host, port, machine = sys.argv[1:]
machines.REFRESH = 0.1
machines.follow(dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False), int(machine))
"""


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = ["127.0.0.1", str(store.port)]
    other = subprocess.Popen([sys.executable, "-c", FOLLOWER, *place, "1"])
    monkeypatch.setenv(machines.MEETING, f"2,{place[0]}:{place[1]}")
    joined = Machines.joined()
    joined.follower = other  # type: ignore[attr-defined]
    yield joined
    store.set("end", "")
    assert other.wait(60) == (0 if other.returncode is None else other.returncode)


def test_a_command_runs_on_each_machine_and_its_failure_ends_the_others(
    two: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "7")
    told = "import json, os, sys; print(json.dumps([sys.argv[1], os.environ.get('RANK'), os.environ['ADDED']]))"
    answers = two.run([["-c", told, "a"], ["-c", told, "b"]], {"ADDED": "here"})
    assert [json.loads(answer.out) for answer in answers] == [["a", None, "here"], ["b", None, "here"]]
    assert {answer.code for answer in answers} == {0}
    started = time.monotonic()
    wait, fail = ["-c", "import time; time.sleep(300)"], ["-c", "import sys; sys.exit('no memory')"]
    own, other = two.run([wait, fail])
    assert time.monotonic() - started < 60
    assert own.code < 0 and not own.first and other.first and "no memory" in other.err
    # A rank of the last machine is killed once there is a checkpoint, there and nowhere else.
    rank = "import os, subprocess, sys, time; os.environ['RANK'] = '0'; "
    rank += "sys.exit(bool(subprocess.call([sys.executable, '-c', 'import time; time.sleep(300)'])))"
    (tmp_path / "step-0000004").mkdir()
    own, other = two.run([wait, ["-c", rank]], kill_after=tmp_path)
    assert other.killed and other.first and other.code == 1 and not own.killed and own.code < 0


def test_a_machine_that_goes_ends_the_command_with_its_name(
    two: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed as when its power fails, while the command waits for it here. What a follower cannot do, it answers."""
    own, other = two.run([["-c", "import time; time.sleep(300)"], ["-c", "\0"]])
    assert other.code == 1 and other.first and "embedded null" in other.err and own.code < 0
    monkeypatch.setattr(machines, "SILENCE", 3.0)
    here = tmp_path / "here"
    threading.Thread(target=lambda: (_wait_for(here), two.follower.kill())).start()  # type: ignore[attr-defined]
    wait = f"import pathlib, time; pathlib.Path({str(here)!r}).touch(); time.sleep(300)"
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"no sign of life for 3 s from machine 1 \({socket.gethostname()}\)"):
        two.run([["-c", wait], ["-c", wait]])
    assert time.monotonic() - started < 60


def _wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def test_only_the_first_machine_looks_whether_it_should_stop(
    two: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others see the same file, perhaps before it: they must not fail by it."""
    stop = tmp_path / "stop"
    monkeypatch.setenv("STILLHOUSE_STOP_FILE", str(stop))
    stop.touch()
    answer = machines.perform(["-c", "print('whole')"], {}, None)
    assert (answer.code, answer.out) == (0, "whole\n")
    wait = ["-c", "import time; time.sleep(300)"]
    with pytest.raises(Stopped, match="from the beginning"):
        two.run([wait, wait])


def test_one_machine_alone_needs_no_other_and_stops_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(machines.MEETING, raising=False)
    alone = Machines.joined()
    assert alone.size == 1 and alone.run([["-c", "print(1)"]])[0].out == "1\n"
    stop = tmp_path / "stop"
    monkeypatch.setenv("STILLHOUSE_STOP_FILE", str(stop))
    stop.touch()
    with pytest.raises(Stopped, match="from the beginning"):
        alone.run([["-c", "import time; time.sleep(300)"]])


def test_more_than_one_process_on_a_machine_is_refused() -> None:
    environment = os.environ | {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "pipelines.model.machines", "stage=accept"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Give torchrun --nproc-per-node=1" in done.stderr
