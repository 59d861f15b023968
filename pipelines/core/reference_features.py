"""The float64 oracle of the losses on hidden states and attention: written as their definitions read, pair by pair.

For the verify stage and tests alone. Unsharded, gradients by autograd; it shares no code with what it checks.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pipelines.core.reference import ReferenceStep, Shape, States, Tensors, llama_logits
from pipelines.signals import FeatureLoss

Projections = dict[str, list[Tensor]]


def feature_step(
    losses: Sequence[FeatureLoss],
    student: Tensors,
    student_shape: Shape,
    teacher: Tensors,
    teacher_shape: Shape,
    projections: Projections,
    tokens: Tensor,
    mask: Tensor,
    *,
    end_of_document: int | None = None,
) -> tuple[dict[str, float], Tensors, Projections]:
    """Each loss's mean over the tokens that count (mask not 0; tokens, mask (batch, sequence)), unweighted, and the
    gradients of their weighted sum with respect to the student's tensors and the projections, by name.

    end_of_document: as in reference.distillation_step; for distances of hidden states alone.
    """
    student = {name: t.detach().double().requires_grad_() for name, t in student.items()}
    projections = {n: [t.detach().double().requires_grad_() for t in factors] for n, factors in projections.items()}
    own, target = States([], [], []), States([], [], [])
    llama_logits(student, student_shape, tokens, own, end_of_document)
    with torch.no_grad():
        in_double = {name: t.double() for name, t in teacher.items()}
        llama_logits(in_double, teacher_shape, tokens, target, end_of_document)
    counted = mask != 0
    if end_of_document is not None:
        counted = counted & (tokens != end_of_document)
    total = torch.zeros((), dtype=torch.float64)
    means = {}
    for loss in losses:
        per_token = _per_token(loss, own, target, projections.get(loss.name, []), counted)
        mean = per_token[counted].mean()
        means[loss.name] = mean.item()
        total = total + loss.weight * mean
    leaves = [*student.values(), *(t for factors in projections.values() for t in factors)]
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    gradients = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]
    of_student = dict(zip(student, gradients, strict=False))
    rest = iter(gradients[len(student) :])
    return means, of_student, {name: [next(rest) for _ in factors] for name, factors in projections.items()}


def by_factor(projections: Projections) -> Tensors:
    """One name for each factor of each projection."""
    return {f"projections.{n}.{place}": t for n, factors in projections.items() for place, t in enumerate(factors)}


def with_features(
    step: ReferenceStep,
    losses: Sequence[FeatureLoss],
    means: dict[str, float],
    gradients: Tensors,
    projections: Projections,
) -> ReferenceStep:
    """A step of reference.distillation_step and what feature_step gave for it, as one step."""
    total = step.means["loss"] + sum(loss.weight * means[loss.name] for loss in losses)
    added = {name: gradient + gradients[name] for name, gradient in step.gradients.items()}
    return ReferenceStep(step.means | means | {"loss": total}, added | by_factor(projections))


def _per_token(loss: FeatureLoss, own: States, target: States, factors: list[Tensor], counted: Tensor) -> Tensor:
    """(batch, sequence)."""
    if loss.heads is not None:
        index, other = loss.student_layer - 1, loss.teacher_layer - 1
        own_scores = _scores(own.queries[index], own.keys[index])
        return _attention(loss, own_scores, _scores(target.queries[other], target.keys[other]))
    hidden, wanted = own.hidden[loss.student_layer], target.hidden[loss.teacher_layer]
    if loss.kind == "relational":
        return torch.stack([_relations(h, w, c) for h, w, c in zip(hidden, wanted, counted, strict=True)])
    for factor in factors:
        hidden = hidden @ factor.T
    if loss.kind == "mse":
        return (hidden - wanted).pow(2).mean(-1)
    return 1 - (hidden * wanted).sum(-1) / (hidden.norm(dim=-1) * wanted.norm(dim=-1))


def _relations(hidden: Tensor, wanted: Tensor, counted: Tensor) -> Tensor:
    """hidden, wanted: (sequence, channels) of one sample; counted: (sequence,)."""
    own, target = (x / x.norm(dim=-1, keepdim=True) for x in (hidden, wanted))
    difference = own @ own.T - target @ target.T
    return difference[:, counted].pow(2).mean(-1)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """(batch, heads, sequence, sequence)."""
    key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    return torch.einsum("bihd,bjhd->bhij", query, key) / math.sqrt(query.shape[3])


def _attention(loss: FeatureLoss, own: Tensor, target: Tensor) -> Tensor:
    visible = torch.ones(own.shape[-2:], dtype=torch.bool).tril()
    if loss.kind != "scores":
        own, target = (x.masked_fill(~visible, -math.inf).softmax(-1) for x in (own, target))
    if loss.heads == "mean":
        own, target = own.mean(1, keepdim=True), target.mean(1, keepdim=True)
    if loss.kind == "kl":
        own, target = (x.masked_fill(~visible, 1.0) for x in (own, target))
        return (target * (target / own).log()).sum(-1).mean(1)
    squares = (own - target).masked_fill(~visible, 0.0).pow(2)
    return (squares.sum(-1) if loss.kind == "mse" else squares.sum(-1) / visible.sum(-1)).mean(1)
