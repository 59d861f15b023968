"""Files written whole or not at all, and their hashes. Imports no torch."""

import errno
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any

from pipelines import console
from pipelines.config import UserError
from pipelines.failures import of_the_machine

SMALL = 1 << 20  # bytes: below, a file is hashed at every look and needs no sidecar
_BLOCK = 1 << 24  # bytes read at a time
LARGE = 1 << 30  # bytes: above, hashing takes seconds and is told
COMPLETE, MANIFEST = "complete", "manifest.json"
_NO_ROOM = re.compile(r"(No space left on device|Disk quota exceeded|File too large)(: '[^'\n]*')?")
BOOKKEEPING = (
    COMPLETE,
    MANIFEST,
    "config.yaml",
    "gates.json",
    "lock",
    "checkpoints",
    "tensorboard",
    "data_index",
    "logs",
    "trackers.json",
)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write a file so that a reader, or a reader after a crash, sees the old content or the new, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def read_json(path: Path, remedy: str = "Copy it again.") -> Any:
    """The content of a JSON file. Raises UserError where it is none; OSError where the file system has failed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        found = f"an error at line {error.lineno}: {error.msg}"
        if path.stat().st_size == 0:
            found = "an empty file"
    except UnicodeDecodeError:
        found = "bytes that are no UTF-8 text"
    except RecursionError:
        found = "values nested too deeply"
    except OSError as error:
        if of_the_machine(error):
            raise
        found = f"a file that cannot be read: {error.strerror}"
    raise UserError(f"{path}: expected JSON, found {found}. {remedy}")


def read_object(path: Path, remedy: str = "Copy it again.") -> dict[str, Any]:
    """The names and values of a JSON file that holds one object. Raises UserError where it is none."""
    content = read_json(path, remedy)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}. {remedy}")
    return content


def write_json(path: str | Path, data: Any) -> None:
    write_atomic(path, json.dumps(data, indent=2, default=plain) + "\n")


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """A second name for a file, or a copy where the file system has none or it is another one. Raises FileNotFoundError
    where the source is gone."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copy2(source, target)


def sync_files(paths: Iterable[Path]) -> None:
    """Make files, and their names in their directories, survive a power cut. They may have been written elsewhere."""
    directories = set()
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        directories.add(path.parent)
    for directory in sorted(directories):
        sync_directory(directory)


def crc32(path: Path) -> int:
    """Some 3 GB/s, three times as fast as SHA-256: made for accidents, which is what damages a checkpoint."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def sync_directory(path: Path) -> None:
    """Make renames and new names in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """Build a directory as <path>.partial and give it its name at the end; a leftover of a killed attempt is removed.

    Every file is synced before the rename. On an error the part that was written is removed and `path` is as before.
    """
    path = Path(path)
    partial, old = path.with_name(path.name + ".partial"), path.with_name(path.name + ".old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        sync_files(content(partial))
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.rename(path, old)
        os.rename(partial, path)
        sync_directory(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def file_hash(path: Path, sidecars: Path) -> str:
    """sha256 of a file. A large one is read once; its hash lies in `sidecars` beside the size and time it holds for."""
    status = path.stat()
    sidecar = sidecars / (hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32] + ".json")
    key = {"path": str(path.resolve()), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    if status.st_size > SMALL:
        with suppress(OSError, json.JSONDecodeError):
            known = json.loads(sidecar.read_text())
            if {name: known.get(name) for name in key} == key:
                return str(known["sha256"])
    if status.st_size > LARGE:
        console.say(f"hashing {path} once, {status.st_size / 1e9:.1f} GB")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    if status.st_size > SMALL:
        sidecars.mkdir(parents=True, exist_ok=True)
        write_json(sidecar, {**key, "sha256": digest.hexdigest()})
    return digest.hexdigest()


def content(path: Path) -> list[Path]:
    """The files of a directory that count as content; a file itself; the two files of a Megatron prefix."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        return [p for suffix in (".bin", ".idx") if (p := path.with_name(path.name + suffix)).is_file()]
    found = []
    for directory, names, files in os.walk(path, followlinks=True):
        here = Path(directory)
        skipped = [
            n for n in names if n.startswith(".") or n.endswith((".partial", ".old")) or _is_bookkeeping(here / n, path)
        ]
        names[:] = sorted(set(names) - set(skipped))
        found += [here / f for f in sorted(files) if not f.startswith(".") and not _is_bookkeeping(here / f, path)]
    return found


def _is_bookkeeping(path: Path, root: Path) -> bool:
    """Bookkeeping and training state at the top of a stage's own directory, also `checkpoints.<date>`."""
    if path.parent != root or not (root / MANIFEST).is_file():
        return False
    return any(path.name == name or path.name.startswith(name + ".") for name in BOOKKEEPING)


def fingerprint(path: Path, sidecars: Path) -> dict[str, str]:
    """{relative path: sha256} of what lies at a path."""
    root = path if path.is_dir() else path.parent
    return {str(file.relative_to(root)): file_hash(file, sidecars) for file in content(path)}


def is_disk_error(error: BaseException) -> bool:
    """Whether an error says that nothing more can be written: disk full, quota, file size limit."""
    return bool(disk_error(error))


def disk_error(error: BaseException | None) -> str:
    """What an error, or what it came from, says of a disk that takes nothing more, in a few words; empty for others."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return str(error)
        if told := _NO_ROOM.search(str(error)):
            return told[0]
        if "inline_container" in str(error) and "unexpected pos" in str(error):
            # torch's writer of archives, which keeps the system's own words to itself
            return "a file could not be written to its end"
        error = error.__cause__ or error.__context__
    return ""
