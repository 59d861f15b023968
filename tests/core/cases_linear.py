"""What runs in the ranks of test_linear_divergence.py: torch only."""

from typing import Any

import torch
import torch.distributed as dist

from pipelines.core.divergence import Telemetry
from pipelines.core.family import divergence_named
from pipelines.core.linear_divergence import linear_divergence
from pipelines.core.vocab_parallel import Shard
from tests.core.cases_divergence import counted_collectives


def sharded(
    student: tuple[torch.Tensor, torch.Tensor],
    teacher: tuple[torch.Tensor, torch.Tensor] | None,
    labels: torch.Tensor | None,
    token_weights: torch.Tensor,
    vocab_size: int,
    starts: list[int],
    settings: dict[str, Any],
    upstream: float = 1.0,
    given: bool = False,
) -> dict[str, Any]:
    """student, teacher: hidden states (tokens, hidden) and head (padded vocabulary, hidden), whole.

    Rank r holds rows starts[r] to starts[r + 1] of the heads, and under sequence parallelism its part of the tokens.
    given: the head's gradient goes into a tensor that is 1 everywhere before.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    shard = Shard(starts[rank], vocab_size, dist.group.WORLD if world > 1 else None)
    settings = dict(settings)
    settings["divergence"] = divergence_named(*settings.get("divergence", ("forward_kl",)))
    rows = slice(starts[rank], [*starts, student[1].shape[0]][rank + 1])
    own = slice(None)
    if settings.get("sequence_parallel"):
        part = student[0].shape[0] // world
        own = slice(rank * part, (rank + 1) * part)
    hidden, head = student[0][own].clone().requires_grad_(), student[1][rows].clone().requires_grad_()
    of_teacher = (None, None) if teacher is None else (teacher[0][own], teacher[1][rows])
    if given:
        settings["head_gradient"] = torch.ones(head.shape)
    with counted_collectives() as calls:
        terms = linear_divergence(hidden, head, *of_teacher, labels, token_weights, shard=shard, **settings)
        (upstream * terms.loss).backward()
    named = {k: v.detach() for k, v in terms._asdict().items() if isinstance(v, torch.Tensor)}
    if terms.telemetry is not None:
        named |= dict(zip(Telemetry._fields, terms.telemetry, strict=True))
    return {
        "terms": named,
        "hidden": hidden.grad,
        "head": head.grad,
        "given": settings.get("head_gradient"),
        "collectives": calls,
    }
