"""Whether a checkpoint has room on its disk, told before it is begun."""

import ctypes
import errno
import os
from pathlib import Path

import torch
from megatron.core import parallel_state

from pipelines.config import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def refuse_without_room(directory: Path, needed: int) -> None:
    """Raises UserError where the file system has no room for so many bytes, or the user's quota takes no more."""
    if found := missing(directory, needed):
        raise UserError(
            f"{directory}: expected room for a checkpoint of about {needed / 1e6:,.1f} MB, found {found}. Nothing "
            "was written. Free some space and start the same command again; it continues from the last checkpoint."
        )


def missing(directory: Path, needed: int) -> str:
    """Why so many bytes cannot be written there; empty where they can, or where the file system does not tell."""
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    if free < needed:
        return f"{free / 1e6:,.1f} MB free"
    # A quota is in no figure that every file system has: room is asked for, and given back at once. The file has lost
    # its name by then, so that a kill leaves nothing.
    path = directory / f".room-{os.getpid()}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        path.unlink()
        code = _reserve(descriptor, needed)
    finally:
        os.close(descriptor)
    return f"that its file system gives no such room: {os.strerror(code)}" if code in _FULL else ""


def _reserve(descriptor: int, size: int) -> int:
    """0, or the error number. Linux's own call: that of the C library writes zeros where the file system has none."""
    try:
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    except (OSError, AttributeError):
        return errno.ENOSYS
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]
    return ctypes.get_errno() if fallocate(descriptor, 0, 0, max(size, 1)) else 0


def trained_values(module: torch.nn.Module) -> int:
    """How many numbers are trained, over all shards.

    One SUM all-reduce over the tensor and pipeline ranks; weights that each of them has are counted as often.
    """
    own = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    total = torch.tensor([own], dtype=torch.int64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return int(total.item())
