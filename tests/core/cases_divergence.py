"""What runs in the ranks of test_divergence.py: torch only."""

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from pipelines.core.loss import LossWeights, distillation_terms
from pipelines.core.vocab_parallel import Shard, align_columns, greatest


def sharded_terms(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor | None,
    vocab_size: int,
    starts: list[int],
    weights: dict[str, Any],
    upstream: torch.Tensor,
) -> dict[str, Any]:
    """Rank r holds columns starts[r] to starts[r + 1]; those from vocab_size on are padding.

    Returns this rank's terms, its gradient, and the collectives it took part in.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    stop = [*starts, student.shape[1]][rank + 1]
    shard = Shard(starts[rank], vocab_size, group if world > 1 else None)
    local = student[:, starts[rank] : stop].clone().requires_grad_()
    local_teacher = None if teacher is None else teacher[:, starts[rank] : stop]
    calls: list[str] = []
    original = dist.all_reduce

    def counted(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> Any:
        calls.append(f"{op.name if hasattr(op, 'name') else op} {tensor.numel()}")
        return original(tensor, op=op, group=group)

    with mock.patch.object(torch.distributed, "all_reduce", counted):
        terms = distillation_terms(local, local_teacher, labels, LossWeights(**weights), shard)
        forward_calls, calls = list(calls), []
        (terms.loss * upstream).sum().backward()
    return {
        "terms": {name: None if t is None else t.detach() for name, t in terms._asdict().items()},
        "gradient": local.grad,
        "collectives": forward_calls,
        "backward_collectives": calls,
    }


def greatest_of(logits: torch.Tensor, width: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    shard = Shard.uniform(width, vocab_size, dist.group.WORLD)
    return greatest((logits[:, shard.start : shard.start + width],), shard)


def aligned(logits: torch.Tensor, own_width: int, width: int, vocab_size: int) -> torch.Tensor:
    start = dist.get_rank() * own_width
    return align_columns(logits[:, start : start + own_width], width, vocab_size, dist.group.WORLD)
