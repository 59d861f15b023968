"""Which columns of a chunk's gradient are worth computing: blocks in which some probability is large or a label lies.

Left out of a token's gradient into the logits is, in L1 norm, at most

    |weight| * (kd_scale / T * (p' + q') + ce_scale * q')

with p' and q' both models' mass on the columns left out: there g - q * sum g lies between -p - q and p + q for forward
KL (q - p exactly), skew KL (0 <= -g <= p and -1 <= sum g <= 0), total variation (|g| <= q / 2) and JSD (since
x log(1 / x) <= 1 / e at x = q / m). Reverse KL has no such bound: log q - log p is any size.
"""

import math

import torch
from torch import Tensor

from pipelines.core.chunk import Chunk, Normalizers
from pipelines.core.vocab_parallel import Shard

BLOCK = 512  # columns


def live_columns(chunk: Chunk, normal: Normalizers, labels: Tensor | None, shard: Shard, bound: float) -> list[slice]:
    """The columns of this rank that stay, in order, as slices of whole blocks: all tokens of the chunk share them.

    A block goes where every probability of both models is below `bound` for every token and no label lies. One
    synchronization with the host.
    """
    width = chunk.student.shape[1]
    blocks = -(-width // BLOCK)
    if not blocks:
        return []
    live = torch.zeros(blocks, dtype=torch.bool, device=chunk.student.device)
    tests = [
        (chunk.student, normal.student_max, normal.student_log_sum, chunk.temperature),
        (chunk.student, normal.student_max, normal.student_log_sum_at_1, 1.0),
    ]
    if chunk.teacher is not None:
        assert normal.teacher_max is not None and normal.teacher_log_sum is not None
        tests.append((chunk.teacher, normal.teacher_max, normal.teacher_log_sum, chunk.temperature))
    for logits, maximum, log_sum, temperature in tests[1 if chunk.temperature == 1 else 0 :]:
        least = (log_sum + math.log(bound)) * temperature + maximum  # the logit whose probability is the bound
        greatest = torch.cat([part.amax(1, keepdim=True) for part in logits.split(BLOCK, dim=1)], dim=1)
        live |= (greatest >= least.unsqueeze(1)).any(0)
    if labels is not None:
        columns, here = shard.local_columns(labels, width)
        live |= torch.zeros(blocks, device=live.device).index_add_(0, columns // BLOCK, here.float()) > 0
    return _joined(live.tolist(), width)


def columns_of(chunk: Chunk, columns: slice, labels: Tensor | None, shard: Shard) -> Chunk:
    """The chunk of some of its columns."""
    start = shard.start + columns.start
    part = chunk._replace(
        student=chunk.student[:, columns],
        teacher=None if chunk.teacher is None else chunk.teacher[:, columns],
        start=start,
    )
    if labels is None:
        return part
    own, here = Shard(start, shard.vocab_size).local_columns(labels, columns.stop - columns.start)
    return part._replace(columns=own, here=here)


def _joined(live: list[bool], width: int) -> list[slice]:
    """Neighbouring blocks as one slice."""
    found: list[slice] = []
    for block, wanted in enumerate(live):
        if wanted:
            first, last = block * BLOCK, min((block + 1) * BLOCK, width)
            if found and found[-1].stop == first:
                first = found.pop().start
            found.append(slice(first, last))
    return found
