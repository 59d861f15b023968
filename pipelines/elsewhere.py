"""Settings that are checked for other machines than this one: a login node composes what compute nodes will run.

Within `checked_for` the number of processes, the GPUs and the packages are those of the nodes. Imports no torch.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Nodes:
    """The machines of one stage. processes: on all of them; gpus: of each; image: whether they run a container, whose
    packages are not this machine's."""

    processes: int
    gpus: int
    image: bool


_nodes: ContextVar[Nodes | None] = ContextVar("nodes", default=None)


@contextmanager
def checked_for(nodes: Nodes) -> Iterator[None]:
    token = _nodes.set(nodes)
    try:
        yield
    finally:
        _nodes.reset(token)


def gpus() -> int | None:
    """GPUs of each node; None where settings are for this machine."""
    nodes = _nodes.get()
    return None if nodes is None else nodes.gpus


def started_processes() -> int | None:
    """The processes of a job that is started already (WORLD_SIZE), or will be; None where there is no job."""
    if nodes := _nodes.get():
        return nodes.processes
    return int(os.environ["WORLD_SIZE"]) if os.environ.get("WORLD_SIZE") else None


def installed(module: str) -> bool:
    """Whether a package is there. One of an image counts as there: a job finds otherwise in its first seconds."""
    nodes = _nodes.get()
    return (nodes is not None and nodes.image) or importlib.util.find_spec(module) is not None


def in_image() -> bool:
    nodes = _nodes.get()
    return nodes is not None and nodes.image
