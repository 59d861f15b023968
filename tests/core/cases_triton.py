"""Triton's kernels as kernel_cases.py calls them: in ranks of their own, by its interpreter; on a GPU, compiled."""

from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipelines.core import chunk as plain
from pipelines.core import triton_kernels, triton_pointwise
from pipelines.core.family import FORWARD_KL, divergence_named
from pipelines.core.kernels import kernels_for
from pipelines.core.linear_divergence import LinearTerms, linear_divergence
from pipelines.core.vocab_parallel import Shard
from tests.core import kernel_cases
from tests.core.kernel_cases import Found, Logits

KERNELS: Any = triton_kernels

if triton.knobs.runtime.interpret:
    triton_kernels.GREATEST_BLOCK = 16  # several blocks in a row of few columns
    triton_kernels.PROGRAMS = 9  # and several parts


@triton.jit
def _pointwise(log_p, log_q, values, slopes, parameter, count, NAME: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p, q = tl.load(log_p + lanes, lanes < count), tl.load(log_q + lanes, lanes < count)
    tl.store(values + lanes, triton_pointwise.value(p, q, parameter, NAME), lanes < count)
    tl.store(slopes + lanes, triton_pointwise.slope(p, q, parameter, NAME), lanes < count)


@triton.jit
def _functions(x, expm1, log1p, count, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + lanes, lanes < count)
    tl.store(expm1 + lanes, triton_pointwise.expm1(values), lanes < count)
    tl.store(log1p + lanes, triton_pointwise.log1p(tl.maximum(values, -0.999)), lanes < count)


def in_words() -> str:
    kernels, words = kernels_for(torch.device("cpu"), "triton")
    assert kernels is triton_kernels
    return words


def check_pointwise(device: str, name: str, parameter: float | None) -> None:
    """Values and slopes against family.py in float64, for ordinary, nearly equal and extreme probabilities."""
    generator = torch.Generator().manual_seed(0)
    log_p, noise = -torch.rand(2, 2000, generator=generator) * 30
    log_q = log_p + torch.cat([noise[:1000] * 1e-4, noise[1000:]])
    extremes = torch.tensor([-0.0, -1e-7, -1e-3, -0.29, -0.7, -20, -90, -104, -1000, -1e10, -1e35])
    pairs = torch.cartesian_prod(extremes, extremes).T
    log_p, log_q = (torch.cat(x).to(device) for x in ((log_p, pairs[0]), (log_q, pairs[1])))
    divergence = divergence_named(name, parameter)
    found = torch.empty_like(log_p), torch.empty_like(log_p)
    count = log_p.numel()
    _pointwise[(triton.cdiv(count, 1024),)](log_p, log_q, *found, divergence.parameter, count, name, 1024)
    largest = torch.maximum(log_p, log_q).double().exp()
    bound = (2e-6 * largest + 1e-37) * (1 + (log_p - log_q).abs())  # fp32 has no number below 1e-37
    for term, values in zip((divergence.value, divergence.slope), found, strict=True):
        expected = term(log_p.double(), log_q.double(), divergence.parameter)
        assert torch.isfinite(values).all()
        assert ((values - expected).abs() <= bound).all()
    assert (found[0][log_p == log_q] == 0).all()


def check_functions(device: str) -> None:
    """expm1 and log1p of numbers down to -1e-30, relative to the result."""
    x = -torch.logspace(-30, 1.9, 3000, device=device)
    expm1, log1p = torch.empty_like(x), torch.empty_like(x)
    _functions[(triton.cdiv(x.numel(), 1024),)](x, expm1, log1p, x.numel(), 1024)
    for found, exact in ((expm1, x.double().expm1()), (log1p, x.clamp(min=-0.999).double().log1p())):
        assert ((found - exact).abs() <= 1e-6 * exact.abs()).all()


def through(given: Logits, **settings: Any) -> Found:
    """In place, of a copy: what comes from another process is in memory that both share."""
    return kernel_cases.through(KERNELS, Logits(*(x.clone() for x in given)), **settings)


def check_rows(given: Logits, **settings: Any) -> None:
    kernel_cases.check_rows(KERNELS, given, **settings)


def cross_entropy_alone(given: Logits) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of `statistics` and the gradient without a teacher, and the rows of plain torch."""
    columns, here = Shard(0, given.student.shape[1]).local_columns(given.labels, given.student.shape[1])
    chunk = plain.Chunk(given.student, None, columns, here, 0, 1.0, FORWARD_KL)
    rows, expected = KERNELS.statistics(chunk), plain.statistics(chunk)
    normal = plain.Normalizers(rows[0], rows[2].log(), rows[3].log())
    gradient = torch.empty_like(given.student)
    KERNELS.gradient(chunk, normal, None, here.float(), gradient)
    return rows, expected, gradient


def strided(given: Logits, **settings: Any) -> tuple[Found, Tensor]:
    """Logits and gradient in the first columns of wider rows; the rest of these rows, which must stay 0."""
    width = given.student.shape[1]
    wide = [torch.zeros(len(given.student), width + 5) for _ in range(3)]
    wide[0][:, :width], wide[1][:, :width] = given.student, given.teacher
    own = Logits(wide[0][:, :width], wide[1][:, :width], given.labels)
    found = kernel_cases.through(KERNELS, own, out=wide[2][:, :width], **settings)
    return found, torch.cat([x[:, width:] for x in wide])


def sharded(given: Logits, starts: list[int], vocab_size: int, **settings: Any) -> dict[str, Tensor]:
    return kernel_cases.sharded(KERNELS, given, starts, vocab_size, **settings)


def nothing(width: int, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`statistics` and `sums` of no column or no token without starting a kernel, then by plain torch."""
    chunk, normal = kernel_cases.empty(width, tokens, threshold=torch.zeros(tokens), telemetry=True)
    ones = torch.ones(tokens)
    with mock.patch.multiple(triton_kernels, _statistics=None, _sums=None, _gradient=None):
        KERNELS.gradient(chunk, normal, ones, ones, chunk.student)
        rows = KERNELS.statistics(chunk), KERNELS.sums(chunk, normal)
    return *rows, plain.statistics(chunk), plain.sums(chunk, normal)


def linear(with_triton: bool, hidden: list[Tensor], heads: list[Tensor], labels: Tensor) -> dict[str, Any]:
    """linear_divergence of random models, with Triton's kernels or plain torch."""
    student_hidden, student_head = hidden[0].clone().requires_grad_(), heads[0].clone().requires_grad_()
    terms: LinearTerms = linear_divergence(
        student_hidden,
        student_head,
        hidden[1],
        heads[1],
        labels,
        torch.ones(len(labels)),
        kd_scale=0.7,
        ce_scale=0.3,
        temperature=1.5,
        shard=Shard(0, len(heads[0])),
        chunk_tokens=4,
        teacher_share=0.8,
        kernels=KERNELS if with_triton else plain,
    )
    terms.loss.backward()
    return {"loss": terms.loss.detach(), "hidden": student_hidden.grad, "head": student_head.grad}
