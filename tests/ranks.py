"""A pool of gloo ranks that live as long as the test session: megatron is imported once per rank, not per test."""

import importlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import socket
import tempfile
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def _worker(rank: int, world: int, port: int, pipe: Connection, log: str, environment: dict[str, str]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **environment,
    }
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    while True:
        try:
            target, arguments = pipe.recv()
        except EOFError:
            # What this process started ends with it; taking an interpreter full of modules apart takes seconds.
            multiprocessing.util._exit_function()
            os._exit(0)
        try:
            module, function = target.split(":")
            result = getattr(importlib.import_module(module), function)(**arguments)
            pipe.send((True, result))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class RankPool:
    """`world` processes in one gloo group. A call runs `package.module:function(**arguments)` on all of them."""

    def __init__(self, world: int, environment: dict[str, str] | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self.log = Path(tempfile.mkdtemp(prefix="ranks-")) / "ranks.log"
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_worker, args=(rank, world, port, theirs, str(self.log), environment or {})
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def __call__(self, target: str, arguments: dict[str, Any], timeout: float) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((target, arguments))
        failures: list[str] = []
        results: list[Any] = [None] * len(self.pipes)
        waiting = dict(enumerate(self.pipes))
        while waiting:
            # After a first failure the others may wait in a collective for ever: give them only a moment.
            ready = multiprocessing.connection.wait(waiting.values(), timeout=5 if failures else timeout)
            if not ready:
                failures.append(f"ranks {sorted(waiting)} of {target} gave no answer; log: {self.log}")
                break
            for rank in [r for r, pipe in waiting.items() if pipe in ready]:
                try:
                    good, value = waiting.pop(rank).recv()
                except EOFError:
                    good, value = False, f"rank {rank} died; log: {self.log}"
                if good:
                    results[rank] = value
                else:
                    failures.append(f"rank {rank}:\n{value}")
        if failures:
            self.close()
            raise RuntimeError("\n".join(failures))
        return results

    def close(self) -> None:
        """Workers end by themselves where they can, so that what they started (a checkpoint's queue) ends too."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(timeout=10)
            process.kill()
            process.join()


class RankPools:
    """Pools by world size, started when first asked for and again after a failure; `environment` is added to theirs."""

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        self.environment = environment
        self.pools: dict[int, RankPool] = {}

    def __call__(self, world: int, target: str, timeout: float = 300, **arguments: Any) -> list[Any]:
        pool = self.pools.get(world) or self.pools.setdefault(world, RankPool(world, self.environment))
        try:
            return pool(target, arguments, timeout)
        except RuntimeError:
            del self.pools[world]
            raise

    def close(self) -> None:
        for pool in self.pools.values():
            pool.close()
