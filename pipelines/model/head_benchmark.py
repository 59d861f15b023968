"""Two heads and the divergence between them, measured: memory, time and the error of the gradients.

A contender goes from the normed hidden states of both models and both heads, sharded over the vocabulary, to the mean
of KL(teacher || student) over all tokens, at temperature 1; the backward pass goes into the student's hidden states and
head. This is the one loss in which every implementation agrees. All contenders get the same tensors, and the work of
both products is part of the measurement.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from pipelines.core.linear_divergence import linear_divergence
from pipelines.core.vocab_parallel import Shard
from pipelines.model import cpu_runtime, measure
from pipelines.model.measure import Unavailable

_REFERENCE_TOKENS = 64  # per chunk of the reference


@dataclass(frozen=True)
class Case:
    tokens: int
    vocabulary: int
    student_hidden: int
    teacher_hidden: int
    dtype: torch.dtype

    @property
    def flops(self) -> int:
        """Of the products over the whole vocabulary: the student's forward and backward, the teacher's forward."""
        return 2 * self.tokens * self.vocabulary * (3 * self.student_hidden + self.teacher_hidden)


@dataclass
class Heads:
    """What every contender starts from, on one rank.

    student_hidden: (tokens, student hidden), teacher_hidden: (tokens, teacher hidden), the same on every rank.
    student_head: (vocabulary / tp, student hidden), teacher_head: (vocabulary / tp, teacher hidden), this rank's rows.
    The student's two take gradients. main_grad: fp32 of the student head's shape for models that are not fp32, as
    Megatron keeps it; a contender may add its head's gradient there instead of leaving it in student_head.grad.
    """

    student_hidden: Tensor
    student_head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    vocabulary: int
    group: ProcessGroup
    main_grad: Tensor | None = None

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)

    def clear(self) -> None:
        """Forget the gradients."""
        self.student_hidden.grad = self.student_head.grad = None
        if self.main_grad is not None:
            self.main_grad.zero_()

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of the student's hidden states and head, after a backward pass."""
        hidden, head = self.student_hidden.grad, self.student_head.grad
        head = self.main_grad if head is None else head
        assert hidden is not None and head is not None
        return hidden, head

    def new_gradients(self) -> list[Tensor]:
        """Those that autograd left; main_grad was there before."""
        return [g for g in (self.student_hidden.grad, self.student_head.grad) if g is not None]


Contender = Callable[[Heads], Tensor]


@dataclass(frozen=True)
class Measurement:
    """peak_bytes_beyond_gradients: the most that a pass holds at a time beyond its inputs, less its two gradients, on
    the largest rank. seconds: median forward and backward, on the slowest rank; fastest_seconds: the least, which tells
    how quiet the machine was. relative_error: the greater one of both gradients, norm(g - g*) / norm(g*) against
    float64. loss_error: |loss - loss*| / loss*."""

    peak_bytes_beyond_gradients: int
    seconds: float
    fastest_seconds: float
    relative_error: float
    loss_error: float


# The contenders that need nothing but torch


def stillhouse(heads: Heads) -> Tensor:
    """core/linear_divergence.py, as a training step calls it."""
    tokens = heads.student_hidden.shape[0]
    return linear_divergence(
        heads.student_hidden,
        heads.student_head,
        heads.teacher_hidden,
        heads.teacher_head,
        None,
        heads.student_hidden.new_full((tokens,), 1 / tokens, dtype=torch.float32),
        kd_scale=1.0,
        ce_scale=0.0,
        temperature=1.0,
        shard=Shard.uniform(heads.student_head.shape[0], heads.vocabulary, heads.group),
        head_gradient=heads.main_grad,
    ).loss


def plain_torch(heads: Heads) -> Tensor:
    """The formula on whole logits, which every rank gathers."""
    return _mean_kl(*_whole_logits(heads))


def compiled_torch(device: torch.device) -> Contender:
    """`plain_torch` with its formula under torch.compile. Raises Unavailable where nothing compiles."""
    formula = torch.compile(_mean_kl, dynamic=False)
    try:
        with cpu_runtime.suspended():
            logits = torch.zeros(2, 16, device=device, requires_grad=True)
            formula(logits, torch.zeros(2, 16, device=device)).backward()
    except Exception as error:  # whatever a missing or broken compiler raises
        raise Unavailable(f"torch.compile: {type(error).__name__}: {str(error).splitlines()[0]}") from None
    return lambda heads: formula(*_whole_logits(heads))


def _mean_kl(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = F.log_softmax(student.float(), dim=-1), F.log_softmax(teacher.float(), dim=-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1).mean()


def _whole_logits(heads: Heads) -> tuple[Tensor, Tensor]:
    hidden = heads.student_hidden
    with torch.no_grad():
        teacher = F.linear(heads.teacher_hidden, heads.teacher_head)
    if heads.ranks == 1:
        return F.linear(hidden, heads.student_head), teacher
    student = F.linear(copy_to_tensor_model_parallel_region(hidden), heads.student_head)
    return gather_from_tensor_model_parallel_region(student), gather_from_tensor_model_parallel_region(teacher)


# The measurement


@dataclass
class Reference:
    """float64: the loss, and the gradients of the hidden states and of this rank's rows of the head."""

    loss: float
    hidden: Tensor
    head: Tensor


def make(case: Case, device: torch.device, seed: int) -> tuple[Heads, Reference]:
    """Random tensors of the case, the same at every layout, and what their gradients should be. Collective.

    Both models' logits have a standard deviation of 2. The reference is unsharded: every rank computes some of the
    tokens over the whole vocabulary, and two all-reduces put them together.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    generator = torch.Generator(device).manual_seed(seed)

    def draw(rows: int, columns: int, scale: float) -> Tensor:
        numbers = torch.randn(rows, columns, generator=generator, device=device)
        return numbers.mul_(scale).to(case.dtype)

    student_hidden = draw(case.tokens, case.student_hidden, 1.0)
    teacher_hidden = draw(case.tokens, case.teacher_hidden, 1.0)
    student_head = draw(case.vocabulary, case.student_hidden, 2 / case.student_hidden**0.5)
    teacher_head = draw(case.vocabulary, case.teacher_hidden, 2 / case.teacher_hidden**0.5)
    reference = _reference(student_hidden, student_head, teacher_hidden, teacher_head, group)

    def own(head: Tensor) -> Tensor:
        return head.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()

    heads = Heads(
        student_hidden.requires_grad_(),
        own(student_head).requires_grad_(),
        teacher_hidden,
        own(teacher_head),
        case.vocabulary,
        group,
    )
    if case.dtype != torch.float32:
        heads.main_grad = torch.zeros(heads.student_head.shape, device=device)
    return heads, reference


def _reference(
    student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, group: ProcessGroup
) -> Reference:
    ranks, rank, tokens = dist.get_world_size(group), dist.get_rank(group), student_hidden.shape[0]
    head, teacher_head = student_head.double().requires_grad_(), teacher_head.double()
    hidden_gradient = torch.zeros(student_hidden.shape, dtype=torch.float64, device=student_hidden.device)
    loss = torch.zeros((), dtype=torch.float64, device=student_hidden.device)
    for index, first in enumerate(range(0, tokens, _REFERENCE_TOKENS)):
        if index % ranks != rank:
            continue
        part = slice(first, first + _REFERENCE_TOKENS)
        hidden = student_hidden[part].double().requires_grad_()
        log_q = F.log_softmax(hidden @ head.t(), dim=-1)
        log_p = F.log_softmax(teacher_hidden[part].double() @ teacher_head.t(), dim=-1)
        term = (log_p.exp() * (log_p - log_q)).sum() / tokens
        term.backward()
        assert hidden.grad is not None
        hidden_gradient[part] = hidden.grad
        loss += term.detach()
    head_gradient = torch.zeros_like(head) if head.grad is None else head.grad
    for tensor in (hidden_gradient, head_gradient, loss):
        dist.all_reduce(tensor, group=group)
    return Reference(float(loss), hidden_gradient, head_gradient.chunk(ranks)[rank].clone())


def run(
    contenders: Mapping[str, Contender], heads: Heads, reference: Reference, *, rounds: int, warmup: int
) -> dict[str, Measurement | Unavailable]:
    """Every contender on the same tensors. Collective.

    The timed passes take turns. A contender that does not fit into the memory is Unavailable.
    """
    device = heads.student_hidden.device
    found: dict[str, Measurement | Unavailable] = dict.fromkeys(contenders, Unavailable("does not fit into the memory"))
    works = {name: partial(_pass, contender, heads) for name, contender in contenders.items()}
    with cpu_runtime.suspended():
        before: dict[str, tuple[int, float, float]] = {}
        for name, work in works.items():
            heads.clear()
            fits = measure.fits(work, device)  # compiles, too, and fills the caches of libraries
            heads.clear()
            if fits:
                peak, loss = measure.peak_bytes(work, device)
                own = sum(g.numel() * g.element_size() for g in heads.new_gradients())
                loss_error = abs(float(loss) - reference.loss) / abs(reference.loss)
                before[name] = peak - own, relative_error(heads, reference), loss_error
        times = measure.seconds_in_turns(
            {name: works[name] for name in before},
            device,
            rounds=rounds,
            warmup=warmup,
            before=lambda name: heads.clear(),
        )
        heads.clear()
    for name, (peak, error, loss_error) in before.items():
        found[name] = Measurement(peak, statistics.median(times[name]), min(times[name]), error, loss_error)
    return found


def _pass(contender: Contender, heads: Heads) -> Tensor:
    loss = contender(heads)
    loss.backward()
    return loss.detach()


def relative_error(heads: Heads, reference: Reference) -> float:
    """The greater error of both gradients. One all-reduce of two numbers, since the head is sharded."""
    hidden, head = heads.gradients()
    squares = torch.stack([(head.double() - reference.head).square().sum(), reference.head.square().sum()])
    dist.all_reduce(squares, group=heads.group)
    of_hidden = (hidden.double() - reference.hidden).norm() / reference.hidden.norm()
    return measure.greatest(max(float(of_hidden), float((squares[0] / squares[1]).sqrt())), hidden.device)
