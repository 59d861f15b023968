"""What Python itself takes in a process that loads NeMo, at its start, in training and at its end, made less."""

import atexit
import contextlib
import gc
import importlib
import logging
import os
import sys
from collections.abc import Iterator
from types import ModuleType


def load(name: str) -> ModuleType:
    """Import a module with all that it brings along, without looking for garbage in between.

    Thousands of modules make objects that stay. To search them again and again is a quarter of the time that NeMo's
    import takes.
    """
    if name in sys.modules or not gc.isenabled():
        return importlib.import_module(name)
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.enable()


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """What is there now is not searched for garbage in the body.

    Megatron's distributed optimizer asks for a full search in each save of a checkpoint, which among the objects of
    NeMo's modules takes longer than the rest of a small save.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class QuickEnd:
    """Leaves a process once all that was to be done at its end is done, and does not take the interpreter apart.

    To free every module and object of a process that has loaded NeMo takes two seconds of a core, and what they held
    goes back to the system anyway. Threads are waited for and functions of atexit run as ever: those registered after
    this one, so it is made before anything else is imported. Without `code` the process ends as Python ends it.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        self.process = os.getpid()
        atexit.register(self._leave)

    def _leave(self) -> None:
        if self.code is None or os.getpid() != self.process:
            return
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):  # closed, or its reader has gone: Python's own end would say so
                return
        os._exit(self.code)
