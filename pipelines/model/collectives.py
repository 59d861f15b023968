"""The collectives that training uses, tried and timed: that they are right, and how many bytes per second they move.

`python -m pipelines.model.collectives` is one process of a node's own check, which preflight.py starts; stage=accept
measures all of them. torch alone: a node is checked before anything heavier is loaded there.
"""

import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from pipelines import processes
from pipelines.model import measure

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "send_recv")


@dataclass(frozen=True)
class Bandwidth:
    """bytes: of the whole tensor. seconds: the median, on the slowest rank. bytes_per_second: what the slowest link of
    the group must have carried ("bus bandwidth"): all_reduce 2 (n - 1) / n times the bytes over the seconds,
    all_gather and reduce_scatter (n - 1) / n, send_recv 1."""

    kind: str
    bytes: int
    ranks: int
    seconds: float
    bytes_per_second: float


class WrongResult(Exception):
    """A collective returned something else than what went in."""


def bandwidth(kind: str, size: int, device: torch.device, *, rounds: int = 5, warmup: int = 2) -> Bandwidth:
    """Over all ranks, of fp32 tensors of about `size` bytes in all (rounded to the ranks). Collective.

    The result of each kind is compared with what it must be before it is timed: WrongResult on every rank that differs.
    """
    ranks = dist.get_world_size()
    numbers = max(1, size // 4 // ranks) * ranks
    work, check = _prepared(kind, numbers, device)
    work()
    check()
    times = [measure.seconds(work, device) for _ in range(warmup + rounds)][warmup:]
    seconds = statistics.median(times)
    factor = {"all_reduce": 2 * (ranks - 1) / ranks, "send_recv": 1.0}.get(kind, (ranks - 1) / ranks)
    return Bandwidth(kind, 4 * numbers, ranks, seconds, factor * 4 * numbers / seconds)


def _prepared(kind: str, numbers: int, device: torch.device) -> tuple[Callable[[], object], Callable[[], None]]:
    """The collective over tensors that lie ready, and the check of its result after the first call."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    part = numbers // ranks
    if kind == "all_reduce":
        # The sum is the same for every rank, and whole numbers this small are exact in fp32. One call adds once.
        whole = torch.full((numbers,), rank + 1.0, device=device)
        return lambda: dist.all_reduce(whole), lambda: _expect(kind, whole, ranks * (ranks + 1) / 2)
    if kind == "all_gather":
        own = torch.full((part,), float(rank), device=device)
        gathered = torch.empty(numbers, device=device)
        expected = torch.arange(ranks, device=device).float().repeat_interleave(part)
        return lambda: dist.all_gather_into_tensor(gathered, own), lambda: _expect(kind, gathered, expected)
    if kind == "reduce_scatter":
        whole = torch.full((numbers,), rank + 1.0, device=device)
        own = torch.empty(part, device=device)
        return lambda: dist.reduce_scatter_tensor(own, whole), lambda: _expect(kind, own, ranks * (ranks + 1) / 2)
    assert kind == "send_recv", kind
    sent = torch.full((numbers,), float(rank), device=device)
    received = torch.empty(numbers, device=device)
    after, before = (rank + 1) % ranks, (rank - 1) % ranks

    def ring() -> None:
        operations = [dist.P2POp(dist.isend, sent, after), dist.P2POp(dist.irecv, received, before)]
        for request in dist.batch_isend_irecv(operations):
            request.wait()

    return ring, lambda: _expect(kind, received, float(before))


def _expect(kind: str, found: torch.Tensor, expected: torch.Tensor | float) -> None:
    wrong = int((found != expected).sum())
    if wrong:
        raise WrongResult(f"{kind}: {wrong:,} of {found.numel():,} numbers are wrong on rank {dist.get_rank()}")


def main(arguments: list[str]) -> None:
    """Arguments: cuda or cpu, this process's number, how many there are, a file to meet at, kinds, bytes (both with
    commas), a file for the answer, a JSON list of Bandwidth: NCCL writes its own lines to the standard output. Over the
    processes of one machine; without the second to the fourth argument over all that torchrun has started.
    """
    device_type, *place, kinds, sizes, answer = arguments
    if place:
        rank, ranks, meeting = place[0], place[1], f"file://{place[2]}"
        local = int(rank)
    else:
        rank, ranks, meeting = str(processes.rank()), str(processes.world_size()), "env://"
        local = processes.local_rank()
    if device_type == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        init_method=meeting,
        rank=int(rank),
        world_size=int(ranks),
        timeout=timedelta(seconds=60),
    )
    device = torch.device("cpu") if device_type == "cpu" else torch.device("cuda", local)
    found = [bandwidth(kind, int(size), device) for kind in kinds.split(",") for size in sizes.split(",")]
    if int(rank) == 0:
        Path(answer).write_text(json.dumps([asdict(one) for one in found]))
    sys.stdout.flush()
    # Taking NCCL apart can wait for a peer that has gone already.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
