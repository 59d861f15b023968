"""Attention transfer with the heads cut over 1, 2 and 4 ranks against plain float64 formulas."""

import math

import pytest
import torch
from torch import Tensor

from pipelines.core.attention_transfer import HEADS, KINDS, QueryAndKey, attention_loss
from tests.core.test_divergence import relative
from tests.ranks import RankPools

ATTENTION = "tests.core.cases_features:attention"
SEQUENCE, BATCH, BLOCK = 11, 2, 4
UPSTREAM = -1.3


def inputs(seed: int, teacher_heads: int) -> tuple[QueryAndKey, QueryAndKey, Tensor]:
    """Student: 4 heads, 4 KV groups of 6; teacher: its own heads in 4 groups of 10. Every head of another size."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(heads: int, head_dim: int) -> Tensor:
        sizes = torch.linspace(0.4, 2.5, heads)[:, None]
        return torch.randn(SEQUENCE, BATCH, heads, head_dim, generator=generator) * sizes

    weights = (torch.rand(SEQUENCE, BATCH, generator=generator) < 0.7).float() * torch.linspace(0.5, 2, SEQUENCE)[
        :, None
    ]
    return (drawn(8, 6), drawn(4, 6)), (drawn(teacher_heads, 10), drawn(4, 10)), weights


def scores(query: Tensor, key: Tensor) -> Tensor:
    """Scores (batch, heads, sequence, sequence)."""
    key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    return torch.einsum("ibhd,jbhd->bhij", query, key) / math.sqrt(query.shape[3])


def oracle(
    student: QueryAndKey,
    teacher: QueryAndKey,
    weights: Tensor,
    kind: str,
    heads: str,
    documents: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [tensor.double().requires_grad_() for tensor in student]
    s = scores(*leaves)
    t = scores(*(tensor.double() for tensor in teacher))
    visible = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).tril().expand(BATCH, 1, -1, -1)
    if documents is not None:
        visible = visible & (documents.t()[:, None, :, None] == documents.t()[:, None, None, :])
    if kind != "scores":
        s, t = (x.masked_fill(~visible, -math.inf).softmax(-1) for x in (s, t))
    if heads == "mean":
        s, t = s.mean(1, keepdim=True), t.mean(1, keepdim=True)
    if kind == "kl":
        each = torch.where(visible, t * (t.clamp(min=1e-300).log() - s.clamp(min=1e-300).log()), 0.0).sum(-1)
    elif kind == "mse":
        each = ((s - t) ** 2).sum(-1)
    else:
        each = torch.where(visible, (s - t) ** 2, 0.0).sum(-1) / visible.sum(-1)
    value = (each.mean(1) * weights.t().double()).sum()
    return value.detach(), torch.autograd.grad(value * UPSTREAM, leaves)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_values_and_gradients(ranks: RankPools, world: int, kind: str, heads: str) -> None:
    student, teacher, weights = inputs(seed=world, teacher_heads=8 if heads == "each" else 12)
    value, gradients = oracle(student, teacher, weights, kind, heads)
    found = ranks(
        world,
        ATTENTION,
        student=student,
        teacher=teacher,
        weights=weights,
        upstream=UPSTREAM,
        kind=kind,
        heads=heads,
        block_rows=BLOCK,
    )
    for result in found:
        assert relative(result["value"], value) < 3e-6
        assert torch.equal(result["value"], found[0]["value"]), "replicated bit for bit"
        assert result["backward_calls"] == []
    for index, gradient in enumerate(gradients):
        assert relative(torch.cat([r["gradients"][index] for r in found], dim=2), gradient) < 3e-6
    if world > 1 and heads == "mean":  # rows 0-3, 4-7, 8-10 against the keys up to the last of them
        assert found[0]["calls"] == [f"all_reduce {2 * BATCH * r * k}" for r, k in ((4, 4), (4, 8), (3, 11))]
    elif world > 1:
        assert found[0]["calls"] == ["all_reduce 1"]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_see_only_themselves(kind: str, heads: str) -> None:
    student, teacher, weights = inputs(seed=5, teacher_heads=8)
    documents = torch.stack([torch.tensor([0] * 3 + [1] * 8), torch.tensor([4] * 6 + [7] * 5)], dim=1)
    value, gradients = oracle(student, teacher, weights, kind, heads, documents)
    leaves = (student[0].clone().requires_grad_(), student[1].clone().requires_grad_())
    found = attention_loss(leaves, teacher, weights, kind=kind, heads=heads, documents=documents, block_rows=BLOCK)
    (found * UPSTREAM).backward()
    assert relative(found.detach(), value) < 3e-6
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert leaf.grad is not None and relative(leaf.grad, gradient) < 3e-6


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_attention_has_a_loss_and_a_gradient_of_zero(kind: str, heads: str) -> None:
    student, _, weights = inputs(seed=6, teacher_heads=8)
    leaves = (student[0].clone().requires_grad_(), student[1].clone().requires_grad_())
    value = attention_loss(leaves, student, weights, kind=kind, heads=heads)
    value.backward()
    assert value.item() == 0
    assert all(leaf.grad is not None and leaf.grad.abs().max() < 1e-6 for leaf in leaves)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_queries_that_do_not_count_may_be_anything(kind: str, heads: str) -> None:
    student, teacher, weights = inputs(seed=7, teacher_heads=8)
    out = weights == 0
    leaves = (student[0].clone(), student[1].clone().requires_grad_())
    leaves[0][out] = torch.nan
    leaves[0].requires_grad_()
    value = attention_loss(leaves, teacher, weights, kind=kind, heads=heads, block_rows=BLOCK)
    value.backward()
    expected, gradients = oracle(student, teacher, weights, kind, heads)
    assert relative(value.detach(), expected) < 3e-6
    assert leaves[0].grad is not None and torch.count_nonzero(leaves[0].grad[out]) == 0
    assert leaves[1].grad is not None and relative(leaves[1].grad * UPSTREAM, gradients[1]) < 3e-6


def test_probabilities_that_underflow_give_finite_numbers() -> None:
    student, teacher, weights = inputs(seed=8, teacher_heads=8)
    for heads in HEADS:
        leaves = ((student[0] * 1e3).requires_grad_(), student[1].clone().requires_grad_())
        value = attention_loss(leaves, teacher, weights, kind="kl", heads=heads)
        value.backward()
        assert value.isfinite() and value > 0
        assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


def test_what_does_not_fit_is_refused() -> None:
    student, teacher, weights = inputs(seed=9, teacher_heads=12)
    with pytest.raises(ValueError, match="expected as many heads in both models, found 8 and 12"):
        attention_loss(student, teacher, weights, kind="kl", heads="each")
    with pytest.raises(ValueError, match="expected kind kl, mse, scores and heads mean, each, found l1, mean"):
        attention_loss(student, teacher, weights, kind="l1")
