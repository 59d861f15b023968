"""Logits of every kind, what kernels make of them, and what float64 does."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.core import chunk as plain
from pipelines.core.chunk import STATISTICS, Chunk, Kernels, Normalizers
from pipelines.core.divergence import make_chunk, measure, token_terms, weighted
from pipelines.core.family import divergence_named
from pipelines.core.reference import divergences
from pipelines.core.vocab_parallel import Shard

KINDS = ("ordinary", "offset", "underflow", "masked", "minus_infinity", "ties", "constant", "equal")
DIVERGENCES: dict[str, tuple[str, float | None]] = {
    "forward_kl": ("forward_kl", None),
    "reverse_kl": ("reverse_kl", None),
    "jensen_shannon_0.5": ("jensen_shannon", None),
    "jensen_shannon_0.9": ("jensen_shannon", 0.9),
    "skew_kl_0.1": ("skew_kl", None),
    "skew_kl_0.7": ("skew_kl", 0.7),
    "total_variation": ("total_variation", None),
}


class Logits(NamedTuple):
    """student, teacher: (tokens, width); labels: (tokens,) token ids, every fourth -100."""

    student: Tensor
    teacher: Tensor
    labels: Tensor


def logits(kind: str, tokens: int, width: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Logits:
    """Of a kind among KINDS; made on the CPU, so that they are the same on every device."""
    generator = torch.Generator().manual_seed(KINDS.index(kind) + width)
    student, noise = torch.randn(2, tokens, width, generator=generator)
    student, teacher = 3 * student + 20, 3 * (student + 0.5 * noise) + 20
    if kind == "offset":
        student, teacher = student + 1e4, teacher - 1e4
    elif kind == "underflow":
        student, teacher = 60 * student, 60 * teacher
    elif kind in ("masked", "minus_infinity"):
        hidden = torch.rand(tokens, width, generator=generator) < 0.5
        hidden[:, -1] = False
        student, teacher = (
            x.masked_fill(hidden, -1e30 if kind == "masked" else -torch.inf) for x in (student, teacher)
        )
    elif kind == "ties":
        student, teacher = (student / 3).round(), (teacher / 3).round()
    elif kind == "constant":
        student, teacher = torch.full_like(student, 7), torch.full_like(teacher, -3)
    elif kind == "equal":
        teacher = student
    labels = torch.randint(0, width, (tokens,), generator=generator)
    labels = torch.where(torch.isfinite(student.gather(1, labels.unsqueeze(1)).squeeze(1)), labels, width - 1)
    labels[1::4] = -100
    return Logits(student.to(dtype).to(device), teacher.to(dtype).to(device), labels.to(device))


class Found(NamedTuple):
    kd: Tensor
    ce: Tensor
    agreement: Tensor
    overlap: Tensor | None
    teacher_entropy: Tensor | None
    gradient: Tensor


def through(
    kernels: Kernels,
    given: Logits,
    *,
    divergence: tuple[str, float | None] = ("forward_kl", None),
    temperature: float = 1.0,
    top_k: int | None = None,
    kd_scale: float = 0.7,
    ce_scale: float = 0.3,
    telemetry: bool = False,
    out: Tensor | None = None,
) -> Found:
    """All that the kernels give for logits that one rank holds whole; the gradient over the student's unless out."""
    shard = Shard(0, given.student.shape[1])
    chunk = make_chunk(*given, shard, temperature, divergence_named(*divergence), top_k, telemetry)
    measured, normal = measure(chunk, given.labels, shard, kernels)
    _, kd_factor, ce_factor = weighted(measured, given.labels, kd_scale, ce_scale, temperature)
    gradient = given.student if out is None else out
    kernels.gradient(chunk, normal, kd_factor, ce_factor, gradient)
    assert measured.kd is not None and measured.ce is not None and measured.agreement is not None
    seen = measured.telemetry
    return Found(
        measured.kd,
        measured.ce,
        measured.agreement,
        None if seen is None else seen.overlap,
        None if seen is None else seen.teacher_entropy,
        gradient,
    )


def oracle(
    given: Logits,
    *,
    divergence: tuple[str, float | None] = ("forward_kl", None),
    temperature: float = 1.0,
    top_k: int | None = None,
    kd_scale: float = 0.7,
    ce_scale: float = 0.3,
    telemetry: bool = True,
) -> Found:
    """The same in float64 by reference.py, row by row, with autograd's gradient.

    Columns without a probability in either model, of which float64 would make 0 * log 0, take no part.
    """
    student = given.student.double().requires_grad_()
    kd, overlap, entropy = [], [], []
    for s, t in zip(student, given.teacher.double(), strict=True):
        part = (s - s.max() > -700 * temperature) | (t - t.max() > -700 * temperature)
        s, t = s[part], t[part]
        kd.append(divergences(t / temperature, s / temperature, *divergence, top_k))
        overlap.append(torch.minimum(s.softmax(0), t.softmax(0)).sum().detach())
        entropy.append(-(t.softmax(0) * t.log_softmax(0)).sum())
    cross_entropy = F.cross_entropy(student, given.labels, reduction="none", ignore_index=-100)
    (gradient,) = torch.autograd.grad((kd_scale * torch.stack(kd) + ce_scale * cross_entropy).sum(), student)
    return Found(
        torch.stack(kd).detach(),
        cross_entropy.detach(),
        (given.student.argmax(1) == given.teacher.argmax(1)).double(),
        torch.stack(overlap),
        torch.stack(entropy),
        gradient,
    )


def relative(found: Tensor, expected: Tensor) -> float:
    difference = (found.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp(min=1e-30)).item()


def check_terms(found: Found, expected: Found, *, bound: float) -> None:
    """Every term within `bound` of the expected: relative, for all tokens as one vector; kd of nearly equal models and
    entropies of nearly certain ones within `bound` nats per token."""
    for name, value in found._asdict().items():
        wanted = getattr(expected, name)
        if value is None or wanted is None:
            continue
        assert torch.isfinite(value).all(), name
        least = len(wanted) ** 0.5 if name in ("kd", "teacher_entropy") else 1e-30
        error = (value.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=least)
        assert error < bound, f"{name}: {error:.1e}"
    assert torch.equal(found.agreement.double(), expected.agreement.double())


def check_rows(kernels: Kernels, given: Logits, **settings: Any) -> None:
    """`statistics` and `sums` as plain torch gives them."""
    shard = Shard(5, 5 + given.student.shape[1])
    divergence = divergence_named(*settings.pop("divergence", ("forward_kl", None)))
    labels = torch.where(given.labels == -100, given.labels, given.labels + 5)
    chunk = make_chunk(
        given.student,
        given.teacher,
        labels,
        shard,
        settings.pop("temperature", 1.0),
        divergence,
        settings.pop("top_k", None),
        settings.pop("telemetry", True),
    )
    assert not settings
    expected, found = plain.statistics(chunk), kernels.statistics(chunk)
    assert found.shape == expected.shape and found.dtype == torch.float32
    for name, of_found, of_expected in zip(STATISTICS, found, expected, strict=False):
        if name.endswith(("max", "id", "label")):
            assert torch.equal(of_found, of_expected), name
        else:
            torch.testing.assert_close(of_found, of_expected, rtol=5e-6, atol=5e-5 if name == "cross" else 1e-6)
    _, normal = measure(chunk, labels, shard, plain)
    torch.testing.assert_close(kernels.sums(chunk, normal), plain.sums(chunk, normal), rtol=5e-6, atol=1e-6)


def sharded(kernels: Kernels, given: Logits, starts: list[int], vocab_size: int, **settings: Any) -> dict[str, Tensor]:
    """This rank's terms and gradient by token_terms; rank r holds columns starts[r] to starts[r + 1]."""
    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    stop = [*starts, given.student.shape[1]][rank + 1]
    local = given.student[:, starts[rank] : stop].clone().requires_grad_()
    name, parameter = settings.pop("divergence")
    terms = token_terms(
        local,
        given.teacher[:, starts[rank] : stop],
        given.labels,
        shard=Shard(starts[rank], vocab_size, group),
        divergence=divergence_named(name, parameter),
        kernels=kernels,
        **{"temperature": 1.0} | settings,
    )
    terms.loss.sum().backward()
    assert terms.kd is not None and terms.ce is not None and local.grad is not None
    return {"kd": terms.kd, "ce": terms.ce, "gradient": local.grad}


def empty(width: int, tokens: int, **settings: Any) -> tuple[Chunk, Normalizers]:
    """A chunk without a column or without a token, and normalizers as other ranks would give them."""
    none = torch.zeros(tokens, width)
    columns, here = torch.zeros(tokens, dtype=torch.int64), torch.zeros(tokens, dtype=torch.bool)
    chunk = Chunk(none, none, columns, here, 0, 1.0, divergence_named("jensen_shannon"), **settings)
    return chunk, Normalizers(*torch.ones(9, tokens))
