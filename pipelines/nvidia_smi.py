"""What nvidia-smi tells of a machine's GPUs: names, driver, memory errors. Imports no torch."""

import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass

TIMEOUT = 20  # seconds; a GPU that has fallen off the bus makes nvidia-smi wait


@dataclass(frozen=True)
class Gpu:
    """faults: what makes it unfit for work, in words; empty for a sound one. memory: bytes, None where it says none."""

    name: str
    faults: tuple[str, ...]
    memory: int | None = None


@dataclass(frozen=True)
class Report:
    """driver: its version, as 580.65.06. cuda: the newest CUDA that it runs, as (13, 0); None where it does not say."""

    driver: str
    cuda: tuple[int, int] | None
    gpus: tuple[Gpu, ...]


class Unanswered(Exception):
    """nvidia-smi is not there, or failed, or did not end."""


def read() -> Report:
    """One call of `nvidia-smi -q -x`. Raises Unanswered."""
    program = shutil.which("nvidia-smi")
    if program is None:
        raise Unanswered("no nvidia-smi on PATH")
    try:
        done = subprocess.run([program, "-q", "-x"], check=False, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise Unanswered(f"nvidia-smi, which gave no answer in {TIMEOUT} s") from None
    except OSError as error:
        raise Unanswered(f"an nvidia-smi that cannot be started: {error.strerror}") from None
    if done.returncode:
        words = (done.stdout + done.stderr).split()
        raise Unanswered(f"nvidia-smi with exit code {done.returncode}: {' '.join(words)[:200]}")
    return parse(done.stdout)


def parse(xml: str) -> Report:
    """xml: what `nvidia-smi -q -x` prints. Raises Unanswered where it is something else."""
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise Unanswered(f"nvidia-smi, whose answer is no XML: {error}") from None
    gpus = tuple(
        Gpu(_text(gpu, "product_name") or "a GPU", tuple(_faults(gpu)), _memory(gpu)) for gpu in root.iter("gpu")
    )
    major, _, minor = _text(root, "cuda_version").partition(".")
    cuda = (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
    return Report(_text(root, "driver_version"), cuda, gpus)


def smallest_memory() -> int | None:
    """Bytes of this machine's smallest GPU; None where nvidia-smi does not say. One call of it."""
    try:
        sizes = [gpu.memory for gpu in read().gpus if gpu.memory]
    except Unanswered:
        return None
    return min(sizes, default=None)


def _memory(gpu: ElementTree.Element) -> int | None:
    """From "81559 MiB"."""
    size, _, unit = _text(gpu, "fb_memory_usage/total").partition(" ")
    return int(size) << 20 if size.isdigit() and unit == "MiB" else None


def _faults(gpu: ElementTree.Element) -> list[str]:
    """Uncorrectable errors since the driver was loaded, and repairs that wait for a reset.

    Their names differ by generation: sram_uncorrectable, sram_uncorrectable_parity, dram_uncorrectable; before Ampere
    double_bit/total and retired pages. Corrected errors, and those of earlier days, harm nothing.
    """
    found = []
    errors = 0
    for entry in gpu.iterfind("ecc_errors/volatile//*"):
        text = (entry.text or "").strip()
        if "uncorrectable" in entry.tag and text.isdigit():
            errors += int(text)
    total = _text(gpu, "ecc_errors/volatile/double_bit/total")
    errors += int(total) if total.isdigit() else 0
    if errors:
        found.append(f"{errors} uncorrectable memory errors since the driver was loaded")
    for path, words in (
        ("remapped_rows/remapped_row_pending", "a row of memory to be remapped at the next reset"),
        ("remapped_rows/remapped_row_failure", "a row of memory that could not be remapped"),
        ("retired_pages/pending_retirement", "a page of memory to be retired at the next reset"),
        ("retired_pages/pending_blacklist", "a page of memory to be retired at the next reset"),
    ):
        if _text(gpu, path) == "Yes":
            found.append(words)
    return list(dict.fromkeys(found))


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()
