"""How many bytes a directory may still take: what the disk has, and what the user's quota leaves. Imports no torch."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

TIMEOUT = 8  # seconds; a quota server that is away makes the tools wait


@dataclass(frozen=True)
class Room:
    """free: bytes on the file system. quota: bytes that the user's quota leaves there; None where none is known."""

    free: int
    quota: int | None

    @property
    def least(self) -> int:
        return self.free if self.quota is None else min(self.free, self.quota)


def room(directory: Path) -> Room:
    """Of the file system that an existing directory is on.

    The quota comes from `lfs quota` on Lustre and from `quota` elsewhere, where those programs are there. Neither knows
    the quotas of directories that some sites set: there only a write tells.
    """
    status = os.statvfs(directory)
    return Room(status.f_bavail * status.f_frsize, _quota(directory))


def _quota(directory: Path) -> int | None:
    device, place, kind = mount_of(directory)
    user = str(os.getuid())
    if kind == "lustre":
        return left(_answer("lfs", "quota", "-q", "-u", user, place), place)
    return left(_answer("quota", "-w", "-p"), device)


def mount_of(directory: Path, mounts: str | None = None) -> tuple[str, str, str]:
    """(device, mount point, type) of the file system a directory is on; mounts: as /proc/mounts has them."""
    text = Path("/proc/mounts").read_text() if mounts is None else mounts
    found = ("", "/", "")
    place = directory.resolve()
    for line in text.splitlines():
        # A space in a path is written as an escape.
        device, point, kind = (field.replace("\\040", " ") for field in line.split(" ")[:3])
        if place.is_relative_to(point) and len(point) >= len(found[1]):
            found = (device, point, kind)
    return found


def left(answer: str, name: str) -> int | None:
    """Bytes that a quota leaves, from lines of name, KiB used, soft limit, hard limit; None where it sets no limit.

    Both tools print them so; a number over its limit ends in an asterisk, and a limit of 0 is none.
    """
    words = answer.split()
    if not name or name not in words:
        return None
    numbers = [word.rstrip("*") for word in words[words.index(name) + 1 :][:3]]
    if len(numbers) < 3 or not all(number.isdigit() for number in numbers):
        return None
    used, soft, hard = map(int, numbers)
    limit = hard or soft
    return max(0, limit - used) * 1024 if limit else None


def _answer(*command: str) -> str:
    """What a program prints; nothing where it is not there or gives no answer in time."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
