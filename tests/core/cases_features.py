"""What runs in the ranks of test_features.py and test_attention_transfer.py: torch only."""

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.core.attention_transfer import attention_loss
from pipelines.core.features import hidden_loss, relational_loss


def _own(tensor: Tensor, dim: int) -> Tensor:
    return tensor.chunk(dist.get_world_size(), dim=dim)[dist.get_rank()].clone()


class _Collectives:
    """Counts the collectives of a `with` block by name."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __enter__(self) -> list[str]:
        self.patches = []
        for name in ("all_reduce", "all_gather_into_tensor"):
            original = getattr(dist, name)

            def counted(*arguments: Any, name: str = name, original: Any = original, **keywords: Any) -> Any:
                self.calls.append(f"{name} {arguments[0].numel()}")
                return original(*arguments, **keywords)

            self.patches.append(mock.patch.object(torch.distributed, name, counted))
        for patch in self.patches:
            patch.start()
        return self.calls

    def __exit__(self, *_: Any) -> None:
        for patch in self.patches:
            patch.stop()


def hidden(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    factors: list[Tensor],
    upstream: float,
    split_sequence: bool,
    **options: Any,
) -> dict[str, Any]:
    """Under sequence parallelism each rank has its part of dim 0; otherwise everything is replicated."""
    if split_sequence:
        student, teacher, weights = (_own(tensor, 0) for tensor in (student, teacher, weights))
    leaves = [tensor.clone().requires_grad_() for tensor in (student, *factors)]
    with _Collectives() as calls:
        value = hidden_loss(leaves[0], teacher, weights, factors=leaves[1:], **options)
        (value * upstream).backward()
    return {"value": value.detach(), "gradients": [leaf.grad for leaf in leaves], "calls": calls}


def relational(
    student: Tensor, teacher: Tensor, weights: Tensor, upstream: float, split_sequence: bool, **options: Any
) -> dict[str, Any]:
    if split_sequence:
        student, teacher = _own(student, 0), _own(teacher, 0)
    leaf = student.clone().requires_grad_()
    with _Collectives() as calls:
        group = dist.group.WORLD if split_sequence else None
        value = relational_loss(leaf, teacher, weights, group=group, **options)
        (value * upstream).backward()
    return {"value": value.detach(), "gradients": [leaf.grad], "calls": calls}


def attention(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], weights: Tensor, upstream: float, **options: Any
) -> dict[str, Any]:
    """Each rank has its part of the heads and KV groups, dim 2."""
    leaves = [_own(tensor, 2).requires_grad_() for tensor in student]
    target = (_own(teacher[0], 2), _own(teacher[1], 2))
    with _Collectives() as calls:
        value = attention_loss((leaves[0], leaves[1]), target, weights, group=dist.group.WORLD, **options)
        forward_calls = list(calls)
        (value * upstream).backward()
    return {
        "value": value.detach(),
        "gradients": [leaf.grad for leaf in leaves],
        "calls": forward_calls,
        "backward_calls": calls[len(forward_calls) :],
    }
