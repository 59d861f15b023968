"""The three operations of chunk.py as Triton kernels, for a GPU; or, with TRITON_INTERPRET=1 set before Triton is first
imported, for any device through its interpreter, which is there for tests.

A program takes a row of logits (in `gradient` a row or a part of one) in blocks of columns, in fp32 whatever the dtype.
Both models are read in one launch, each logit once; nothing of the size of the logits is kept, and nothing waits for
the host. Bytes that move for a column of a token, with logits in fp32 (bf16):

    statistics   both models read                           8  (4)
    sums         both models read                           8  (4)
    gradient     both models read, the gradient written    12  (6); 10 from fp32 into bf16

Under either KL 8,192 tokens of 128,256 columns move 18.9 GB from fp32 into bf16, or 10.5 GB in bf16: 4.4 and 2.4 ms at
the 4.3 TB/s of an H200's memory. Compiled for it, statistics take 16 instructions per logit, where its schedulers have
time for 27 (14) while the logit arrives; the logarithms of JSD and skew KL make sums and gradient of these take 50.

statistics keeps running maxima and sums relative to them. When the maxima of a and b rise by u_a and u_b,

    sum exp(z_a)                becomes  exp(-u_a) * it
    sum exp(z_a) (z_a - z_b)    becomes  exp(-u_a) * (it + (u_b - u_a) * sum exp(z_a))

which keeps the second exactly 0 for equal models. z_a - z_b is a difference of differences, without a product that
the compiler might fuse into it, and is divided by T at the end. Maxima rise seldom: that, and the search for the
column, is behind a branch.

A logit below LOWEST, -inf too, counts as LOWEST: probability 0 in either model, without an inf - inf. NaN stays NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipelines.core import triton_pointwise as pointwise
from pipelines.core.chunk import SUMS, Chunk, Normalizers

# Columns in a block, fewer where the shard is narrower: 8 of each model for a thread of 8 warps, which leaves registers
# and shared memory for 4 programs at once on a multiprocessor.
GREATEST_BLOCK = 2048
WARPS = 8
STAGES = 3  # blocks under way at once in `statistics`, whose maxima make its threads wait for each other
PROGRAMS = 2048  # that `gradient` makes of fewer rows: some for every multiprocessor

LOWEST = tl.constexpr(-1e35)
LOG2_E = tl.constexpr(1.4426950408889634)


def statistics(chunk: Chunk) -> Tensor:
    """As chunk.statistics. One launch, none where there is no row or no column."""
    student, teacher = chunk.student, chunk.teacher
    tokens, width = student.shape
    if width == 0:
        return chunk.statistics_without_columns()
    rows = torch.empty(chunk.statistics_rows, tokens, device=student.device)
    if tokens == 0:
        return rows
    with torch.cuda.device_of(student):
        _statistics[(tokens,)](
            student,
            teacher,
            _numbers(chunk.columns),
            _numbers(chunk.here),
            _numbers(chunk.threshold),
            rows,
            _row_stride(student),
            _row_stride(teacher),
            tokens,
            width,
            chunk.start,
            chunk.temperature,
            UNDER=chunk.divergence.under if teacher is not None and chunk.one_read else None,
            HOT=chunk.temperature != 1,
            TELEMETRY=chunk.telemetry,
            STAGES=STAGES,
            **_launch(width),
        )
    return rows


def sums(chunk: Chunk, normal: Normalizers) -> Tensor:
    """As chunk.sums. One launch, none where nothing is asked for or there is no row or no column."""
    student, teacher = chunk.student, chunk.teacher
    assert teacher is not None
    tokens, width = student.shape
    rows = torch.zeros(len(SUMS) if chunk.telemetry else 2, tokens, device=student.device)
    if tokens == 0 or width == 0 or (chunk.one_read and not chunk.telemetry):
        return rows
    with torch.cuda.device_of(student):
        _sums[(tokens,)](
            student,
            teacher,
            _numbers(chunk.threshold),
            *(_numbers(numbers) for numbers in normal[:6]),
            rows,
            _row_stride(student),
            _row_stride(teacher),
            tokens,
            width,
            chunk.temperature,
            chunk.divergence.parameter,
            NAME=None if chunk.one_read else chunk.divergence.name,
            HOT=chunk.temperature != 1,
            TELEMETRY=chunk.telemetry,
            **_launch(width),
        )
    return rows


def gradient(
    chunk: Chunk, normal: Normalizers, kd_factor: Tensor | None, ce_factor: Tensor | None, out: Tensor
) -> None:
    """As chunk.gradient. One launch, none where there is no row or no column."""
    student = chunk.student
    teacher = chunk.teacher if kd_factor is not None else None
    assert kd_factor is not None or ce_factor is not None
    tokens, width = student.shape
    if tokens == 0 or width == 0:
        return
    launch = _launch(width)
    blocks = triton.cdiv(width, launch["BLOCK"])
    blocks_of_a_part = triton.cdiv(blocks, min(blocks, triton.cdiv(PROGRAMS, tokens)))
    with torch.cuda.device_of(student):
        _gradient[(tokens, triton.cdiv(blocks, blocks_of_a_part))](
            student,
            teacher,
            out,
            _numbers(chunk.columns),
            _numbers(chunk.here),
            _numbers(chunk.threshold),
            *(_numbers(numbers) for numbers in normal[:5]),
            *(_numbers(numbers) for numbers in normal[6:]),
            _numbers(kd_factor),
            _numbers(ce_factor),
            _row_stride(student),
            _row_stride(teacher),
            _row_stride(out),
            width,
            blocks_of_a_part * launch["BLOCK"],
            chunk.temperature,
            chunk.divergence.parameter,
            NAME=chunk.divergence.name,
            HOT=chunk.temperature != 1,
            **launch,
        )


def _launch(width: int) -> dict[str, int]:
    """By a rule: a search at run time would cost the first steps time, and change the order of sums from run to run."""
    block = max(16, min(GREATEST_BLOCK, triton.next_power_of_2(width)))
    return {"BLOCK": block, "num_warps": max(1, min(WARPS, block // 256))}


def _numbers(values: Tensor | None) -> Tensor | None:
    """One number per token, side by side."""
    return None if values is None else values.contiguous()


def _row_stride(logits: Tensor | None) -> int:
    if logits is None:
        return 0
    assert logits.shape[1] == 1 or logits.stride(1) == 1, "expected the columns of a row side by side in memory"
    return logits.stride(0)


@triton.jit(do_not_specialize=["tokens", "start"])
def _statistics(
    student, teacher, label_column, label_here, threshold, rows, student_stride, teacher_stride, tokens, width, start,
    temperature, UNDER: tl.constexpr, HOT: tl.constexpr, TELEMETRY: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    scale = LOG2_E / temperature
    max_s, id_s, sum_s, sum_s_at_1 = _nothing(BLOCK)
    max_t, id_t, sum_t, sum_t_at_1 = _nothing(BLOCK)
    tail_max_s, _, tail_s, cross = _nothing(BLOCK)
    tail_max_t, _, tail_t, _ = _nothing(BLOCK)
    if teacher is not None:
        teacher += row * teacher_stride
    if threshold is not None:
        cut = tl.load(threshold + row)
    for first in tl.range(0, width, BLOCK, num_stages=STAGES):
        columns = first + tl.arange(0, BLOCK)
        s = _load(student, columns, width)
        if teacher is not None:
            t = _load(teacher, columns, width)
            new_s, new_t = tl.split(tl.max(tl.join(s, t), 0))
        else:
            new_s, new_t = tl.max(s, 0), max_t
        if threshold is not None:
            in_tail = (t < cut) & (columns < width)
            tail_max_s, tail_s = _add_tail(s, in_tail, tail_max_s, tail_s, scale, BLOCK)
            tail_max_t, tail_t = _add_tail(t, in_tail, tail_max_t, tail_t, scale, BLOCK)
        if (new_s > max_s) | (new_t > max_t):
            max_s, id_s, up_s = _raise_maximum(max_s, id_s, new_s, s, columns)
            if teacher is not None:
                max_t, id_t, up_t = _raise_maximum(max_t, id_t, new_t, t, columns)
                if UNDER == "teacher":
                    cross = tl.exp2(-up_t * scale) * (cross + (up_s - up_t) * sum_t)
                elif UNDER == "student":
                    cross = tl.exp2(-up_s * scale) * (cross + (up_t - up_s) * sum_s)
                sum_t *= tl.exp2(-up_t * scale)
                sum_t_at_1 *= tl.exp2(-up_t * LOG2_E)
            sum_s *= tl.exp2(-up_s * scale)
            sum_s_at_1 *= tl.exp2(-up_s * LOG2_E)
        s -= max_s
        exp_s = tl.exp2(s * scale)
        sum_s += _fold(exp_s, BLOCK)
        if HOT:
            sum_s_at_1 += _fold(tl.exp2(s * LOG2_E), BLOCK)
        if teacher is not None:
            t -= max_t
            exp_t = tl.exp2(t * scale)
            sum_t += _fold(exp_t, BLOCK)
            if HOT and TELEMETRY:
                sum_t_at_1 += _fold(tl.exp2(t * LOG2_E), BLOCK)
            if UNDER == "teacher":
                cross += _fold(exp_t * (t - s), BLOCK)
            elif UNDER == "student":
                cross += _fold(exp_s * (s - t), BLOCK)
    # In the order of STATISTICS. The maxima leave NaN out: it comes to them from the sums.
    rows += row
    total_s, total_t = tl.sum(sum_s, 0), tl.sum(sum_t, 0)
    tl.store(rows, max_s + 0 * total_s)
    tl.store(rows + tokens, (id_s + start).to(tl.float32))
    tl.store(rows + 2 * tokens, total_s)
    tl.store(rows + 3 * tokens, tl.sum(sum_s_at_1, 0) if HOT else total_s)
    label = 0.0
    if label_column is not None:
        label = tl.load(student + tl.load(label_column + row), mask=tl.load(label_here + row), other=0.0)
    tl.store(rows + 4 * tokens, label)
    if teacher is not None:
        tl.store(rows + 5 * tokens, max_t + 0 * total_t)
        tl.store(rows + 6 * tokens, (id_t + start).to(tl.float32))
        tl.store(rows + 7 * tokens, total_t)
        tl.store(rows + 8 * tokens, tl.sum(sum_t_at_1, 0) if HOT else total_t)
        tl.store(rows + 9 * tokens, tl.sum(cross, 0) / temperature)
    if threshold is not None:
        tl.store(rows + 10 * tokens, (tail_max_t - max_t) / temperature + tl.log(tl.sum(tail_t, 0)))
        tl.store(rows + 11 * tokens, (tail_max_s - max_s) / temperature + tl.log(tl.sum(tail_s, 0)))


@triton.jit(do_not_specialize=["tokens"])
def _sums(
    student, teacher, threshold, student_max, student_log_sum, student_log_sum_at_1, teacher_max, teacher_log_sum,
    teacher_log_sum_at_1, rows, student_stride, teacher_stride, tokens, width, temperature, parameter,
    NAME: tl.constexpr, HOT: tl.constexpr, TELEMETRY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    inverse = 1.0 / temperature
    max_s, max_t = tl.load(student_max + row), tl.load(teacher_max + row)
    log_sum_s, log_sum_t = tl.load(student_log_sum + row), tl.load(teacher_log_sum + row)
    if TELEMETRY:
        log_sum_s_at_1, log_sum_t_at_1 = tl.load(student_log_sum_at_1 + row), tl.load(teacher_log_sum_at_1 + row)
    if threshold is not None:
        cut = tl.load(threshold + row)
    _, _, value, slope = _nothing(BLOCK)
    _, _, overlap, entropy = _nothing(BLOCK)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        s, t = _load(student, columns, width), _load(teacher, columns, width)
        if NAME is not None:
            log_q = (s - max_s) * inverse - log_sum_s
            log_p = (t - max_t) * inverse - log_sum_t
            f = pointwise.value(log_p, log_q, parameter, NAME)
            g = pointwise.slope(log_p, log_q, parameter, NAME)
            if threshold is not None:
                f, g = tl.where(t < cut, 0.0, f), tl.where(t < cut, 0.0, g)
            value += _fold(f, BLOCK)
            slope += _fold(g, BLOCK)
        if TELEMETRY:
            log_q = (s - max_s) - log_sum_s_at_1
            log_p = (t - max_t) - log_sum_t_at_1
            overlap += _fold(tl.exp(tl.minimum(log_p, log_q)), BLOCK)
            entropy -= _fold(tl.exp(log_p) * log_p, BLOCK)
    # In the order of SUMS.
    rows += row
    tl.store(rows, tl.sum(value, 0))
    tl.store(rows + tokens, tl.sum(slope, 0))
    if TELEMETRY:
        tl.store(rows + 2 * tokens, tl.sum(overlap, 0))
        tl.store(rows + 3 * tokens, tl.sum(entropy, 0))


@triton.jit
def _gradient(
    student, teacher, out, label_column, label_here, threshold, student_max, student_log_sum, student_log_sum_at_1,
    teacher_max, teacher_log_sum, slope_sum, tail_slope, tail_log_q, kd_factor, ce_factor, student_stride,
    teacher_stride, out_stride, width, columns_of_a_part, temperature, parameter, NAME: tl.constexpr,
    HOT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * columns_of_a_part
    student += row * student_stride
    out += row * out_stride
    inverse = 1.0 / temperature
    max_s = tl.load(student_max + row)
    if kd_factor is not None:
        teacher += row * teacher_stride
        max_t, log_sum_t, log_sum_s = (
            tl.load(teacher_max + row), tl.load(teacher_log_sum + row), tl.load(student_log_sum + row)
        )  # fmt: skip
        kd, all_slope = tl.load(kd_factor + row), tl.load(slope_sum + row)
        if threshold is not None:
            cut, slope_tail, log_q_tail = (
                tl.load(threshold + row), tl.load(tail_slope + row), tl.load(tail_log_q + row)
            )  # fmt: skip
    if ce_factor is not None:
        ce, log_sum_s_at_1 = tl.load(ce_factor + row), tl.load(student_log_sum_at_1 + row)
        label = tl.where(tl.load(label_here + row), tl.load(label_column + row).to(tl.int32), -1)
    for first in range(start, min(start + columns_of_a_part, width), BLOCK):
        columns = first + tl.arange(0, BLOCK)
        s = _load(student, columns, width) - max_s
        found = tl.zeros((BLOCK,), tl.float32)
        if kd_factor is not None:
            t = _load(teacher, columns, width)
            log_q = s * inverse - log_sum_s
            g = pointwise.slope((t - max_t) * inverse - log_sum_t, log_q, parameter, NAME)
            if threshold is not None:
                # A share of the bucket is at most 1, while g / q of the bucket may overflow.
                g = tl.where(t < cut, tl.exp(tl.minimum(log_q - log_q_tail, 0.0)) * slope_tail, g)
            q = tl.exp(log_q)
            found = kd * (g - q * all_slope)
        if ce_factor is not None:
            if kd_factor is None or HOT:
                q = tl.exp(s - log_sum_s_at_1)
            found += ce * q
            if (label >= first) & (label < first + BLOCK):
                found -= tl.where(columns == label, ce, 0.0)
        tl.store(out + columns, found, mask=columns < width)


@triton.jit
def _nothing(BLOCK: tl.constexpr):
    """A maximum, its column and two sums, of no column."""
    zeros = tl.zeros((BLOCK // 4,), tl.float32)
    return tl.full((), LOWEST, tl.float32), tl.full((), 0, tl.int32), zeros, zeros


@triton.jit
def _load(logits, columns, width):
    """fp32, LOWEST or more; LOWEST beyond the width."""
    found = tl.load(logits + columns, mask=columns < width, other=LOWEST).to(tl.float32)
    return tl.maximum(found, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _fold(x, BLOCK: tl.constexpr):
    """(BLOCK,) -> (BLOCK / 4,) sums of four neighbours, which one thread holds: a quarter of the registers."""
    return tl.sum(tl.reshape(x, (BLOCK // 4, 4)), 1)


@triton.jit
def _raise_maximum(maximum, column, new, x, columns):
    """The greater of `maximum` and `new`, the maximum of x; its column, the lowest of several; by how much it rose."""
    if new > maximum:
        column = tl.min(tl.where(x == new, columns, 2147483647), 0)
    raised = tl.maximum(new, maximum)
    return raised, column, raised - maximum


@triton.jit
def _add_tail(x, in_tail, greatest, total, scale, BLOCK: tl.constexpr):
    """The running maximum of the tail's columns and the sums of their exponentials relative to it."""
    new = tl.max(tl.where(in_tail, x, LOWEST), 0)
    if new > greatest:
        total *= tl.exp2((greatest - new) * scale)
        greatest = new
    return greatest, total + _fold(tl.where(in_tail, tl.exp2((x - greatest) * scale), 0.0), BLOCK)
