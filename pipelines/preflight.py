"""Whether a node is fit for work: `python -m pipelines.preflight`, in about a minute, before a job starts there.

Each check is one line: what it is of, what was found, what was expected, what to do. The exit code is 0, or 3 where a
check failed, so that a batch script can leave the node out. Imports no torch: only the processes that it starts for the
all-reduce do.
"""

import argparse
import functools
import importlib.util
import json
import math
import os
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines import nvidia_smi, quota
from pipelines.config import gpu_count
from pipelines.processes import environment_outside_ranks

UNFIT = 3  # the exit code of a node that failed a check
GIB = 2**30
SHARED_MEMORY = Path("/dev/shm")
INFINIBAND = Path("/sys/class/infiniband")
# Bytes of shared memory that NCCL and data loaders get by with; a container has 64 MiB unless it is told otherwise.
SHARED_BYTES = {"cuda": GIB, "cpu": 2**25}
REDUCED_BYTES = {"cuda": 2**28, "cpu": 2**22}
WRITTEN_BYTES = 2**24  # into the run's directory: enough to meet a quota that no tool tells of
SKEW = 60.0  # seconds; a lock counts as left behind after five minutes by the file server's clock (lock.py)
PATIENCE = 120.0  # seconds for the all-reduce, with eight imports of torch from a slow disk
FOR_CUDA = "Use a torch that is built for CUDA: another interpreter (cluster.python), or an image (cluster.image)."
LEAST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}  # by CUDA's major release, from its release notes


@dataclass(frozen=True)
class Check:
    """One finding in words. remedy: what to do; empty where nothing is to be done."""

    name: str
    good: bool
    found: str
    expected: str
    remedy: str = ""

    def line(self) -> str:
        end = "" if self.good else f". {self.remedy}"
        return (
            f"{'ok    ' if self.good else 'FAILED'}  {self.name:<13}  found {self.found}; expected {self.expected}{end}"
        )


@dataclass(frozen=True)
class Node:
    """What is asked of a node. gpus: how many it must have; None: what it has. free: bytes for its results."""

    gpus: int | None
    directory: Path
    free: int

    def processes(self) -> tuple[str, int]:
        """The device and the number of processes that a stage would run on here."""
        found = 0 if self.gpus == 0 else usable()
        return ("cuda", found) if found else ("cpu", 2)


def gpus(node: Node) -> Check:
    """As many as were asked for or more, as a whole node may bring, and a torch that can use them."""
    count = usable()
    expected = f"{node.gpus} or more" if node.gpus else "any number"
    present = _smi()
    named = "none" if not count else f"{count} GPUs"
    if isinstance(present, nvidia_smi.Report) and count:
        named = f"{count} x {', '.join(dict.fromkeys(gpu.name for gpu in present.gpus))}"
    if node.gpus and torch_cuda() is None:
        found = "a torch without CUDA" if importlib.util.find_spec("torch") else f"no torch for {sys.executable}"
        return Check("GPUs", False, found, f"{expected}, and a torch for them", FOR_CUDA)
    if node.gpus is None or count >= node.gpus:
        return Check("GPUs", True, named, expected)
    if isinstance(present, nvidia_smi.Report) and len(present.gpus) >= node.gpus > count:
        remedy = "Use a torch that is built for CUDA, and look at CUDA_VISIBLE_DEVICES."
        return Check("GPUs", False, f"{count} usable of {len(present.gpus)}", expected, remedy)
    why = f" ({present})" if isinstance(present, nvidia_smi.Unanswered) else ""
    remedy = "Ask for them in the job, start the container with --gpus all, or leave this node out."
    return Check("GPUs", False, named + why, expected, remedy)


def driver(node: Node) -> Check:
    """The NVIDIA driver against the CUDA that torch was built for.

    Within a major release every driver of that release or a later one serves (CUDA's minor version compatibility).
    """
    built = torch_cuda()
    if built is None:
        return Check("driver", True, "a torch without CUDA", "no driver")
    expected = f"one for CUDA {built[0]} ({LEAST_DRIVER.get(built[0], 'of the same year')} or newer)"
    present = _smi()
    if isinstance(present, nvidia_smi.Unanswered):
        wanted = bool(usable() if node.gpus is None else node.gpus)
        return Check("driver", not wanted, str(present), expected, "Install NVIDIA's driver, or leave this node out.")
    found = f"{present.driver}" + ("" if present.cuda is None else f" for CUDA {present.cuda[0]}.{present.cuda[1]}")
    if present.cuda is not None:
        good = present.cuda[0] >= built[0]
    else:
        good = _version(present.driver) >= _version(LEAST_DRIVER.get(built[0], "0"))
    return Check("driver", good, found, expected, "Update the driver, or use an image of an earlier CUDA.")


def memory_errors(node: Node) -> Check:
    """Every GPU that nvidia-smi shows, by its own count of ECC errors."""
    present = _smi()
    if isinstance(present, nvidia_smi.Unanswered):
        return Check("GPU memory", not usable(), str(present), "no uncorrectable errors", "Leave this node out.")
    faults = [f"GPU {number}: {fault}" for number, gpu in enumerate(present.gpus) for fault in gpu.faults]
    sound = f"none on {len(present.gpus)} GPUs"
    remedy = "Leave this node out until its GPUs were reset; have them replaced where that does not help."
    return Check("GPU memory", not faults, "; ".join(faults) or sound, "no uncorrectable errors", remedy)


def memory_lock(node: Node) -> Check:
    """InfiniBand pins memory: with a limit NCCL ends in 'ibv_reg_mr failed'. Without an adapter any limit serves."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit // 1024:,} KiB"
    adapters = sorted(path.name for path in INFINIBAND.iterdir()) if INFINIBAND.is_dir() else []
    expected = f"unlimited, with {', '.join(adapters)}" if adapters else "any, without InfiniBand"
    remedy = (
        "Set memlock to unlimited in /etc/security/limits.conf or slurmd's unit, or docker run --ulimit memlock=-1."
    )
    return Check("memory lock", not adapters or limit == resource.RLIM_INFINITY, found, expected, remedy)


def shared_memory(node: Node) -> Check:
    needed = SHARED_BYTES[node.processes()[0]]
    if not SHARED_MEMORY.is_dir():
        return Check("shared memory", False, f"no {SHARED_MEMORY}", _size(needed), "Mount a tmpfs there.")
    free = quota.room(SHARED_MEMORY).free
    remedy = "Start the container with --ipc=host or --shm-size=8g, or remove what earlier jobs left in /dev/shm."
    return Check("shared memory", free >= needed, f"{_size(free)} free", f"{_size(needed)} or more", remedy)


def disk(node: Node) -> Check:
    """Room by the file system and the user's quota; and that a write of some size comes back as it was."""
    expected = f"{_size(node.free)} free in {node.directory}"
    try:
        node.directory.mkdir(parents=True, exist_ok=True)
        _write_and_read(node.directory)
        room = quota.room(node.directory)
    except OSError as error:
        remedy = "Free some space there, or choose another run.directory that every node may write to."
        return Check("disk", False, f"{error}", expected, remedy)
    found = f"{_size(room.free)} free" + ("" if room.quota is None else f", {_size(room.quota)} left of the quota")
    return Check("disk", room.least >= node.free, found, expected, "Free some space, or choose another run.directory.")


def _write_and_read(directory: Path) -> None:
    content = os.urandom(WRITTEN_BYTES)
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".preflight-") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        if file.read() != content:
            raise OSError(f"{directory}: what was written comes back changed")


def clock(node: Node) -> Check:
    """This node's clock against the file server's, which dates the files of all nodes."""
    expected = f"at most {SKEW:.0f} s from that of {node.directory}"
    try:
        with tempfile.NamedTemporaryFile(dir=node.directory, prefix=".preflight-") as file:
            file.write(b"now")
            file.flush()
            os.fsync(file.fileno())
            skew = abs(time.time() - os.stat(file.name).st_mtime)
    except OSError as error:
        return Check("clock", False, f"{error}", expected, "Choose another run.directory.")
    return Check("clock", skew <= SKEW, f"{skew:.1f} s", expected, "Start the node's time service.")


def all_reduce(node: Node) -> Check:
    """One process per GPU, or two on a node without; every result is compared, and the fastest link told."""
    device, processes = node.processes()
    what = f"{processes} {'GPUs' if device == 'cuda' else 'processes'}"
    expected = f"the right sums from {what} within {PATIENCE:.0f} s"
    remedy = "Look at the node's NVLink and PCIe (nvidia-smi topo -m, dmesg), or leave it out."
    with tempfile.TemporaryDirectory(prefix="stillhouse-") as place:
        outcome = exchanged(device, processes, Path(place), ["all_reduce"], [REDUCED_BYTES[device]], PATIENCE)
    if isinstance(outcome, str):
        return Check("all-reduce", False, outcome, expected, remedy)
    rate = f"{outcome[0]['bytes_per_second'] / 1e9:,.1f} GB/s over {_size(REDUCED_BYTES[device])}"
    return Check("all-reduce", True, f"{what}, {rate}", expected)


def exchanged(
    device: str, processes: int, place: Path, kinds: list[str], sizes: list[int], patience: float
) -> list[dict[str, Any]] | str:
    """What collectives.py measured over processes of this machine, or what went wrong in words.

    place: a directory of this call's own. sizes: bytes. patience: seconds.
    """
    environment = environment_outside_ranks() | {"OMP_NUM_THREADS": "1"}
    environment |= {"GLOO_SOCKET_IFNAME": "lo"} if device == "cpu" else {}
    children = []
    for rank in range(processes):
        arguments = [device, str(rank), str(processes), str(place / "meeting")]
        arguments += [",".join(kinds), ",".join(map(str, sizes)), str(place / "answer")]
        with open(place / f"{rank}.err", "w") as errors:
            children.append(
                subprocess.Popen(
                    [sys.executable, "-m", "pipelines.model.collectives", *arguments],
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                )
            )
    try:
        deadline = time.monotonic() + patience
        while any(child.poll() is None for child in children) and not any(child.poll() for child in children):
            if time.monotonic() > deadline:
                return f"no answer after {patience:.0f} s"
            time.sleep(0.05)
        for rank, child in enumerate(children):
            if child.poll():
                lines = (place / f"{rank}.err").read_text(errors="replace").strip().splitlines()
                return f"process {rank} ended with {child.returncode}: {lines[-1] if lines else 'no word'}"
        answer: list[dict[str, Any]] = json.loads((place / "answer").read_text())
        return answer
    finally:
        for child in children:
            child.kill()
            child.wait()


CHECKS: tuple[Callable[[Node], Check], ...] = (
    gpus,
    driver,
    memory_errors,
    memory_lock,
    shared_memory,
    disk,
    clock,
    all_reduce,
)


def torch_cuda() -> tuple[int, int] | None:
    """The CUDA that the installed torch was built for, read from its files; None for a build without, and no torch."""
    found = importlib.util.find_spec("torch")
    file = Path(found.origin).parent / "version.py" if found and found.origin else None
    text = file.read_text() if file and file.is_file() else ""
    version = re.search(r"^cuda\b[^=]*=\s*['\"](\d+)\.(\d+)", text, re.M)
    return (int(version[1]), int(version[2])) if version else None


@functools.cache
def _smi() -> nvidia_smi.Report | nvidia_smi.Unanswered:
    """nvidia-smi's answer, asked once."""
    try:
        return nvidia_smi.read()
    except nvidia_smi.Unanswered as reason:
        return reason


def usable() -> int:
    """GPUs that a stage would run on here; none where nvidia-smi, which may have to be asked, gives no answer."""
    try:
        return gpu_count()
    except subprocess.TimeoutExpired:
        return 0


def _version(text: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", text)]


def _size(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / 2**20:,.0f} MiB"


def _not_negative(kind: Callable[[str], float]) -> Callable[[str], float]:
    """Of a number on the command line."""

    def number(text: str) -> float:
        if not 0 <= (value := kind(text)) < math.inf:
            raise argparse.ArgumentTypeError(f"expected 0 or more, found {text}")
        return value

    number.__name__ = kind.__name__  # in argparse's own message for what is no number
    return number


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, UNFIT, or 2 for arguments that say nothing sensible."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.preflight", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument(
        "--gpus", type=_not_negative(int), help="GPUs that the node must have; left out: those that it has"
    )
    parser.add_argument("--directory", type=Path, default=Path("runs"), help="where the run is written (runs)")
    parser.add_argument("--free-gib", type=_not_negative(float), default=10.0, help="GiB that must be free there (10)")
    given = parser.parse_args(arguments)
    node = Node(given.gpus, given.directory, int(given.free_gib * GIB))
    started = time.monotonic()
    checks = []
    for check in CHECKS:
        checks.append(check(node))
        if not given.json:
            print(f"{socket.gethostname()}  {checks[-1].line()}", flush=True)
    fit = all(check.good for check in checks)
    if given.json:
        seconds = round(time.monotonic() - started, 1)
        answer = {"host": socket.gethostname(), "fit": fit, "seconds": seconds, "checks": list(map(asdict, checks))}
        print(json.dumps(answer, indent=2))
    return 0 if fit else UNFIT


if __name__ == "__main__":
    sys.exit(main())
