"""What is done to the logits of one chunk of tokens, in plain torch: two reads for sums, one that leaves the gradient.

Everything takes the logits of this rank's columns, at most a few (tokens, width) tensors, and gives numbers per token:

    statistics   the local maxima, where they are, and sums of exponentials: after one exchange over the shards these
                 give each model's normalizers, cross-entropy, and the divergences that are the mean of a log-ratio
    sums         what needs the normalizers first: the sums of f and g of any other divergence, and telemetry
    gradient     d loss / d student logits, by the closed form of family.py, which may overwrite the student's logits

None of them communicates or keeps anything: the exponentials are computed again from the logits in each. Arithmetic is
fp32 whatever the logits' dtype, in blocks of rows that stay in a processor's cache.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pipelines.core.family import Divergence

# The rows of `statistics`, (row, tokens) fp32. z = (logit - the rank's greatest logit) / T.
STATISTICS = (
    "student_max",  # the greatest logit of this rank's columns; -inf where it has none
    "student_id",  # its token id, the lowest where several are equal
    "student_sum",  # of exp(z)
    "student_sum_at_1",  # of exp(z) at T = 1
    "label",  # the label's logit; 0 where the label is on another rank
    "teacher_max",
    "teacher_id",
    "teacher_sum",
    "teacher_sum_at_1",
    "cross",  # sum of exp(z_a) (z_a - z_b) with a the model `divergence.under` names
    "teacher_tail",  # log of the sum of exp(z) over the columns outside the teacher's top k
    "student_tail",  # the same columns
)
OF_STUDENT, OF_BOTH = 5, 10  # how many of them there are without a teacher, and without a top k

# The rows of `sums`, (row, tokens) fp32.
SUMS = (
    "value",  # of f; without the tail's bucket
    "slope",  # of g; without the tail's bucket
    "overlap",  # of min(p, q), at T = 1
    "entropy",  # of -p log p, at T = 1
)

_BLOCK_BYTES = {"cpu": 1 << 20}
_BLOCK_BYTES_ELSEWHERE = 1 << 26


class Chunk(NamedTuple):
    """The logits of one chunk and what is asked of them; columns are this rank's vocabulary without its padding.

    student, teacher: (tokens, width) of any floating dtype; teacher None: cross-entropy alone. columns, here:
    (tokens,) int64 and bool, the label's column and whether it is on this rank; None: no labels. start: token id of
    column 0. threshold: (tokens,) fp32, the teacher's k-th greatest logit over the whole vocabulary: columns from it up
    are buckets of their own, the rest is one bucket, the tail; None: every column is its own. telemetry: asked for.
    """

    student: Tensor
    teacher: Tensor | None
    columns: Tensor | None
    here: Tensor | None
    start: int
    temperature: float
    divergence: Divergence
    threshold: Tensor | None = None
    telemetry: bool = False

    @property
    def one_read(self) -> bool:
        """Whether `statistics` alone gives the divergence."""
        return self.teacher is None or (self.divergence.under is not None and self.threshold is None)

    @property
    def statistics_rows(self) -> int:
        """How many of STATISTICS are asked for."""
        return OF_STUDENT if self.teacher is None else OF_BOTH if self.threshold is None else len(STATISTICS)

    def statistics_without_columns(self) -> Tensor:
        """What `statistics` gives on a rank without a column: sums of 0, maxima and tails of -inf."""
        rows = torch.zeros(self.statistics_rows, self.student.shape[0], device=self.student.device)
        for name in ("student_max", "teacher_max", "teacher_tail", "student_tail"):
            if STATISTICS.index(name) < len(rows):
                rows[STATISTICS.index(name)] = -torch.inf
        return rows


class Normalizers(NamedTuple):
    """Over the whole vocabulary, (tokens,) fp32 each: log q = (logit - student_max) / T - student_log_sum.

    _at_1: the same at T = 1. slope: the sum of g over all buckets. tail_slope, tail_log_q: g and log q of the tail's
    bucket. None: not asked for.
    """

    student_max: Tensor
    student_log_sum: Tensor
    student_log_sum_at_1: Tensor
    teacher_max: Tensor | None = None
    teacher_log_sum: Tensor | None = None
    teacher_log_sum_at_1: Tensor | None = None
    slope: Tensor | None = None
    tail_slope: Tensor | None = None
    tail_log_q: Tensor | None = None


class Kernels(Protocol):
    """The three operations, for one kind of device; this module is the implementation in plain torch."""

    def statistics(self, chunk: Chunk) -> Tensor: ...
    def sums(self, chunk: Chunk, normal: Normalizers) -> Tensor: ...
    def gradient(
        self, chunk: Chunk, normal: Normalizers, kd_factor: Tensor | None, ce_factor: Tensor | None, out: Tensor
    ) -> None: ...


def statistics(chunk: Chunk) -> Tensor:
    """(rows, tokens) fp32 of this rank's columns, in the order of STATISTICS; rows at the end may be missing.

    One read of the logits. A rank without a column gives maxima and tails of -inf and sums of 0.
    """
    student, teacher, T = chunk.student, chunk.teacher, chunk.temperature
    if student.shape[1] == 0:
        return chunk.statistics_without_columns()
    rows = torch.zeros(chunk.statistics_rows, student.shape[0], device=student.device)
    for part in _blocks(student):
        row = dict(zip(STATISTICS, rows[:, part].unbind(), strict=False))
        logits = student[part].float()
        z_student = _below_maximum(logits, row["student_max"], row["student_id"], chunk.start)
        if chunk.columns is not None and chunk.here is not None:
            found = logits.gather(1, chunk.columns[part].unsqueeze(1)).squeeze(1)
            row["label"].copy_(torch.where(chunk.here[part], found, 0.0))
        if T != 1:
            torch.sum(z_student.exp(), dim=1, out=row["student_sum_at_1"])
            z_student.div_(T)
        if teacher is not None:
            logits = teacher[part].float()
            z_teacher = _below_maximum(logits, row["teacher_max"], row["teacher_id"], chunk.start)
            if T != 1:
                if chunk.telemetry:
                    torch.sum(z_teacher.exp(), dim=1, out=row["teacher_sum_at_1"])
                z_teacher.div_(T)
            if chunk.threshold is not None:
                in_top = logits >= chunk.threshold[part].unsqueeze(1)
                row["teacher_tail"].copy_(z_teacher.masked_fill(in_top, -torch.inf).logsumexp(1))
                row["student_tail"].copy_(z_student.masked_fill(in_top, -torch.inf).logsumexp(1))
            _exponential_sums(chunk, z_student, z_teacher, row)
        else:
            torch.sum(z_student.exp_(), dim=1, out=row["student_sum"])
        if T == 1:
            row["student_sum_at_1"].copy_(row["student_sum"])
            if teacher is not None:
                row["teacher_sum_at_1"].copy_(row["teacher_sum"])
    return rows


def _exponential_sums(chunk: Chunk, z_student: Tensor, z_teacher: Tensor, row: dict[str, Tensor]) -> None:
    """The sums of both models' exponentials and `cross`, over z: (rows, width), which are overwritten."""
    if chunk.one_read:
        teacher_first = chunk.divergence.under == "teacher"
        weight = z_teacher if teacher_first else z_student
        difference = weight - (z_student if teacher_first else z_teacher)
        weight.exp_()
        torch.sum(difference.mul_(weight), dim=1, out=row["cross"])
        torch.sum(weight, dim=1, out=row["teacher_sum" if teacher_first else "student_sum"])
        other = z_student if teacher_first else z_teacher
        torch.sum(other.exp_(), dim=1, out=row["student_sum" if teacher_first else "teacher_sum"])
    else:
        torch.sum(z_teacher.exp_(), dim=1, out=row["teacher_sum"])
        torch.sum(z_student.exp_(), dim=1, out=row["student_sum"])


def sums(chunk: Chunk, normal: Normalizers) -> Tensor:
    """(rows, tokens) fp32 of this rank's columns, in the order of SUMS; the last two only where telemetry is asked for.

    One read of the logits. Value and slope are 0 where `statistics` gives the divergence.
    """
    student, teacher = chunk.student, chunk.teacher
    assert teacher is not None
    rows = torch.zeros(len(SUMS) if chunk.telemetry else 2, student.shape[0], device=student.device)
    parameter = chunk.divergence.parameter
    for part in _blocks(student):
        log_q, log_p = _log_probabilities(chunk, normal, part)
        if not chunk.one_read:
            value = chunk.divergence.value(log_p, log_q, parameter)
            slope = chunk.divergence.slope(log_p, log_q, parameter)
            if chunk.threshold is not None:
                in_tail = teacher[part].float() < chunk.threshold[part].unsqueeze(1)
                value, slope = value.masked_fill_(in_tail, 0), slope.masked_fill_(in_tail, 0)
            rows[0, part], rows[1, part] = value.sum(1), slope.sum(1)
        if chunk.telemetry:
            if chunk.temperature != 1:
                log_q, log_p = _log_probabilities(chunk, normal, part, at_1=True)
            rows[2, part] = torch.minimum(log_p, log_q).exp_().sum(1)
            rows[3, part] = log_p.exp().mul_(log_p).sum(1).neg_()
    return rows


def gradient(
    chunk: Chunk, normal: Normalizers, kd_factor: Tensor | None, ce_factor: Tensor | None, out: Tensor
) -> None:
    """out: (tokens, width) of any floating dtype, which may be the student's logits themselves; one read, one write.

        kd_factor * (g - q * sum g) + ce_factor * (softmax(student) - [column = label])

    kd_factor, ce_factor: (tokens,) fp32, the first with the 1 / T of the divergence's gradient in it; None: no such
    term. In the tail's bucket g is the bucket's, shared by q / q_tail.
    """
    for part in _blocks(chunk.student):
        q_at_1 = None
        if ce_factor is not None and (chunk.temperature != 1 or kd_factor is None):
            logits = chunk.student[part]
            q_at_1 = _log_softmax(logits, normal.student_max, normal.student_log_sum_at_1, 1.0, part).exp_()
            q_at_1.mul_(ce_factor[part].unsqueeze(1))
        if kd_factor is not None:
            block = _divergence_gradient(chunk, normal, kd_factor, ce_factor if q_at_1 is None else None, part)
            if q_at_1 is not None:
                block.add_(q_at_1)
        else:
            assert q_at_1 is not None
            block = q_at_1
        if ce_factor is not None and block.shape[1]:
            assert chunk.columns is not None and chunk.here is not None
            label = torch.where(chunk.here[part], -ce_factor[part], 0.0)
            block.scatter_add_(1, chunk.columns[part].unsqueeze(1), label.unsqueeze(1))
        out[part] = block


def _divergence_gradient(
    chunk: Chunk, normal: Normalizers, kd_factor: Tensor, q_factor: Tensor | None, part: slice
) -> Tensor:
    """kd_factor * (g - q * sum g) + q_factor * q of some rows."""
    assert chunk.teacher is not None and normal.slope is not None
    log_q, log_p = _log_probabilities(chunk, normal, part)
    slope = chunk.divergence.slope(log_p, log_q, chunk.divergence.parameter)
    if chunk.threshold is not None:
        assert normal.tail_slope is not None and normal.tail_log_q is not None
        in_tail = chunk.teacher[part].float() < chunk.threshold[part].unsqueeze(1)
        # A share of the bucket is at most 1, while g / q of the bucket may overflow.
        share = (log_q - normal.tail_log_q[part].unsqueeze(1)).clamp_(max=0).exp_()
        slope = torch.where(in_tail, share.mul_(normal.tail_slope[part].unsqueeze(1)), slope)
    of_q = -kd_factor[part] * normal.slope[part]
    if q_factor is not None:
        of_q += q_factor[part]
    return log_q.exp_().mul_(of_q.unsqueeze(1)).addcmul_(slope, kd_factor[part].unsqueeze(1))


def _log_probabilities(chunk: Chunk, normal: Normalizers, part: slice, *, at_1: bool = False) -> tuple[Tensor, Tensor]:
    """log q, log p: new fp32 tensors of some rows, by the same operations: equal logits give equal bits."""
    assert chunk.teacher is not None and normal.teacher_max is not None
    student_sum = normal.student_log_sum_at_1 if at_1 else normal.student_log_sum
    teacher_sum = normal.teacher_log_sum_at_1 if at_1 else normal.teacher_log_sum
    assert teacher_sum is not None
    temperature = 1.0 if at_1 else chunk.temperature
    return (
        _log_softmax(chunk.student[part], normal.student_max, student_sum, temperature, part),
        _log_softmax(chunk.teacher[part], normal.teacher_max, teacher_sum, temperature, part),
    )


def _log_softmax(logits: Tensor, maxima: Tensor, log_sums: Tensor, temperature: float, part: slice) -> Tensor:
    """(logits - maxima) / T - log_sums; not in one step, which would round at the size of the logits."""
    shifted = logits - maxima[part].unsqueeze(1)
    if temperature != 1:
        shifted.div_(temperature)
    return shifted.sub_(log_sums[part].unsqueeze(1))


def _below_maximum(logits: Tensor, maxima: Tensor, ids: Tensor, start: int) -> Tensor:
    """logits - their row's maximum, a new tensor; writes the maxima and their token ids."""
    values, columns = logits.max(dim=1)
    maxima.copy_(values)
    ids.copy_(columns.add_(start))
    return logits - values.unsqueeze(1)


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Rows of `logits`, in parts of which fp32 tensors are small."""
    tokens, width = logits.shape
    size = _BLOCK_BYTES.get(logits.device.type, _BLOCK_BYTES_ELSEWHERE)
    rows = max(1, size // (4 * max(1, width)))
    for first in range(0, tokens, rows):
        yield slice(first, min(first + rows, tokens))
