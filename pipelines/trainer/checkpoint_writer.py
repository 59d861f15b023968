"""Megatron's checkpoint files written by threads of this process, where Megatron-Core 0.15 forks a process per file.

A rank has threads already (gloo's or nccl's, TensorBoard's, torch's own). A process forked from it holds their locks
without the threads that would release them, so a save could wait for ever, on every rank, once in many; under memory
limits the fork itself fails. Megatron has since turned to threads as well (NVIDIA/Megatron-LM, pull requests 3424 and
3633). `install` is called before a checkpoint is saved; importing this module does nothing.
"""

import inspect
import queue
import threading
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync


def install() -> None:
    """Idempotent. Results stay in this process."""
    FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write)
    if filesystem_async._results_queue is None:
        # Megatron's own lives in one more process for each rank.
        filesystem_async._results_queue = queue.SimpleQueue()


def _write(transform_list: Any, use_msc: bool, rank: int, write_buckets: list[Any], global_results_queue: Any) -> None:
    """As the method it replaces: puts {index of file: results} or the first exception into global_results_queue."""
    results: Any = queue.SimpleQueue()
    counts: Any = queue.Queue()  # of the files begun; nobody waits for it here
    options = {"results_queue": results, "count_queue": counts, "use_fsync": True}
    if use_msc:
        options["use_msc"] = True

    # Megatron switches Python's garbage collection off meanwhile, for its forks' sake: here a training goes on.
    file_of = inspect.unwrap(FileSystemWriterAsync.write_preloaded_data)

    def write(index: int) -> None:
        counts.put(index)
        file_of(transform_list, local_proc_idx=index, write_bucket=write_buckets[index], **options)

    # Not a pool's, for which Python waits at its end: a process that ends in an error leaves its save behind.
    threads = [threading.Thread(target=write, args=(index,), daemon=True) for index in range(len(write_buckets))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = dict(results.get_nowait() for _ in write_buckets)
    failures = [result for result in found.values() if isinstance(result, Exception)]
    global_results_queue.put(failures[0] if failures else found)
