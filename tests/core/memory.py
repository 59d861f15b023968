"""Peak memory of a piece of work on the CPU: the profiler's allocations, or what Linux counts as the process's."""

import gc
import re
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], None]) -> int:
    """The most bytes that `work` held at once beyond those it found; it is run once before."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def peak_resident_bytes(work: Callable[[], object]) -> int:
    """The most that this process held in memory beyond what it found, pages of mapped files among it; `work` is run
    once before."""
    work()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert found, name
    return 1024 * int(found[1])
