"""Reductions over a vocabulary that is cut into shards, one per rank of a process group.

A shard's logits are (tokens, vocab / tp). Rank r's first column is token id `start`; columns from `vocab_size` on are
padding and are left out of all arithmetic, since -inf in their place gives 0 * (-inf + inf) = NaN. A shard may be all
padding. `group=None` is the unsharded case and runs the same code without collectives.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Shard:
    """Which part of the vocabulary this rank's columns are.

    start: token id of the first column; vocab_size: token ids in all, without padding; group: the ranks that together
    hold the vocabulary, None when this rank holds it alone.
    """

    start: int
    vocab_size: int
    group: ProcessGroup | None = None

    @property
    def world(self) -> int:
        """How many ranks hold the vocabulary."""
        return 1 if self.group is None else torch.distributed.get_world_size(self.group)

    def valid_width(self, width: int) -> int:
        """How many of `width` columns are vocabulary; the rest, at the end, is padding."""
        return max(0, min(width, self.vocab_size - self.start))

    def local_columns(self, labels: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """labels: (tokens,) token ids -> (column in this shard, clamped into it; whether the label is here at all)."""
        columns = labels - self.start
        here = (columns >= 0) & (columns < self.valid_width(width))
        return columns.clamp(0, max(0, width - 1)), here

    @classmethod
    def uniform(cls, width: int, vocab_size: int, group: ProcessGroup | None) -> "Shard":
        """The shard of this rank where every rank of `group` holds `width` columns, in the order of the ranks."""
        rank = 0 if group is None else torch.distributed.get_rank(group)
        return cls(rank * width, vocab_size, group)


def gather_over_shards(values: Tensor, shard: Shard) -> Tensor:
    """Every rank's `values`, of equal shapes, on every rank: (ranks, ...) in their order. One all-gather."""
    if shard.world == 1:
        return values.unsqueeze(0)
    gathered = values.new_empty(shard.world * values.shape[0], *values.shape[1:])
    torch.distributed.all_gather_into_tensor(gathered, values.contiguous(), group=shard.group)
    return gathered.view(shard.world, *values.shape)


def align_columns(logits: Tensor, width: int, vocab_size: int, group: ProcessGroup | None) -> Tensor:
    """Move columns between ranks so that each rank holds the token ids of a shard of `width` columns.

    For two models whose vocabularies are padded differently: (tokens, own width) -> (tokens, width), both cut
    uniformly over `group` in the order of the ranks. Columns from `vocab_size` on become 0. Carries no gradient. One
    all-to-all over `group`; none where the widths are equal already or the group is None.
    """
    own_width = logits.shape[1]
    if own_width == width:
        return logits
    rank, world = 0, 1
    if group is not None:
        rank, world = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    sent = [_overlap(rank, own_width, other, width, vocab_size) for other in range(world)]
    received = [_overlap(other, own_width, rank, width, vocab_size) for other in range(world)]
    aligned = logits.new_zeros(width, logits.shape[0])
    columns = logits.detach()[:, : sum(sent)].t().contiguous()
    if group is None:
        aligned[: sum(received)] = columns
    else:
        torch.distributed.all_to_all_single(aligned[: sum(received)], columns, received, sent, group=group)
    return aligned.t().contiguous()


def _overlap(source: int, source_width: int, target: int, target_width: int, vocab_size: int) -> int:
    """How many token ids lie both in the source rank's shard and in the target rank's."""
    start = max(source * source_width, target * target_width)
    stop = min((source + 1) * source_width, (target + 1) * target_width, vocab_size)
    return max(0, stop - start)
