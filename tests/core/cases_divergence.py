"""What runs in the ranks of test_divergence.py: torch only."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from pipelines.core import chunk as plain
from pipelines.core.divergence import Telemetry, greatest, token_terms
from pipelines.core.family import divergence_named
from pipelines.core.loss import LossWeights, distillation_terms
from pipelines.core.vocab_parallel import Shard, align_columns


@contextlib.contextmanager
def counted_collectives() -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """(name, shape of what this rank gives) of each collective, in order."""
    calls: list[tuple[str, tuple[int, ...]]] = []
    with contextlib.ExitStack() as stack:
        for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
            original = getattr(dist, name)

            def counted(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
                calls.append((name, tuple(args[0 if name == "all_reduce" else 1].shape)))
                return original(*args, **kwargs)

            stack.enter_context(mock.patch.object(dist, name, counted))
        yield calls


def sharded_terms(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor | None,
    vocab_size: int,
    starts: list[int],
    weights: dict[str, Any],
    upstream: torch.Tensor,
    divergence: tuple[Any, ...] = ("forward_kl",),
    telemetry: bool = False,
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
    of_loss = LossWeights(divergence=divergence_named(*divergence), **weights)
    with counted_collectives() as calls:
        if telemetry:
            terms = token_terms(
                local,
                local_teacher,
                labels,
                kd_scale=of_loss.kd_scale,
                ce_scale=of_loss.ce,
                temperature=of_loss.temperature,
                divergence=of_loss.divergence,
                shard=shard,
                telemetry=True,
            )
        else:
            terms = distillation_terms(local, local_teacher, labels, of_loss, shard)
        forward_calls = list(calls)
        calls.clear()
        (terms.loss * upstream).sum().backward()
    named = terms._asdict()
    seen = named.pop("telemetry")
    return {
        "terms": {name: None if t is None else t.detach() for name, t in named.items()},
        "telemetry": {} if seen is None else dict(zip(Telemetry._fields, seen, strict=True)),
        "gradient": local.grad,
        "collectives": forward_calls,
        "backward_collectives": calls,
    }


def greatest_of(logits: torch.Tensor, width: int, vocab_size: int) -> torch.Tensor:
    shard = Shard.uniform(width, vocab_size, dist.group.WORLD)
    return greatest(logits[:, shard.start : shard.start + shard.valid_width(width)], shard, plain)


def aligned(logits: torch.Tensor, own_width: int, width: int, vocab_size: int) -> torch.Tensor:
    start = dist.get_rank() * own_width
    return align_columns(logits[:, start : start + own_width], width, vocab_size, dist.group.WORLD)
