"""Several machines that run the same commands at the same time, as the first of them says.

`python -m pipelines.model.machines <overrides>` is one process on each machine, started by torchrun with
--nproc-per-node=1. On the first it is the command `python -m pipelines <overrides>`, whose stage asks for command lines
by Machines.run; on the others it runs them, until that command has ended. They meet at a TCPStore of the first machine,
where each of the others counts a sign of life: one that goes ends the command. Only the first is asked to stop. torch
alone.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from pipelines import processes, stopping
from pipelines.config import UserError

MEETING = "STILLHOUSE_MACHINES"  # environment variable of the first machine's command: number of machines, host:port
POLL = 0.1  # seconds
KEPT = 200_000  # characters of what a command printed
PATIENCE = 900.0  # seconds for the first checkpoint of a run that is to be killed, and for one machine's collectives
GRACE = 60.0  # seconds that a command gets to end; torchrun gives its ranks 30
REFRESH = 5.0  # seconds between two signs of life
SILENCE = 120.0  # seconds without one after which a machine counts as gone
MEETING_SECONDS = 600.0  # that the machines get to find each other


@dataclass(frozen=True)
class Answer:
    """What a command came to on one machine. killed: one of its ranks was killed, as was asked; first: no other
    machine's command had failed before."""

    code: int
    out: str
    err: str
    killed: bool
    first: bool


class Machines:
    """As the first of `size` machines sees them. address: at which the others find it."""

    def __init__(self, size: int = 1, address: str = "127.0.0.1", store: "dist.TCPStore | None" = None) -> None:
        self.size, self.address, self._store, self._tasks = size, address, store, 0
        self._signs = SignsOfLife(store, range(1, size)) if store else None

    @classmethod
    def joined(cls) -> "Machines":
        """Those that STILLHOUSE_MACHINES tells; this machine alone without it."""
        if MEETING not in os.environ:
            return cls()
        size, _, place = os.environ[MEETING].partition(",")
        host, _, port = place.rpartition(":")
        return cls(int(size), host, dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False))

    def free_port(self) -> int:
        """Of this machine, for the ranks of the next command to meet at."""
        with socket.socket() as one:
            one.bind(("", 0))
            return int(one.getsockname()[1])

    def run(
        self, arguments: Sequence[list[str]], variables: dict[str, str] | None = None, kill_after: Path | None = None
    ) -> list[Answer]:
        """Python with one list of arguments on each machine, at the same time; their answers, this machine's first.

        A command that fails ends those of the other machines. variables: added to its environment. kill_after: once a
        checkpoint is in this directory, SIGKILL ends the last rank of the last machine. Raises Stopped, and UserError
        that names a machine which has gone, or gives no answer for long after the command has failed here.
        """
        assert len(arguments) == self.size
        self._tasks += 1
        number, added, place = self._tasks, variables or {}, str(kill_after) if kill_after else None
        for machine in range(1, self.size):
            kill = place if machine == self.size - 1 else None
            task = {"arguments": arguments[machine], "variables": added, "kill_after": kill}
            self._set(f"{number}/task/{machine}", json.dumps(task))
        ended = SharedEnd(self._store, number) if self._store else None
        own = perform(arguments[0], added, place if self.size == 1 else None, ended, self._must_end)
        # Twice: the others end theirs by SIGTERM first, and by SIGKILL a GRACE later.
        limit = time.monotonic() + (2 * GRACE if own.code else float("inf"))
        answers = [own]
        for machine in range(1, self.size):
            answers.append(self._answer(f"{number}/answer/{machine}", machine, limit))
        if stopping.asked():
            raise stopping.Stopped("stopped as asked before the end; the same command starts again from the beginning.")
        return answers

    def _must_end(self) -> bool:
        return stopping.asked() or bool(self._signs and self._signs.silent())

    def _answer(self, key: str, machine: int, limit: float) -> Answer:
        """limit: of time.monotonic(), until which the machine may take. A machine that is gone is named before others
        that only wait for it."""
        assert self._store is not None and self._signs is not None
        found = _wait(self._store, key, lambda: self._must_end() or time.monotonic() > limit)
        if found:
            return Answer(**json.loads(found))
        if stopping.asked():
            raise stopping.Stopped("stopped as asked before the end; the same command starts again from the beginning.")
        silent = self._signs.silent()
        what = f"no sign of life for {SILENCE:.0f} s" if silent else "no answer after the command had failed here"
        raise UserError(
            f"expected every machine to go on, found {what} from {self._signs.name(silent or machine)}. Leave that "
            "machine out, or mend it, and start again."
        )

    def _set(self, key: str, value: str) -> None:
        assert self._store is not None
        self._store.set(key, value)


class SharedEnd:
    """The end of one command on every machine: the first that fails ends it on all."""

    def __init__(self, store: "dist.Store", number: int) -> None:
        self.store, self.key = store, f"{number}/failures"

    def is_there(self) -> bool:
        return bool(self.store.add(self.key, 0))

    def fail(self) -> bool:
        """Whether no other machine has failed before."""
        return self.store.add(self.key, 1) == 1


class SignsOfLife:
    """What the other machines count up, as the first sees it: by its own clock alone."""

    def __init__(self, store: "dist.Store", machines: Sequence[int]) -> None:
        self.store, self.machines, self._looked = store, machines, time.monotonic()
        self._seen = {machine: (0, time.monotonic()) for machine in machines}

    def silent(self) -> int:
        """The first machine that has given none for SILENCE seconds; 0 where all have."""
        now = time.monotonic()
        if now - self._looked > min(REFRESH, SILENCE / 4):
            if now - self._looked > SILENCE / 2:  # nobody has looked for long: each begins anew
                self._seen = dict.fromkeys(self.machines, (0, now))
            self._looked = now
            for machine in self.machines:
                count = self.store.add(f"alive/{machine}", 0)
                if count != self._seen[machine][0]:
                    self._seen[machine] = (count, now)
        return next((machine for machine, (_, when) in self._seen.items() if now - when > SILENCE), 0)

    def name(self, machine: int) -> str:
        """machine 1 (its host)"""
        key = f"host/{machine}"
        host = self.store.get(key).decode() if self.store.check([key]) else "never met"
        return f"machine {machine} ({host})"


def give_signs(store: "dist.Store", machine: int) -> threading.Event:
    """From a thread of this process, until the event is set."""
    over = threading.Event()
    store.set(f"host/{machine}", socket.gethostname())

    def refresh() -> None:
        with contextlib.suppress(dist.DistError):  # the first machine has gone: `follow` sees it too
            while not over.is_set():
                store.add(f"alive/{machine}", 1)
                over.wait(REFRESH)

    threading.Thread(target=refresh, daemon=True).start()
    return over


def perform(
    arguments: list[str],
    variables: dict[str, str],
    kill_after: str | None,
    ended: SharedEnd | None = None,
    must_end: Callable[[], bool] = lambda: False,
) -> Answer:
    """Run Python with these arguments on this machine, until it ends, or fails elsewhere, or `must_end`."""
    killed, first, deadline = False, True, time.monotonic() + PATIENCE
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=environment() | variables,
            stdout=out,
            stderr=errors,
            preexec_fn=processes.end_with_parent,
        )
        try:
            while process.poll() is None:
                late = kill_after and not killed and time.monotonic() > deadline
                if late or must_end() or (ended and ended.is_there()):
                    break
                if kill_after and not killed and any(Path(kill_after).glob("step-*")):
                    for rank in ranks_below(process.pid)[-1:]:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(rank, signal.SIGKILL)
                            killed = True
                time.sleep(POLL if not kill_after else POLL / 5)
        finally:
            cut = process.poll() is None
            if cut:
                _end(process)
        code = process.wait()
        if (code or cut) and ended:
            first = ended.fail()
        texts = []
        for stream in (out, errors):
            stream.seek(0)
            texts.append(stream.read()[-KEPT:])
    return Answer(code, texts[0], texts[1], killed, first)


def environment() -> dict[str, str]:
    """This process's, without what makes it the child of a stage, or a rank."""
    ours = (stopping.EXCHANGE, stopping.VERDICT, stopping.STOP_FILE, processes.STARTED, MEETING)
    return processes.environment_outside_ranks(*ours)


def ranks_below(pid: int) -> list[int]:
    """The processes below one that have RANK in their environment, by rank."""
    found: dict[int, int] = {}
    for one in processes.descendants(pid):
        with contextlib.suppress(OSError):
            for entry in Path(f"/proc/{one}/environ").read_bytes().split(b"\0"):
                if entry.startswith(b"RANK="):
                    found.setdefault(int(entry[5:]), one)
    return [found[rank] for rank in sorted(found)]


def _end(process: "subprocess.Popen[bytes]") -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
            return


def _wait(store: "dist.Store", key: str, unless: Callable[[], bool] = lambda: False) -> str:
    """The value of a key, once it is there; nothing where `unless` comes first."""
    while not store.check([key]):
        if unless():
            return ""
        time.sleep(POLL)
    return str(store.get(key).decode())


# One process on each machine


def follow(store: "dist.Store", machine: int) -> None:
    """Run what the first machine asks for, until it has ended."""
    number, over = 1, give_signs(store, machine)
    while task := _wait(store, f"{number}/task/{machine}", lambda: store.check(["end"])):
        shared = SharedEnd(store, number)
        try:
            asked = json.loads(task)
            answer = perform(asked["arguments"], asked["variables"], asked["kill_after"], shared)
        except Exception:  # whatever it is: the first machine waits for a word
            answer = Answer(1, "", traceback.format_exc(), False, shared.fail())
        store.set(f"{number}/answer/{machine}", json.dumps(asdict(answer)))
        number += 1
    over.set()
    store.add("left", 1)


def lead(address: str, size: int, overrides: list[str], announce: Callable[[str], None]) -> int:
    """The command, while the others wait for what it asks for; its exit code."""
    store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
    announce(f"{address}:{store.port}")
    kept = {name: os.environ[name] for name in (stopping.VERDICT, stopping.STOP_FILE) if name in os.environ}
    child = subprocess.Popen(
        [sys.executable, "-m", "pipelines", *overrides],
        env=environment() | kept | {MEETING: f"{size},{address}:{store.port}"},
        preexec_fn=processes.end_with_parent,
    )
    code = child.wait()
    store.set("end", "")
    deadline = time.monotonic() + GRACE
    while store.add("left", 0) < size - 1 and time.monotonic() < deadline:
        time.sleep(POLL)
    return code


def main(overrides: list[str]) -> int:
    """The exit code, on the first machine that of the command."""
    if "WORLD_SIZE" not in os.environ or os.environ.get("LOCAL_WORLD_SIZE") != "1":
        print(
            "pipelines.model.machines: expected one process on each machine, started by torchrun, found "
            f"LOCAL_WORLD_SIZE={os.environ.get('LOCAL_WORLD_SIZE')}. Give torchrun --nproc-per-node=1.",
            file=sys.stderr,
        )
        return 2
    rank, size = processes.rank(), processes.world_size()
    meeting, _, _ = next(iter(dist.rendezvous("env://", rank, size, timeout=timedelta(minutes=10))))
    if rank == 0:
        return lead(os.environ["MASTER_ADDR"], size, overrides, lambda place: meeting.set("machines", place))
    deadline = time.monotonic() + MEETING_SECONDS
    place = _wait(meeting, "machines", lambda: time.monotonic() > deadline)
    if not place:
        print(
            f"the first machine ({os.environ['MASTER_ADDR']}) has not begun in {MEETING_SECONDS:.0f} s", file=sys.stderr
        )
        return 1
    host, _, port = place.rpartition(":")
    follow(dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False), rank)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
