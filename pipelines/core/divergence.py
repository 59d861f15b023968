"""Divergence, cross-entropy and agreement of vocabulary-sharded logits: nats per token, gradients in closed form.

    p = softmax(teacher / T), q = softmax(student / T), both over the vocabulary without its padding
    kd = D(p, q) of family.py                                    d kd / d student_v = (g_v - q_v * sum_u g_u) / T
    ce = -log softmax(student)_label                             d ce / d student_v = softmax(student)_v - [v = label]

`measure` is the one function for both: for logits that exist (`token_terms`, here) and for those that are built chunk
by chunk from hidden states (linear_divergence.py). Each rank reduces its own columns (chunk.py); the ranks exchange a
few numbers per token, once for the normalizers, and a second time where a sum needs these first. The gradients need no
exchange: each rank writes its own columns.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipelines.core.chunk import STATISTICS, Chunk, Kernels, Normalizers
from pipelines.core.family import FORWARD_KL, Divergence
from pipelines.core.kernels import kernels_for
from pipelines.core.vocab_parallel import IGNORED_LABEL, Shard, gather_over_shards


class Telemetry(NamedTuple):
    """One number per token at temperature 1, (tokens,) fp32, replicated over the shard's group, without gradients.

    overlap: sum of min(p, q). teacher_entropy: nats. _confidence: the greatest probability; _correct: 1 where the most
    likely token is the label, else 0, also where the label is -100.
    """

    overlap: Tensor
    teacher_entropy: Tensor
    student_confidence: Tensor
    teacher_confidence: Tensor
    student_correct: Tensor
    teacher_correct: Tensor


class TokenTerms(NamedTuple):
    """One number per token, (tokens,) fp32, replicated over the shard's group. None: not asked for.

    loss: kd_scale * kd + ce_scale * ce, and the only one that carries a gradient. kd: the divergence at temperature T,
    without T^2. ce: cross-entropy at temperature 1, 0 where the label is -100. agreement: 1 where teacher and student
    have the same most likely token, else 0.
    """

    loss: Tensor
    kd: Tensor | None
    ce: Tensor | None
    agreement: Tensor | None
    telemetry: Telemetry | None = None


def token_terms(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    *,
    kd_scale: float,
    ce_scale: float,
    temperature: float,
    shard: Shard,
    divergence: Divergence = FORWARD_KL,
    top_k: int | None = None,
    telemetry: bool = False,
    kernels: Kernels | None = None,
) -> TokenTerms:
    """Per-token divergence, cross-entropy, agreement and their weighted sum.

    student_logits: (tokens, vocab / tp) of any floating dtype; arithmetic is fp32, the gradient has the logits' dtype.
    teacher_logits: the same columns, no gradient; None: neither kd nor agreement is computed.
    labels: (tokens,) int64 token ids or -100; None: ce is not computed. A scale of 0 costs no gradient work.
    top_k: the divergence of k + 1 buckets: the ids of the teacher's k greatest logits over the whole vocabulary (with
    those that equal the k-th), and the rest as one, whose mass is summed in logarithms over the rest itself.
    telemetry: needs teacher and labels. kernels: None: kernels.kernels_for the logits' device.

    Collectives over shard.group: forward one all-gather of at most 12 * tokens fp32 per rank; one more of at most
    4 * tokens for divergences other than the two KLs, top_k or telemetry, one more of top_k * tokens; backward none.
    Raises ValueError where the shapes do not fit.
    """
    if teacher_logits is not None and teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher logits: expected the student's shape {tuple(student_logits.shape)}, found "
            f"{tuple(teacher_logits.shape)}. Where only the padding of the vocabulary differs, align_columns helps."
        )
    check(teacher_logits is not None, labels, temperature, top_k, telemetry, shard)
    width = shard.valid_width(student_logits.shape[1])
    student, teacher = (None if t is None else t.detach()[:, :width] for t in (student_logits, teacher_logits))
    assert student is not None
    chunk = make_chunk(student, teacher, labels, shard, temperature, divergence, top_k, telemetry)
    kernels = kernels or kernels_for(student.device)[0]
    return TokenTerms(
        *_TokenTerms.apply(student_logits, chunk, labels, kd_scale, ce_scale, shard, kernels, torch.is_grad_enabled())
    )


def check(
    has_teacher: bool, labels: Tensor | None, temperature: float, top_k: int | None, telemetry: bool, shard: Shard
) -> None:
    """Raises ValueError where nothing is to be measured or a setting is out of range."""
    if not has_teacher and labels is None:
        raise ValueError("distillation terms: expected a teacher, labels or both, found neither.")
    if telemetry and (labels is None or not has_teacher):
        raise ValueError("telemetry: expected a teacher and labels, found only one of them.")
    if temperature <= 0:
        raise ValueError(f"temperature: expected a number above 0, found {temperature}.")
    if top_k is not None and not 1 <= top_k < shard.vocab_size:
        raise ValueError(f"top_k: expected a number from 1 to the vocabulary's {shard.vocab_size} - 1, found {top_k}.")
    # Token ids travel as fp32.
    assert shard.vocab_size < 1 << 24


def make_chunk(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    shard: Shard,
    temperature: float,
    divergence: Divergence,
    top_k: int | None,
    telemetry: bool,
) -> Chunk:
    """The Chunk of logits (tokens, valid width). With top_k one all-gather of top_k * tokens fp32, else none."""
    columns = here = threshold = None
    if labels is not None:
        columns, here = shard.local_columns(labels, student.shape[1])
    if teacher is None:
        temperature = 1.0  # only the divergence has one; spares the second exponential
    elif top_k is not None:
        threshold = _kth_greatest(teacher, top_k, shard)
    return Chunk(student, teacher, columns, here, shard.start, temperature, divergence, threshold, telemetry)


class Measured(NamedTuple):
    """What `measure` finds, (tokens,) fp32 each; see TokenTerms. greatest: the student's most likely token id."""

    kd: Tensor | None
    ce: Tensor | None
    agreement: Tensor | None
    telemetry: Telemetry | None
    greatest: Tensor


def measure(chunk: Chunk, labels: Tensor | None, shard: Shard, kernels: Kernels) -> tuple[Measured, Normalizers]:
    """Every number per token, and what `Kernels.gradient` needs. No gradients.

    One all-gather over the shard's group, of `statistics`, and a second, of `sums`, where the chunk asks for more than
    the first gives.
    """
    rows = gather_over_shards(kernels.statistics(chunk), shard)
    found = dict(zip(STATISTICS, rows.unbind(1), strict=False))
    T = chunk.temperature
    student = _Model.over_shards("student", found, T)
    teacher = _Model.over_shards("teacher", found, T) if chunk.teacher is not None else None
    ce = None
    if labels is not None:
        ce = student.log_sum_at_1 - (found["label"].sum(0) - student.maximum)
        ce = torch.where(labels != IGNORED_LABEL, ce, 0.0)
    normal = Normalizers(student.maximum, student.log_sum, student.log_sum_at_1)
    if teacher is None:
        return Measured(None, ce, None, None, student.greatest), normal
    normal = normal._replace(
        teacher_max=teacher.maximum, teacher_log_sum=teacher.log_sum, teacher_log_sum_at_1=teacher.log_sum_at_1
    )
    summed = None
    if not chunk.one_read or chunk.telemetry:
        summed = gather_over_shards(kernels.sums(chunk, normal), shard).sum(0)
    if chunk.one_read:
        kd, slope = _mean_of_log_ratio(chunk.divergence, found["cross"], teacher, student)
        normal = normal._replace(slope=slope)
    else:
        assert summed is not None
        kd, normal = _with_tail(chunk, summed[0], summed[1], found, teacher, student, normal)
    seen = None
    if chunk.telemetry:
        assert summed is not None and labels is not None
        seen = Telemetry(
            summed[2],
            summed[3],
            student.log_sum_at_1.neg().exp(),
            teacher.log_sum_at_1.neg().exp(),
            (student.greatest == labels).float(),
            (teacher.greatest == labels).float(),
        )
    agreement = (student.greatest == teacher.greatest).float()
    return Measured(kd, ce, agreement, seen, student.greatest), normal


def greatest(logits: Tensor, shard: Shard, kernels: Kernels) -> Tensor:
    """(tokens,) fp32: the id of the greatest logit over the whole vocabulary, the lowest where several are equal.

    logits: (tokens, valid width). One all-gather of 5 * tokens fp32 over the shard's group.
    """
    chunk = Chunk(logits, None, None, None, shard.start, 1.0, FORWARD_KL)
    rows = gather_over_shards(kernels.statistics(chunk), shard)
    return _Model.over_shards("student", dict(zip(STATISTICS, rows.unbind(1), strict=False)), 1.0).greatest


class _Model(NamedTuple):
    """One model's numbers over the whole vocabulary, (tokens,) each; shift and sum: (ranks, tokens), what each rank
    had: its maximum below the greatest of all, over T, and its sum of exponentials."""

    maximum: Tensor
    greatest: Tensor
    log_sum: Tensor
    log_sum_at_1: Tensor
    shift: Tensor
    sum: Tensor

    @classmethod
    def over_shards(cls, name: str, rows: dict[str, Tensor], temperature: float) -> "_Model":
        maxima = rows[f"{name}_max"]
        maximum = maxima.amax(0)
        greatest = torch.where(maxima == maximum, rows[f"{name}_id"], torch.inf).amin(0)
        below = maxima - maximum
        shift = below / temperature
        log_sum = (shift.exp() * rows[f"{name}_sum"]).sum(0).log()
        log_sum_at_1 = (below.exp() * rows[f"{name}_sum_at_1"]).sum(0).log()
        return cls(maximum, greatest, log_sum, log_sum_at_1, shift, rows[f"{name}_sum"])


def _mean_of_log_ratio(
    divergence: Divergence, cross: Tensor, teacher: _Model, student: _Model
) -> tuple[Tensor, Tensor]:
    """The divergence and the sum of its slope, -1 under the teacher and the divergence itself under the student."""
    a, b = (teacher, student) if divergence.under == "teacher" else (student, teacher)
    # A rank without a column has sums of 0 and shifts of -inf.
    moved = torch.where(a.sum > 0, (a.shift - b.shift) * a.sum, 0.0)
    mean = (a.shift.exp() * (cross + moved)).sum(0) / a.log_sum.exp()
    kd = mean - (a.log_sum - b.log_sum)
    return kd, torch.full_like(kd, -1.0) if divergence.under == "teacher" else kd


def _with_tail(
    chunk: Chunk,
    value: Tensor,
    slope: Tensor,
    rows: dict[str, Tensor],
    teacher: _Model,
    student: _Model,
    normal: Normalizers,
) -> tuple[Tensor, Normalizers]:
    """The divergence from the sums of f and g, with the tail's bucket added where there is one."""
    if chunk.threshold is None:
        return value, normal._replace(slope=slope)
    log_p = (rows["teacher_tail"] + teacher.shift).logsumexp(0) - teacher.log_sum
    log_q = (rows["student_tail"] + student.shift).logsumexp(0) - student.log_sum
    empty = log_p == -torch.inf  # every id is as probable as the k-th
    tails = (log_p.masked_fill(empty, 0), log_q.masked_fill(empty, 0), chunk.divergence.parameter)
    tail_value = chunk.divergence.value(*tails).masked_fill(empty, 0)
    tail_slope = chunk.divergence.slope(*tails).masked_fill(empty, 0)
    normal = normal._replace(slope=slope + tail_slope, tail_slope=tail_slope, tail_log_q=log_q)
    return value + tail_value, normal


def _kth_greatest(teacher: Tensor, k: int, shard: Shard) -> Tensor:
    """(tokens,) fp32: the k-th greatest of each token's logits over the whole vocabulary."""
    own = teacher.topk(min(k, teacher.shape[1]), dim=1).values.float()
    values = own.new_full((teacher.shape[0], k), -torch.inf)
    values[:, : own.shape[1]] = own
    return gather_over_shards(values, shard).transpose(0, 1).flatten(1).topk(k, dim=1).values[:, -1]


class _TokenTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        chunk: Chunk,
        labels: Tensor | None,
        kd_scale: float,
        ce_scale: float,
        shard: Shard,
        kernels: Kernels,
        with_gradient: bool,
    ) -> tuple[Any, ...]:
        measured, normal = measure(chunk, labels, shard, kernels)
        loss, kd_factor, ce_factor = weighted(measured, labels, kd_scale, ce_scale, chunk.temperature)
        if with_gradient and ctx.needs_input_grad[0]:
            gradient = torch.zeros_like(student)
            if kd_factor is not None or ce_factor is not None:
                valid = gradient[:, : chunk.student.shape[1]]
                kernels.gradient(chunk, normal, kd_factor, ce_factor, valid)
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(*(term for term in measured[:3] if term is not None), *(measured.telemetry or ()))
        return loss, *measured[:4]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # In place: autograd's version counter turns a second backward through the same graph into an error.
        gradient.mul_(loss_gradient.unsqueeze(1))
        return gradient, None, None, None, None, None, None, None


def weighted(
    measured: Measured, labels: Tensor | None, kd_scale: float, ce_scale: float, temperature: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """kd_scale * kd + ce_scale * ce per token, and the factors of both terms for `Kernels.gradient`, (tokens,) each.

    The factor of a term without weight is None. Labels of -100 have a factor of 0.
    """
    kd, ce = measured.kd, measured.ce
    some = kd if kd is not None else ce
    assert some is not None
    loss, kd_factor, ce_factor = torch.zeros_like(some), None, None
    if kd is not None and kd_scale:
        loss += kd_scale * kd
        kd_factor = torch.full_like(kd, kd_scale / temperature)
    if ce is not None and labels is not None and ce_scale:
        loss += ce_scale * ce
        ce_factor = ce_scale * (labels != IGNORED_LABEL).float()
    return loss, kd_factor, ce_factor
