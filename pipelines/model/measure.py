"""Seconds and bytes of a piece of work: by the slowest rank's clock, and of the rank that holds most."""

import os
import platform
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from pipelines.core.products import onednn_linear

Work = Callable[[], object]
Result = TypeVar("Result")


class Unavailable(Exception):
    """Why something cannot be measured here."""


def seconds(work: Work, device: torch.device) -> float:
    """Seconds of `work()` on the slowest rank, on every rank. One barrier and one all-reduce of one number."""
    dist.barrier()
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return greatest(time.perf_counter() - start, device)


def seconds_in_turns(
    works: Mapping[str, Work],
    device: torch.device,
    *,
    rounds: int,
    warmup: int = 1,
    before: Callable[[str], object] = lambda name: None,
) -> dict[str, list[float]]:
    """`seconds` of each work, `rounds` times after `warmup` times that do not count; before(name): not timed.

    The works take turns, so that whatever else the machine does meets all alike.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(warmup + rounds):
        for name, work in works.items():
            before(name)
            elapsed = seconds(work, device)
            if turn >= warmup:
                found[name].append(elapsed)
    return found


def peak_bytes(work: Callable[[], Result], device: torch.device) -> tuple[int, Result]:
    """`peak_bytes_here` of the rank where it is largest, on every rank, and this rank's result: one all-reduce of one
    number."""
    peak, result = peak_bytes_here(work, device)
    return int(greatest(peak, device)), result


def peak_bytes_here(work: Callable[[], Result], device: torch.device) -> tuple[int, Result]:
    """The most bytes of tensors that `work()` holds at a time beyond those that were there before it, and its result.

    On a GPU by the caching allocator's own count; on a CPU from the profiler's record of every allocation.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, result
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, result


def matrix_ceiling(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s that a rank reaches in the product of two large square matrices while all ranks make theirs: what any work
    made of products can at most reach on this machine. By the faster of a CPU's libraries. Collective, see `seconds`.
    """
    size, products = (8192, 20) if device.type == "cuda" else (2048, 1)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    ways: list[Work] = [lambda: [torch.mm(left, right) for _ in range(products)]]
    onednn = device.type == "cpu" and torch.backends.mkldnn.is_available()
    if onednn and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        ways.append(lambda: onednn_linear(left, right))
    fastest = min(seconds(way, device) for _ in range(4) for way in ways)
    return 2 * size**3 * products / fastest


def resident_bytes() -> int:
    """Of this process, now, as Linux counts them."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def process_peak_bytes(device: torch.device, since: int = 0) -> int:
    """The most that a rank has held since it started: tensors on its GPU, or on a CPU the resident memory of the whole
    process (Linux counts it in KiB) beyond `since`, its `resident_bytes` at a moment. The largest rank's number, on
    every rank: one all-reduce of one number."""
    if device.type == "cuda":
        held = torch.cuda.max_memory_allocated(device)
    else:
        held = max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - since)
    return int(greatest(held, device))


def greatest(value: float, device: torch.device) -> float:
    """The largest of the ranks' values, on every rank."""
    number = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return float(number)


def fits(work: Work, device: torch.device) -> bool:
    """Whether `work()` fits into the memory of every rank's GPU: one all-reduce of one number.

    All ranks hold as much and run out at the same point: one that ran out alone would leave the others waiting.
    """
    failed = 0.0
    try:
        work()
    except torch.OutOfMemoryError:
        failed = 1.0
    if failed and device.type == "cuda":
        torch.cuda.empty_cache()
    return greatest(failed, device) == 0.0


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """What a rank computes on, in words."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor() or platform.machine()}"
