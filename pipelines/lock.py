"""One writer per directory: a lock file that a dead process does not keep. Imports no torch."""

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipelines.config import UserError

REFRESH = 30.0  # seconds between two signs of life
JOB = "STILLHOUSE_JOB"  # environment variable: the name of a batch job, the same over its restarts and continuations
STALE = 300.0  # seconds without a sign of life after which a writer on another host counts as gone


class Lock:
    """Held from construction to `release`. Raises UserError where a live process holds it.

    A holder on this host is known by pid and start time (pids come again); one on another host by its job, which
    never runs twice at a time, else by the age of the file, which every holder refreshes.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = print) -> None:
        self.path = path
        self.identity = {"pid": os.getpid(), "start": _start_time(os.getpid()), "host": socket.gethostname()}
        if job := os.environ.get(JOB):
            self.identity["job"] = job
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            with suppress(OSError):  # a file system without flock: the check below is all there is
                fcntl.flock(directory, fcntl.LOCK_EX)
            holder = read(path)
            if holder and holder != self.identity:
                if is_alive(holder, path):
                    raise UserError(
                        f"{path.parent}: expected no other writer, found process {holder['pid']} on {holder['host']} "
                        f"at work there. Wait for it, end it on {holder['host']} (kill {holder['pid']}; kill -USR1 "
                        "lets a training save first), or use another run.name."
                    )
                say(f"{path.parent}: taking over from process {holder['pid']} on {holder['host']}, which is gone")
            temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
            temporary.write_text(json.dumps(self.identity))
            os.replace(temporary, path)
        finally:
            os.close(directory)
        self._released = threading.Event()
        threading.Thread(target=self._refresh, daemon=True).start()

    def _refresh(self) -> None:
        while not self._released.wait(REFRESH):
            with suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        if not self._released.is_set():
            self._released.set()
            if read(self.path) == self.identity:
                self.path.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any] | None:
    """The holder that a lock file names; None where there is no readable one."""
    try:
        holder = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return holder if isinstance(holder, dict) and {"pid", "start", "host"} <= holder.keys() else None


def is_alive(holder: dict[str, Any], path: Path) -> bool:
    if holder["host"] == socket.gethostname():
        start = _start_time(holder["pid"])
        return start is not None and start == holder["start"]
    if holder.get("job") and holder["job"] == os.environ.get(JOB):
        return False  # of an earlier start of this very job, which has ended before SLURM starts it again
    with suppress(OSError):
        return time.time() - path.stat().st_mtime < STALE
    return False


def _start_time(pid: int) -> int | None:
    """Clock ticks after boot at which a process of this host started; None where there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rsplit(b")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])
