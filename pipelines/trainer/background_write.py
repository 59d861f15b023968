"""A checkpoint's files written by a thread of this rank, while the training goes on.

NeMo and Megatron plan a checkpoint with collectives, write its files without any, and record with collectives what was
written. `HeldBack` keeps the last two back. `Write` does the writing in a thread, from copies in host memory, and
leaves the collectives to the main thread: gloo and nccl take none from two threads at once.
"""

import queue
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO

from pipelines import files


class HeldBack(_WrappingCheckpointIO):
    """NeMo's reading and planning of checkpoints, without the writing."""

    def __init__(self, checkpoint_io: Any) -> None:
        super().__init__(checkpoint_io)
        self._request: Any = None
        checkpoint_io.async_save = True  # it returns its request in place of carrying it out

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        assert self.checkpoint_io is not None
        self._request = self.checkpoint_io.save_checkpoint(*args, **kwargs)  # type: ignore[func-returns-value]

    def take(self) -> Any:
        """Megatron's request of the last save, which holds its tensors: nothing else keeps it."""
        request, self._request = self._request, None
        return request


class Write:
    """This rank's files of one checkpoint in `directory`, being written from the moment of its making.

    What the request holds is in host memory then: a GPU's tensors in pinned memory, copied one after the other without
    a wait between them; the CPU's are cloned where `copies`, since an optimizer changes them in place. Each file is
    synced to disk and summed as well. torch keeps pinned memory for the next save, each tensor's rounded up to a power
    of two bytes: it does not go back to the system between saves.

    written: {path relative to directory: (bytes, CRC-32)}. error: a traceback, empty where none failed. seconds: what
    it took. They hold once `wait` has returned.
    """

    def __init__(self, request: Any, directory: Path, *, copies: bool) -> None:
        self.request, self.directory = request, directory
        self.written: dict[str, tuple[int, int]] = {}
        self.error, self.seconds = "", 0.0
        self._found: Any = None  # what Megatron is to record
        self.arguments = list(request.async_fn_args)
        for _, _, (_, tensors) in self._buckets():
            for number, (item, tensor) in enumerate(tensors):
                if tensor.device.type != "cpu":
                    tensors[number] = item, tensor.to("cpu", non_blocking=True)  # which torch pins
                elif copies:
                    tensors[number] = item, tensor.clone()
        torch.cuda.synchronize()
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self.thread.start()

    def _buckets(self) -> list[Any]:
        """Megatron's: (path, name, ([(item, bytes)], [(item, tensor)])) of each file; none where this rank has none."""
        return self.arguments[1] if self.arguments else []

    def goes_on(self) -> bool:
        return self.thread.is_alive()

    def wait(self, seconds: float | None = None) -> None:
        """Until the files are written, or so many seconds."""
        self.thread.join(seconds)

    def _run(self) -> None:
        started = time.monotonic()
        try:
            if self._buckets():
                rank, buckets, _ = self.arguments
                own: Any = queue.SimpleQueue()
                self.request.async_fn(rank, buckets, own)
                found = own.get_nowait()
                if isinstance(found, Exception):
                    raise found
                self._found = found
            paths = [Path(path) for path, _, _ in self._buckets()]
            files.sync_files(paths)
            for path in paths:
                self.written[str(path.relative_to(self.directory))] = path.stat().st_size, files.crc32(path)
        except BaseException:
            self.error = traceback.format_exc()
        self.seconds = time.monotonic() - started

    def record(self) -> None:
        """Write what all files are into the directory. Every rank calls it, in its main thread, once all have ended.

        Megatron's collectives: a gather, a broadcast, and a barrier.
        """
        if self._found is not None:
            # Not before: Megatron's queue is one for all saves of the process, and takes out what was put in first.
            self.arguments[2].put(self._found)
        for finalize in self.request.finalize_fns:
            finalize()
