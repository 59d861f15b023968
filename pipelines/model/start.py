"""A name for one start of the ranks of several nodes, which their environment need not tell from the one before."""

import functools
import os
import uuid
from datetime import timedelta

from torch.distributed import TCPStore

from pipelines import console


@functools.cache
def name() -> str:
    """The same on every rank that torchruns have started together, and new at each start.

    Rank 0 draws it, the others wait for it, at most half an hour, at torchrun's own store, which ends with the start.
    No collective: the process group is not there yet.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(minutes=30))
    key = f"stillhouse-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}"
    if console.rank() == 0:
        store.set(key, uuid.uuid4().hex)
    return str(store.get(key).decode())
