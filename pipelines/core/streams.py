"""Hidden states into chunks and their gradients back, over the ranks that share the work, while others compute."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from pipelines.core.vocab_parallel import Shard


class Rows:
    """The hidden states of one model by chunks. With a group each rank holds its own tokens, and a chunk is gathered
    from all of them: (ranks * tokens per rank, hidden), one all-gather per chunk, one chunk ahead."""

    def __init__(self, hidden: Tensor, bounds: list[slice], group: ProcessGroup | None) -> None:
        """hidden: (tokens of this rank, hidden size). bounds: each chunk's tokens among them."""
        self.hidden, self.bounds, self.group = hidden, bounds, group
        self.next: tuple[Tensor, Tensor, torch.distributed.Work] | None = None
        if group is not None and bounds:
            self._start(0)

    def take(self, index: int) -> Tensor:
        """Chunk `index`; chunks are taken in order, each once. Starts the gathering of the one after."""
        if self.group is None:
            return self.hidden[self.bounds[index]]
        assert self.next is not None
        gathered, _, work = self.next
        work.wait()
        self.next = None
        if index + 1 < len(self.bounds):
            self._start(index + 1)
        return gathered

    def _start(self, index: int) -> None:
        own = self.hidden[self.bounds[index]].contiguous()
        gathered = own.new_empty(torch.distributed.get_world_size(self.group) * own.shape[0], own.shape[1])
        work = torch.distributed.all_gather_into_tensor(gathered, own, group=self.group, async_op=True)
        self.next = gathered, own, work


class Gradients:
    """The gradient of the hidden states, chunk by chunk: each rank's share of the vocabulary gives a part of the sum.

    One all-reduce per chunk, or one reduce-scatter under sequence parallelism; each is waited for when the next begins.
    """

    def __init__(self, total: Tensor, bounds: list[slice], shard: Shard, sequence_parallel: bool) -> None:
        """total: (tokens of this rank, hidden size), written chunk by chunk."""
        self.total, self.bounds, self.group = total, bounds, shard.group if shard.world > 1 else None
        self.sequence_parallel = sequence_parallel
        self.pending: tuple[Tensor, torch.distributed.Work] | None = None

    def add(self, index: int, part: Tensor) -> None:
        """part: (tokens of the chunk over all ranks, hidden size), this rank's addend."""
        target = self.total[self.bounds[index]]
        if self.group is None:
            target.copy_(part)
            return
        self.finish()
        if self.sequence_parallel:
            work = torch.distributed.reduce_scatter_tensor(target, part, group=self.group, async_op=True)
        else:
            target.copy_(part)
            work = torch.distributed.all_reduce(target, group=self.group, async_op=True)
        self.pending = part, work

    def finish(self) -> None:
        """Wait for what is under way."""
        if self.pending is not None:
            self.pending[1].wait()
            self.pending = None
