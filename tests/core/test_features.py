"""Losses on hidden states against plain float64 formulas, replicated and with the sequence cut, at 1, 2 and 4 ranks."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.core.features import hidden_loss, relational_loss
from tests.core.test_divergence import relative
from tests.ranks import RankPools

CASES = "tests.core.cases_features"
SEQUENCE, BATCH, WIDTH, TEACHER_WIDTH = 12, 3, 10, 14
UPSTREAM = 1.7

LAYOUTS = {
    "one_rank": (1, False),
    "tensor_parallel": (2, False),
    "sequence_parallel": (2, True),
    "sequence_parallel_4": (4, True),
}
PROJECTIONS = {"full": [(TEACHER_WIDTH, WIDTH)], "low_rank": [(4, WIDTH), (TEACHER_WIDTH, 4)], "none": []}


def inputs(seed: int, width: int = WIDTH) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher (sequence, batch, own width), uneven along the sequence; weights with zeros."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(SEQUENCE, BATCH, width, generator=generator) * torch.linspace(0.2, 4, SEQUENCE)[:, None, None]
    teacher = torch.randn(SEQUENCE, BATCH, TEACHER_WIDTH, generator=generator) + 0.5
    weights = (torch.rand(SEQUENCE, BATCH, generator=generator) < torch.linspace(0.3, 1, SEQUENCE)[:, None]).float()
    return student, teacher, weights * torch.rand(SEQUENCE, BATCH, generator=generator)


def projection(name: str, seed: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) / size[1] ** 0.5 for size in PROJECTIONS[name]]


def hidden_oracle(
    student: Tensor, teacher: Tensor, weights: Tensor, factors: list[Tensor], kind: str
) -> tuple[Tensor, list[Tensor]]:
    leaves = [tensor.double().requires_grad_() for tensor in (student, *factors)]
    y = leaves[0]
    for factor in leaves[1:]:
        y = F.linear(y, factor)
    h = teacher.double()
    each = ((y - h) ** 2).mean(-1) if kind == "mse" else 1 - F.cosine_similarity(y, h, dim=-1)
    value = (each * weights.double()).sum()
    return value.detach(), list(torch.autograd.grad(value * UPSTREAM, leaves))


def compare(found: list[dict[str, Any]], value: Tensor, gradients: list[Tensor], *, split: bool) -> None:
    """Replicated: every rank has the whole. Cut: losses and projections' gradients add up, hidden ones join."""
    if split:
        assert relative(torch.stack([r["value"] for r in found]).sum(), value) < 2e-6
        assert relative(torch.cat([r["gradients"][0] for r in found]), gradients[0]) < 2e-6
        for index, gradient in enumerate(gradients[1:], start=1):
            assert relative(torch.stack([r["gradients"][index] for r in found]).sum(0), gradient) < 2e-6
        return
    for result in found:
        assert relative(result["value"], value) < 2e-6
        for own, gradient in zip(result["gradients"], gradients, strict=True):
            assert relative(own, gradient) < 2e-6


@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize("factors", ["full", "low_rank"])
@pytest.mark.parametrize("world, split", LAYOUTS.values(), ids=LAYOUTS)
def test_hidden_loss(ranks: RankPools, world: int, split: bool, factors: str, kind: str) -> None:
    student, teacher, weights = inputs(seed=world)
    matrices = projection(factors)
    value, gradients = hidden_oracle(student, teacher, weights, matrices, kind)
    found = ranks(
        world,
        f"{CASES}:hidden",
        student=student,
        teacher=teacher,
        weights=weights,
        factors=matrices,
        upstream=UPSTREAM,
        split_sequence=split,
        kind=kind,
        chunk_tokens=5,
    )
    compare(found, value, gradients, split=split)
    assert all(result["calls"] == [] for result in found)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_equal_widths_need_no_projection(kind: str) -> None:
    student, teacher, weights = inputs(seed=2, width=TEACHER_WIDTH)
    value, gradients = hidden_oracle(student, teacher, weights, [], kind)
    leaf = student.clone().requires_grad_()
    found = hidden_loss(leaf, teacher, weights, kind=kind)
    (found * UPSTREAM).backward()
    assert relative(found.detach(), value) < 2e-6
    assert leaf.grad is not None and relative(leaf.grad, gradients[0]) < 2e-6
    assert abs(hidden_loss(teacher, teacher, weights, kind=kind).item()) < 1e-5


def relational_oracle(
    student: Tensor, teacher: Tensor, weights: Tensor, documents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token, as the definition reads."""
    leaf = student.double().requires_grad_()
    value = torch.zeros((), dtype=torch.float64)
    for sample in range(student.shape[1]):
        s = F.normalize(leaf[:, sample], dim=-1)
        t = F.normalize(teacher[:, sample].double(), dim=-1)
        for i in range(student.shape[0]):
            partners = weights[:, sample].double()
            if documents is not None:
                partners = partners * (documents[:, sample] == documents[i, sample])
            if partners[i]:
                value = value + partners[i] * (partners * (s @ s[i] - t @ t[i]) ** 2).sum() / partners.sum()
    return value.detach(), torch.autograd.grad(value * UPSTREAM, leaf)[0]


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("world, split", LAYOUTS.values(), ids=LAYOUTS)
def test_relational_loss(ranks: RankPools, world: int, split: bool, packed: bool) -> None:
    student, teacher, weights = inputs(seed=world)
    documents = torch.tensor([0] * 3 + [1] * 5 + [2] * 4)[:, None].expand(-1, BATCH) if packed else None
    value, gradient = relational_oracle(student, teacher, weights, documents)
    found = ranks(
        world,
        f"{CASES}:relational",
        student=student,
        teacher=teacher,
        weights=weights,
        upstream=UPSTREAM,
        split_sequence=split,
        documents=documents,
        block_rows=5,
    )
    compare(found, value, [gradient], split=split)
    gathers = [f"all_gather_into_tensor {SEQUENCE * BATCH * width}" for width in (WIDTH, TEACHER_WIDTH)]
    assert all(result["calls"] == (gathers if split else []) for result in found)


def test_relations_ignore_width_scale_and_rotation() -> None:
    student, _, weights = inputs(seed=3)
    rotation = torch.linalg.qr(torch.randn(TEACHER_WIDTH, TEACHER_WIDTH))[0][:, :WIDTH]
    assert relational_loss(student, 3 * student @ rotation.t(), weights).item() < 1e-9


@pytest.mark.parametrize("loss", ["mse", "cosine", "relational"])
def test_what_does_not_count_may_be_anything(loss: str) -> None:
    """NaN and infinity in tokens of weight 0 change nothing; a whole sequence may be out."""
    student, teacher, weights = inputs(seed=4)
    weights[:, 1] = 0

    def computed(student: Tensor, teacher: Tensor) -> tuple[Tensor, list[Tensor]]:
        leaves = [tensor.clone().requires_grad_() for tensor in (student, *projection("full"))]
        if loss == "relational":
            value = relational_loss(leaves[0], teacher, weights)
            leaves = leaves[:1]
        else:
            value = hidden_loss(leaves[0], teacher, weights, kind=loss, factors=leaves[1:])
        value.backward()
        return value.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]

    value, gradients = computed(student, teacher)
    masked = weights == 0
    student[masked], teacher[masked] = torch.nan, torch.inf
    again, again_gradients = computed(student, teacher)
    assert torch.equal(value, again) and value > 0
    assert all(torch.equal(a, b) for a, b in zip(gradients, again_gradients, strict=True))
    assert torch.count_nonzero(gradients[0][masked]) == 0 and torch.count_nonzero(gradients[0][~masked]) > 0


@pytest.mark.parametrize("kind", ["cosine", "relational"])
def test_a_vector_of_zeros_has_no_direction(kind: str) -> None:
    student, teacher, weights = inputs(seed=5, width=TEACHER_WIDTH)
    weights[:] = 1
    student[2, 1] = 0
    leaf = student.clone().requires_grad_()
    value = (
        relational_loss(leaf, teacher, weights)
        if kind == "relational"
        else hidden_loss(leaf, teacher, weights, kind=kind)
    )
    value.backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all() and value.isfinite()
    assert torch.count_nonzero(leaf.grad[2, 1]) == 0


def test_bf16_states_are_compared_in_fp32() -> None:
    student, teacher, weights = inputs(seed=6)
    factors = [factor.bfloat16() for factor in projection("full")]
    student, teacher = student.bfloat16(), teacher.bfloat16()
    value, gradients = hidden_oracle(student, teacher, weights, factors, "mse")
    leaves = [tensor.clone().requires_grad_() for tensor in (student, *factors)]
    found = hidden_loss(leaves[0], teacher, weights, kind="mse", factors=leaves[1:])
    (found * UPSTREAM).backward()
    assert found.dtype == torch.float32 and relative(found.detach(), value) < 1e-3
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert leaf.grad is not None and leaf.grad.dtype == torch.bfloat16
        assert relative(leaf.grad, gradient) < 1e-2


def test_without_gradients_none_are_computed() -> None:
    student, teacher, weights = inputs(seed=7)
    with torch.no_grad():
        leaf = student.clone().requires_grad_()
        assert not hidden_loss(leaf, teacher, weights, kind="mse", factors=projection("full")).requires_grad
    assert not relational_loss(student, teacher, weights).requires_grad


def test_a_second_backward_is_an_error_not_a_wrong_gradient() -> None:
    student, teacher, weights = inputs(seed=8, width=TEACHER_WIDTH)
    value = hidden_loss(student.requires_grad_(), teacher, weights, kind="mse")
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_what_does_not_fit_is_refused() -> None:
    student, teacher, weights = inputs(seed=1)
    with pytest.raises(ValueError, match="expected 14 channels, as the teacher has, found 10"):
        hidden_loss(student, teacher, weights, kind="mse")
    with pytest.raises(ValueError, match="expected 10 columns, found 4"):
        hidden_loss(student, teacher, weights, kind="mse", factors=[torch.zeros(14, 4)])
    with pytest.raises(ValueError, match="expected one of mse, cosine, found l1"):
        hidden_loss(student, teacher, weights, kind="l1")
