"""The matrix products of an output head, with fp32 results whatever the dtype of what is multiplied.

On a GPU products of bf16 give fp32 without rounding in between. Elsewhere bf16 is multiplied in fp32, a few rows of
the head at a time. fp32 is multiplied as it is: by MKL, torch's own choice on a CPU, or by oneDNN where that is faster.
"""

import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

_PART_BYTES = 1 << 22  # of a head's rows that are converted or packed at a time


def logits(hidden: Tensor, head: Tensor, out: Tensor) -> Tensor:
    """out = hidden @ head^T. hidden: (tokens, hidden), head: (width, hidden), one dtype; out: (tokens, width) fp32."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, head.t(), out_dtype=torch.float32, out=out)
    if hidden.dtype == torch.float32 and not in_parts(hidden.device):
        return torch.mm(hidden, head.t(), out=out)
    hidden = hidden.float()
    for rows in _parts(head):
        out[:, rows] = _linear(hidden, head[rows].float())
    return out


def hidden_gradient(gradient: Tensor, head: Tensor, live: list[slice]) -> Tensor:
    """gradient @ head over the live columns: (tokens, width) @ (width, hidden) -> (tokens, hidden) in the head's dtype.

    Summed in fp32 and rounded once.
    """
    if len(live) == 1 and (head.is_cuda or head.dtype == torch.float32 and not in_parts(head.device)):
        return torch.mm(gradient[:, live[0]], head[live[0]])
    total = torch.zeros(gradient.shape[0], head.shape[1], device=head.device)
    for columns in live:
        of_gradient, of_head = gradient[:, columns], head[columns]
        if head.is_cuda and head.dtype != torch.float32:
            torch.addmm(total, of_gradient, of_head, out_dtype=torch.float32, out=total)
            continue
        for rows in _parts(of_head):
            total.add_(_linear(of_gradient[:, rows], of_head[rows].float().t()))
    return total.to(head.dtype)


def add_head_gradient(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """total += gradient^T @ hidden. total: (width, hidden) fp32; gradient: (tokens, width), on a GPU of the dtype of
    hidden: (tokens, hidden), elsewhere fp32."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        torch.addmm(total, gradient.t(), hidden, out_dtype=torch.float32, out=total)
    elif in_parts(hidden.device):
        by_column = hidden.float().t().contiguous()
        for rows in _parts(total):
            total[rows].add_(_linear(gradient[:, rows].t(), by_column))
    else:
        total.addmm_(gradient.t(), hidden.float())


@functools.cache
def in_parts(device: torch.device) -> bool:
    """Whether oneDNN multiplies fp32 on this device, which packs one operand of a product: so it gets a part at a time.

    On AMD's processors MKL leaves AVX-512 unused: with it products take about half the time there.
    """
    cpu = Path("/proc/cpuinfo")
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and cpu.is_file()
        and "AuthenticAMD" in cpu.read_text()
    )


def onednn_linear(left: Tensor, right: Tensor) -> Tensor:
    """left @ right^T by oneDNN, on a CPU whose torch has it: a private operation, what torch.compile makes of a linear
    layer, and the one way to oneDNN's fp32 product that packs nothing for good."""
    return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")


def _linear(left: Tensor, right: Tensor) -> Tensor:
    """left @ right^T of fp32."""
    return onednn_linear(left, right) if in_parts(left.device) else left @ right.t()


def _parts(head: Tensor) -> Iterator[slice]:
    size = max(1, _PART_BYTES // (4 * max(1, head.shape[1])))
    for first in range(0, head.shape[0], size):
        yield slice(first, min(first + size, head.shape[0]))
