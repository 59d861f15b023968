"""The matrix products of an output head, with fp32 results whatever the dtype of what is multiplied.

On a GPU products of bf16 give fp32 without rounding in between. Elsewhere bf16 is multiplied in fp32, a few rows of
the head at a time. fp32 is multiplied as it is.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_UPCAST_BYTES = 1 << 23


def logits(hidden: Tensor, head: Tensor, out: Tensor) -> Tensor:
    """out = hidden @ head^T. hidden: (tokens, hidden), head: (width, hidden), one dtype; out: (tokens, width) fp32."""
    if hidden.dtype == torch.float32:
        return torch.mm(hidden, head.t(), out=out)
    if hidden.is_cuda:
        return torch.mm(hidden, head.t(), out_dtype=torch.float32, out=out)
    for rows in _parts(head):
        out[:, rows] = hidden.float() @ head[rows].float().t()
    return out


def hidden_gradient(gradient: Tensor, head: Tensor, live: list[slice]) -> Tensor:
    """gradient @ head over the live columns: (tokens, width) @ (width, hidden) -> (tokens, hidden) in the head's dtype.

    Summed in fp32 and rounded once.
    """
    if len(live) == 1 and (head.dtype == torch.float32 or head.is_cuda):
        return torch.mm(gradient[:, live[0]], head[live[0]])
    total = torch.zeros(gradient.shape[0], head.shape[1], device=head.device)
    for columns in live:
        if head.is_cuda and head.dtype != torch.float32:
            torch.addmm(total, gradient[:, columns], head[columns], out_dtype=torch.float32, out=total)
            continue
        for rows in _parts(head[columns]):
            total.addmm_(gradient[:, columns][:, rows], head[columns][rows].float())
    return total.to(head.dtype)


def add_head_gradient(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """total += gradient^T @ hidden. total: (width, hidden) fp32; gradient: (tokens, width), on a GPU of the dtype of
    hidden: (tokens, hidden), elsewhere fp32."""
    if hidden.dtype == torch.float32:
        total.addmm_(gradient.t(), hidden)
    elif hidden.is_cuda:
        torch.addmm(total, gradient.t(), hidden, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(gradient.t(), hidden.float())


def _parts(head: Tensor) -> Iterator[slice]:
    size = max(1, _UPCAST_BYTES // (4 * max(1, head.shape[1])))
    for first in range(0, head.shape[0], size):
        yield slice(first, min(first + size, head.shape[0]))
