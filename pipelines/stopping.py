"""Stopping as asked, before the time is up: who asks, and what is left for those who started us. Imports no torch.

A run is asked to stop by a file, whose path is in STILLHOUSE_STOP_FILE, once it is there; or by SIGUSR1, sent to the
command itself or to a rank that another launcher started (torchrun passes no such signal on, and dies of it). Ranks
that train agree on it in the next step, write a checkpoint of that step, and every process ends with EXIT_STOPPED: the
same command continues. Whoever starts ranks by torchrun, which returns 1 whatever its ranks return, finds the reason
of the end in the file whose path is in STILLHOUSE_VERDICT.
"""

import json
import os
import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType

STOP_FILE = "STILLHOUSE_STOP_FILE"  # environment variable: a path; once a file is there, the run stops
GRACE = "STILLHOUSE_GRACE_SECONDS"  # environment variable: how long after being asked to stop processes may go on
VERDICT = "STILLHOUSE_VERDICT"  # environment variable: a path, to which the reason of an end other than 0 is written
EXCHANGE = "STILLHOUSE_EXCHANGE"  # environment variable: the directory where parent and ranks leave each other word
EXIT_STOPPED = 75  # stopped as asked, and what was done is kept; the same command continues (EX_TEMPFAIL)
_MISTAKE = 2

_received = False  # SIGUSR1, in this process


class Stopped(Exception):
    """The run ends here because it was asked to. What was done is kept; the same command continues."""


def asked() -> bool:
    """Whether this process was asked to stop, directly or by a file. Ranks may see it at different moments."""
    if _received:
        return True
    given = [os.environ.get(STOP_FILE)]
    if EXCHANGE in os.environ:
        given.append(str(told_by_parent(Path(os.environ[EXCHANGE]))))
    return any(path and os.path.exists(path) for path in given)


def told_by_parent(exchange: Path) -> Path:
    """The file that a parent makes for the processes it has started."""
    return exchange / "stop"


def listen(exchange: Path | None = None) -> None:
    """From here on SIGUSR1 asks this process to stop, and those too that it has started with this exchange directory.
    In the main thread."""

    def receive(number: int, frame: FrameType | None) -> None:
        global _received
        _received = True
        if exchange is not None:
            with suppress(OSError):
                told_by_parent(exchange).touch()

    signal.signal(signal.SIGUSR1, receive)


def leave_verdict(code: int, message: str, stage: str) -> None:
    """Write {"code", "message", "stage"} where STILLHOUSE_VERDICT says; nothing without it.

    Of several processes the first one's stays; but a stop and a user's mistake come before what follows from them.
    """
    if not os.environ.get(VERDICT):
        return
    path = Path(os.environ[VERDICT])
    temporary = path.with_name(f".{path.name}.{os.environ.get('RANK', '0')}.{os.getpid()}.partial")
    with suppress(OSError):
        temporary.write_text(json.dumps({"code": code, "message": message, "stage": stage}) + "\n")
        try:
            os.link(temporary, path)  # whole, and by one process alone
        except FileExistsError:
            decided = json.loads(path.read_text())["code"] in (EXIT_STOPPED, _MISTAKE)
            if code in (EXIT_STOPPED, _MISTAKE) and not decided:
                os.replace(temporary, path)
        except OSError:  # a file system without second names
            if not path.exists() or code in (EXIT_STOPPED, _MISTAKE):
                os.replace(temporary, path)
    with suppress(OSError):
        temporary.unlink(missing_ok=True)
