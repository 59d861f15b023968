"""Losses between the hidden states of two models: distances per token, and similarities among the tokens of a sequence.

Every function returns one number, the sum over tokens of weight * loss of the token, with weights of 0 for tokens that
do not count (whose values may be anything, NaN included). The caller divides once by the valid tokens of the global
batch, as for every other term. The gradients are computed in the forward pass, block by block, so that nothing but
them is kept for the backward pass; arithmetic is fp32, products with projections have the projection's dtype.

What each rank holds, and what the caller may do with it:

    tensor parallel, whole sequences     hidden states, projections and the loss are replicated: each rank returns the
                                         whole loss and the whole gradient. Nothing is to be reduced over the group;
                                         autograd through an all-reduce of this loss would multiply gradients by TP.
    sequence parallel                    each rank returns the loss of its own tokens and the gradient of the whole
                                         loss with respect to them. Losses are to be added over the group, once, for
                                         the report; gradients of projections too, since each rank saw its own tokens
                                         (Megatron does so for parameters marked `sequence_parallel`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

_SMALLEST_NORM = 1e-8


def hidden_loss(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    *,
    kind: str,
    factors: Sequence[Tensor] = (),
    chunk_tokens: int = 1024,
) -> Tensor:
    """The sum over tokens of weight * distance(projected student, teacher): a scalar fp32.

        "mse"     mean over the teacher's channels of (y - h)^2            (arXiv 1909.10351, equation 8)
        "cosine"  1 - cos(y, h), from 0 to 2; 1, without gradient, where a vector is 0   (arXiv 1910.01108, section 3)

    student: (..., student channels); teacher: (..., teacher channels), no gradient; weights: the leading dims.
    factors: the projection y = student @ factors[0].T @ factors[1].T ..., each (out, in); one of full rank, two of low
    rank, or none where the widths are equal. Gradients reach the student and the factors.

    No collectives. Extra memory: the gradients, and a few (chunk_tokens, teacher channels) fp32. Raises ValueError for
    an unknown kind or widths that do not fit.
    """
    if kind not in _DISTANCES:
        raise ValueError(f"hidden loss: expected one of {', '.join(_DISTANCES)}, found {kind}.")
    width = student.shape[-1]
    for factor in factors:
        if factor.shape[1] != width:
            raise ValueError(f"projection: expected {width} columns, found {factor.shape[1]}.")
        width = factor.shape[0]
    if width != teacher.shape[-1]:
        raise ValueError(
            f"hidden loss: expected {teacher.shape[-1]} channels, as the teacher has, found {width}. "
            "Project the student."
        )
    inputs = (student, *factors)
    needed = gradients_needed(inputs)
    hidden, target, weight = student.detach().flatten(0, -2), teacher.detach().flatten(0, -2), weights.flatten()
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    gradients = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in factors] if needed else []
    hidden_gradient = torch.empty_like(hidden) if needed else None
    for start in range(0, hidden.shape[0], chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        counted = (weight[rows] != 0).unsqueeze(1)
        states = [torch.where(counted, hidden[rows], 0.0)]
        for factor in factors:
            states.append(states[-1] @ factor.detach().t())
        value, gradient = _DISTANCES[kind](states[-1].float(), torch.where(counted, target[rows], 0.0).float())
        total += (value * weight[rows]).sum(dtype=torch.float64)
        if hidden_gradient is None:
            continue
        gradient.mul_(weight[rows].unsqueeze(1))
        for index in reversed(range(len(factors))):
            factor = factors[index].detach()
            gradient = gradient.to(factor.dtype)
            gradients[index] += gradient.t() @ states[index]
            gradient = gradient @ factor
        hidden_gradient[rows] = gradient.to(hidden.dtype)
    if hidden_gradient is None:
        return total.float()
    return with_gradients(total.float(), inputs, [hidden_gradient.view(student.shape), *gradients])


def relational_loss(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    *,
    group: ProcessGroup | None = None,
    documents: Tensor | None = None,
    block_rows: int = 512,
) -> Tensor:
    """The sum over this rank's tokens i of weight_i * mean over tokens j of (cos(s_i, s_j) - cos(t_i, t_j))^2.

    s, t: the models' hidden states; the mean is over the tokens of i's own sequence (and document) by their weights.
    Similarities within each model need no projection, whatever the widths (arXiv 1904.05068; arXiv 1907.09682).

    student: (sequence / ranks, batch, student channels); teacher: the same of its own width, no gradient; weights:
    (sequence, batch) of the whole sequence, on every rank; group: the ranks among which the sequence is cut evenly in
    their order (sequence parallelism), None where each rank has it whole. documents: (sequence, batch) numbers of
    documents packed into one sequence, whose tokens are compared among themselves only.

    With m_ij = weight_i * weight_j / (sum of the weights in i's document), 0 between documents, and u = s / norm(s),
    d loss / d u_i = 4 * sum_j m_ij (cos(s_i, s_j) - cos(t_i, t_j)) u_j, where one 2 is the square's and the other
    stands for i as a column of the rows of others: m is symmetric, so that each rank needs its own rows alone.

    Collectives over group: two all-gathers forward (unit vectors of both models, fp32), none backward. Extra memory:
    both models' unit vectors of whole sequences and a few (batch, block_rows, sequence), fp32.
    """
    rank = 0 if group is None else torch.distributed.get_rank(group)
    own = slice(rank * student.shape[0], (rank + 1) * student.shape[0])
    counted = (weights != 0).unsqueeze(-1)
    units, norms = _unit_vectors(torch.where(counted[own], student.detach(), 0.0))
    targets, _ = _unit_vectors(torch.where(counted[own], teacher.detach(), 0.0))
    units, targets = _gathered(units, group), _gathered(targets, group)
    needed = gradients_needed((student,))
    gradient = torch.empty_like(student) if needed else None
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    weight = weights.t().float()  # (batch, sequence)
    labels = torch.zeros_like(weight) if documents is None else documents.t()
    for start in range(own.start, own.stop, block_rows):
        rows = slice(start, min(start + block_rows, own.stop))
        together = (labels[:, rows, None] == labels[:, None, :]) * weight[:, None, :]
        scale = (weight[:, rows] / together.sum(dim=2).clamp(min=torch.finfo(torch.float32).tiny)).unsqueeze(2)
        difference = _similarities(units, rows) - _similarities(targets, rows)
        pull = difference * together * scale
        total += (pull * difference).sum(dtype=torch.float64)
        if gradient is None:
            continue
        pull = torch.einsum("bij,jbc->ibc", pull, units).mul_(4)
        local = slice(rows.start - own.start, rows.stop - own.start)
        pull -= (pull * units[rows]).sum(dim=-1, keepdim=True) * units[rows]
        gradient[local] = torch.where(norms[local] > _SMALLEST_NORM, pull / norms[local], 0.0).to(student.dtype)
    return total.float() if gradient is None else with_gradients(total.float(), [student], [gradient])


def gradients_needed(inputs: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)


def with_gradients(value: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """`value`, a scalar, whose backward pass gives the upstream gradient * gradients[i] to inputs[i], once."""
    cast = [gradient.to(tensor.dtype) for tensor, gradient in zip(inputs, gradients, strict=True)]
    return _WithGradients.apply(value, len(cast), *cast, *inputs)


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[:count])
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # In place: autograd's version counter turns a second backward through the same graph into an error.
        gradients = [gradient.mul_(upstream) for gradient in ctx.saved_tensors]
        return None, None, *(None for _ in gradients), *gradients


def _mean_squared_error(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    difference = hidden - target
    return difference.square().mean(dim=1), difference.mul_(2 / hidden.shape[1])


def _cosine_distance(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """d (1 - u . v) / d hidden = -(v - (u . v) u) / norm(hidden), u and v the unit vectors of hidden and target."""
    units, norms = _unit_vectors(hidden)
    targets, _ = _unit_vectors(target)
    cosine = (units * targets).sum(dim=1, keepdim=True)
    gradient = torch.where(norms > _SMALLEST_NORM, (cosine * units - targets) / norms, 0.0)
    return 1 - cosine.squeeze(1), gradient


_DISTANCES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "mse": _mean_squared_error,
    "cosine": _cosine_distance,
}


def _unit_vectors(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """(..., channels) -> the same in fp32 with norm 1 (0 for vectors of 0), and (..., 1) the norms."""
    vectors = vectors.float()
    norms = vectors.norm(dim=-1, keepdim=True)
    return vectors / norms.clamp(min=_SMALLEST_NORM), norms


def _gathered(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Every rank's part, along dim 0: one all-gather."""
    if group is None:
        return tensor
    parts = torch.distributed.get_world_size(group)
    whole = tensor.new_empty(tensor.shape[0] * parts, *tensor.shape[1:])
    torch.distributed.all_gather_into_tensor(whole, tensor.contiguous(), group=group)
    return whole


def _similarities(units: Tensor, rows: slice) -> Tensor:
    """units: (sequence, batch, channels) -> (batch, rows, sequence) of cosines."""
    return torch.einsum("ibc,jbc->bij", units[rows], units)
